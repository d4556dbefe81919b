"""On-policy RL with the optimal reward baseline: OPO (arXiv 2505.23585).

    A_i = r_i - sum_j l_j r_j / sum_j l_j        over the group, l the length in tokens

The baseline of least variance weighs rewards by the squared norm of the gradient, taken to grow as the length. As in
verl, but a group of a single trajectory is refused. Shapes: N trajectories, G groups.
"""

from __future__ import annotations

from torch import Tensor

from hybridflow.algorithms.advantage.groups import Groups


def opo(reward_N: Tensor, group_N: Tensor, length_N: Tensor) -> Tensor:
    """Computes the advantage of each trajectory over the length-weighted mean of its group, ``[N]``.

    Args:
        reward_N: one reward per trajectory.
        group_N: group of each trajectory (any integers).
        length_N: number of tokens of each that carry loss; where a group has none, nothing is learned from it.

    Raises:
        ValueError: a group has one member only.
    """
    groups = Groups.of(group_N)
    above_N, weight_N = groups.above_lowest(reward_N), length_N.to(reward_N.dtype)
    baseline_G = groups.sum(above_N * weight_N) / groups.sum(weight_N).clamp(min=1)
    return above_N - baseline_G[groups.index_N]
