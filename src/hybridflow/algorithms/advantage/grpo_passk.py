"""Advantages for the best of a group, its pass@k (arXiv 2503.19595).

    A_i = max_j r_j - max_{j != i} r_j        over the group, optionally divided by its std + 1e-6

What a trajectory adds to the group's best reward: the best one's lead over the second best, 0 for all others, and for
all where two share the top. This is the leave-one-out estimator of the gradient of the expected best of n, with n the
group's size. The division is verl's, not the paper's. Shapes: N trajectories, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridflow.algorithms.advantage.groups import EPSILON, Groups


def grpo_passk(reward_N: Tensor, group_N: Tensor, *, normalize_by_std: bool = True) -> Tensor:
    """Computes the advantage of each trajectory, ``[N]``: not 0 for the best of each group alone.

    Args:
        reward_N: one reward per trajectory.
        group_N: group of each trajectory (any integers).
        normalize_by_std: whether to divide by the group's standard deviation.

    Raises:
        ValueError: a group has one member only.
    """
    groups = Groups.of(group_N)
    best_N = reward_N == groups.highest(reward_N)[groups.index_N]
    second_G = groups.highest(reward_N.masked_fill(best_N, -torch.inf))
    alone_G = groups.sum(best_N.to(reward_N.dtype)) == 1
    lead_N = torch.where(best_N & alone_G[groups.index_N], reward_N - second_G[groups.index_N], 0.0)
    return lead_N / (groups.std(reward_N) + EPSILON)[groups.index_N] if normalize_by_std else lead_N
