"""Loading models, ragged attention, token scores, adapters."""
