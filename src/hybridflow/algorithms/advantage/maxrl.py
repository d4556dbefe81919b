"""Maximum-likelihood reinforcement learning: MaxRL (arXiv 2602.02710).

    A_i = (r_i - mean of the group) / mean of the group        0 where the mean is 0

For rewards of 0 and 1: the gradient's mean over the right responses alone, an unbiased estimate of that of
``-sum_{k=1..n} (1 - p)^k / k``, which becomes log p, the log-likelihood of being right, as the group's size n grows. A
prompt that is seldom solved weighs about 1 / p. Not in verl 0.9.1. Shapes: N trajectories, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridflow.algorithms.advantage.groups import Groups
from hybridflow.errors import UserError


def maxrl(reward_N: Tensor, group_N: Tensor) -> Tensor:
    """Computes the advantage of each trajectory relative to the mean of its group, ``[N]``.

    Args:
        reward_N: one reward per trajectory, 0 at least.
        group_N: group of each trajectory (any integers).

    Raises:
        ValueError: a group has one member only.
        UserError: a reward is negative: it is no likelihood.
    """
    groups = Groups.of(group_N)
    if len(reward_N) and float(reward_N.min()) < 0:
        raise UserError(
            f"the maxrl advantage was given a reward of {float(reward_N.min()):g}",
            why="it divides by the mean reward of a group, which stands for the likelihood of being right",
            fix="give rewards of at least 0, best 0 and 1, and no penalty in the reward (algorithm.kl_reward_coef=0)",
        )
    mean_N = (groups.sum(reward_N) / groups.size_G)[groups.index_N]
    return torch.where(mean_N > 0, groups.centered(reward_N) / mean_N, 0.0)
