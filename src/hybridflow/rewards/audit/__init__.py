"""The audit of rewards: they score responses that are known to be right or wrong."""
