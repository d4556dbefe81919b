"""REINFORCE with a leave-one-out baseline: RLOO (arXiv 2402.14740, equation 6).

    A_i = r_i - 1 / (n - 1) sum_{j != i} r_j = n / (n - 1) (r_i - mean of the group)

A group of a single trajectory is refused; of verl's two versions one gives it its plain reward and the other 0. Shapes:
N trajectories, G groups.
"""

from __future__ import annotations

from torch import Tensor

from hybridflow.algorithms.advantage.groups import Groups


def rloo(reward_N: Tensor, group_N: Tensor) -> Tensor:
    """Computes the advantage of each trajectory over the mean of the others of its group, ``[N]``.

    Args:
        reward_N: one reward per trajectory.
        group_N: group of each trajectory (any integers).

    Raises:
        ValueError: a group has one member only.
    """
    groups = Groups.of(group_N)
    size_G = groups.size_G.to(reward_N.dtype)
    return groups.centered(reward_N) * (size_G / (size_G - 1))[groups.index_N]
