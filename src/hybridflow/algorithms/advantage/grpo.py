"""Group-relative advantages: GRPO (arXiv 2402.03300) and, without the division, Dr.GRPO (arXiv 2503.20783).

    A_i = (r_i - mean of the group) / (std of the group + 1e-6)

The standard deviation is the unbiased one (divides by n - 1), as in verl. A group of a single trajectory is refused;
verl gives it its plain reward. Shapes: N trajectories.
"""

from __future__ import annotations

from torch import Tensor

from hybridflow.algorithms.advantage.groups import Groups


def grpo(reward_N: Tensor, group_N: Tensor, *, normalize_by_std: bool = True) -> Tensor:
    """Computes the advantage of each trajectory against the others of its group, ``[N]``.

    Args:
        reward_N: one reward per trajectory.
        group_N: group of each trajectory (any integers).
        normalize_by_std: False leaves out the division (Dr.GRPO).

    Raises:
        ValueError: a group has one member only: there is nothing to compare it with.
    """
    return Groups.of(group_N).normalized(reward_N, normalize_by_std)
