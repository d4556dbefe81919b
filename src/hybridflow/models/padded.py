"""Hidden states of a model that does not take packed sequences: padded on the right, with its own attention.

Shapes: T tokens of all sequences, N sequences of a bucket, L longest of a bucket, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridflow.batch import offsets_from_lengths
from hybridflow.models.attention import bucket_indices


def padded_states(trunk: torch.nn.Module, input_ids_T: Tensor, lengths: Tensor) -> Tensor:
    """Computes the ``[T, D]`` last hidden states; sequences of similar length go through together, so that little is
    padding.

    Args:
        trunk: a causal model without its output layer.
        input_ids_T: token ids, on the model's device.
        lengths: tokens of each sequence.
    """
    gather, scatter = bucket_indices(lengths, offsets_from_lengths(lengths))
    parts = []
    for index_NL in gather:
        real_NL = torch.ones_like(index_NL, dtype=torch.bool)
        real_NL[:, 1:] = index_NL.diff() > 0  # padding repeats the last token
        states_NLD = trunk(
            input_ids=input_ids_T[index_NL.to(input_ids_T.device)],
            attention_mask=real_NL.long().to(input_ids_T.device),
            use_cache=False,
        ).last_hidden_state
        parts.append(states_NLD.flatten(0, 1))
    return torch.cat(parts)[scatter.to(input_ids_T.device)]
