"""Group-relative advantages: GRPO (arXiv 2402.03300) and, without the division, Dr.GRPO (arXiv 2503.20783).

    A_i = (r_i - mean of the group) / (std of the group + 1e-6)

The standard deviation is the unbiased one (divides by n - 1), as in verl. Shapes: N trajectories, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-6


def grpo(reward_N: Tensor, group_N: Tensor, *, normalize_by_std: bool = True) -> Tensor:
    """Advantage of each trajectory against the others of its group, ``[N]``.

    Args:
        reward_N: one reward per trajectory.
        group_N: group of each trajectory (any integers).
        normalize_by_std: False leaves out the division (Dr.GRPO).

    Raises:
        ValueError: a group has one member only: there is nothing to compare it with.
    """
    _, index_N, size_G = torch.unique(group_N, return_inverse=True, return_counts=True)
    if len(size_G) and int(size_G.min()) < 2:
        raise ValueError("a group has a single trajectory; group baselines need at least two")
    lowest_G = torch.full_like(reward_N[: len(size_G)], torch.inf).scatter_reduce_(0, index_N, reward_N, "amin")
    above_N = reward_N - lowest_G[index_N]  # so that equal rewards give exactly 0, whatever the rounding of their mean
    centered_N = above_N - (_group_sum(above_N, index_N, len(size_G)) / size_G)[index_N]
    if not normalize_by_std:
        return centered_N
    std_G = (_group_sum(centered_N.square(), index_N, len(size_G)) / (size_G - 1)).sqrt()
    return centered_N / (std_G + EPSILON)[index_N]


def _group_sum(value_N: Tensor, index_N: Tensor, groups: int) -> Tensor:
    return value_N.new_zeros(groups).index_add_(0, index_N, value_N)
