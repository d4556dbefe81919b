"""REINFORCE++ with the group's mean as a baseline (arXiv 2501.03262, section on REINFORCE++-baseline).

    C_i = r_i - mean of the group
    A_i = (C_i - mean) / sqrt(variance + 1e-8)        over all tokens of the step that carry loss

Unlike GRPO's, the standard deviation is that of the step, so that a group of nearly equal rewards is not blown up. As
the second mean is over tokens, it is 0 only if lengths do not depend on rewards: a group of equal rewards has small
advantages. As in verl, but a group of a single trajectory is refused. Shapes: N trajectories.
"""

from __future__ import annotations

from torch import Tensor

from hybridflow.algorithms.advantage.groups import Groups
from hybridflow.algorithms.whitening import whiten_trajectories


def reinforce_plus_plus_baseline(reward_N: Tensor, group_N: Tensor, length_N: Tensor) -> Tensor:
    """Computes the advantage of each trajectory, ``[N]``.

    Args:
        reward_N: one reward per trajectory.
        group_N: group of each trajectory (any integers).
        length_N: number of tokens of each that carry loss.

    Raises:
        ValueError: a group has one member only.
    """
    return whiten_trajectories(Groups.of(group_N).centered(reward_N), length_N)
