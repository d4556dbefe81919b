"""The tokens that drive the policy's entropy down: the covariance of advantage and log-probability (arXiv 2505.22617).

    cov = (A - mean A) (logp - mean logp), means over the mini-batch's loss tokens

The picks of `clip_cov` and `kl_cov` do not depend on the order of the tokens: what is drawn at random goes by the
tokens' keys, and so do ties.

Shapes: T tokens of the mini-batch, M of them with loss, C candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 1 << 20  # tokens that are sorted at a time


def covariance(logp_T: Tensor, advantage_T: Tensor, mask_T: Tensor) -> Tensor:
    """Computes the covariance of each token ``[T]``; its values where the mask is False have no meaning.

    In float32 whatever the input, so that the rounding of a mean over tokens in another order changes no rank.
    """
    return ((advantage_T - _mean(advantage_T, mask_T)) * (logp_T - _mean(logp_T, mask_T))).float()


def _mean(value_T: Tensor, mask_T: Tensor) -> float:
    """Computes the mean counted from the smallest value, so that the mean of equal values is exactly that value."""
    value_M = value_T[mask_T]
    if not len(value_M):
        return 0.0
    least = value_M.min()
    return float(least.double() + (value_M - least).mean(dtype=torch.float64))


def picked(mask_T: Tensor, share: float) -> int:
    """Returns how many tokens a share of the loss tokens is: at least one."""
    return max(1, int(share * int(mask_T.sum())))


def smallest_keys(candidate_T: Tensor, key_T: Tensor, number: int) -> Tensor:
    """Returns the positions ``[at most number]`` of the candidates with the smallest keys."""
    position_C = candidate_T.nonzero()[:, 0]
    if len(position_C) <= number:
        return position_C
    return position_C[key_T[position_C].topk(number, largest=False).indices]


def largest(value_T: Tensor, mask_T: Tensor, key_T: Tensor, number: int) -> Tensor:
    """Marks the largest values with 1 ``[T]`` (float32) where the mask is True, 0 elsewhere; of equal ones by smallest
    key.
    """
    value_T = value_T.masked_fill(~mask_T, -torch.inf)
    best = torch.cat([block.topk(min(number, len(block))).values for block in value_T.split(_BLOCK)])
    bound = best.topk(min(number, len(best))).values[-1] if len(best) else torch.inf
    chosen_T = ((value_T > bound) & mask_T).float()
    ties = smallest_keys((value_T == bound) & mask_T, key_T, number - int(chosen_T.sum()))
    return chosen_T.index_fill_(0, ties, 1.0)
