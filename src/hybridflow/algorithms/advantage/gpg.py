"""Group policy gradient: GPG (arXiv 2504.02546).

    A_i   = alpha (r_i - mean of the group)
    alpha = N / (N - trajectories of the groups whose rewards are all equal)

Groups of equal rewards have no gradient, but count in the mean over the batch; alpha takes them out of it. verl counts
trajectories of reward 0 instead: then alpha changes where a constant is added to all rewards, is 1 for groups that are
right throughout, and above 1 where each group has right and wrong responses. Shapes: N trajectories, G groups.
"""

from __future__ import annotations

from torch import Tensor

from hybridflow.algorithms.advantage.groups import Groups


def gpg(reward_N: Tensor, group_N: Tensor) -> Tensor:
    """Computes the advantage of each trajectory over the mean of its group, scaled, ``[N]``.

    Args:
        reward_N: one reward per trajectory.
        group_N: group of each trajectory (any integers).

    Raises:
        ValueError: a group has one member only.
    """
    groups = Groups.of(group_N)
    differs_G = groups.highest(reward_N) != groups.lowest(reward_N)
    with_signal = int(groups.size_G[differs_G].sum())
    return groups.centered(reward_N) * (len(reward_N) / max(with_signal, 1))
