"""Rewards of several components, normalised apart: GDPO (arXiv 2601.05242).

    A_ik = (r_ik - mean of the group) / (std of the group + 1e-6)        for each component k
    S_i  = sum_k w_k A_ik
    A_i  = (S_i - mean of the step) / (std of the step + 1e-6)

Each component is normalised on its own: none outweighs another by its scale, and responses of equal sums keep different
advantages where different components earned the sum. The last line is over trajectories, as in the paper, and keeps the
size of advantages whatever the number of components; as S has the mean 0 in every group, only its division matters.
verl takes the last statistics over tokens, so that advantages there depend on lengths and do not vanish in a group of
equal rewards.

A trajectory that lacks a component (NaN) gets nothing from it, and its group's mean and std are those of the others.
Shapes: N trajectories, G groups, K components.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hybridflow.algorithms.advantage.groups import EPSILON, Groups


def gdpo(components_NK: Tensor, group_N: Tensor, *, reward_weights: Sequence[float] | None = None) -> Tensor:
    """Computes the advantage of each trajectory, ``[N]``.

    Args:
        components_NK: the reward's components; NaN where a trajectory lacks one.
        group_N: group of each trajectory (any integers).
        reward_weights: weight of each component, in their order; None: 1 for all.

    Raises:
        ValueError: a group has one member only.
    """
    groups, sum_N = Groups.of(group_N), components_NK.new_zeros(len(components_NK))
    weights = [1.0] * components_NK.shape[1] if reward_weights is None else reward_weights
    for component_N, weight in zip(components_NK.unbind(1), weights, strict=True):
        lacks_N = component_N.isnan()
        own_N = _of_those_that_have(component_N, group_N) if lacks_N.any() else groups.normalized(component_N)
        sum_N = sum_N + weight * own_N
    return sum_N / (torch.std(sum_N) + EPSILON) if len(sum_N) else sum_N


def _of_those_that_have(component_N: Tensor, group_N: Tensor) -> Tensor:
    """Normalises a component among the trajectories of each group that have it ``[N]``; 0 for those that lack it."""
    has_N = ~component_N.isnan()
    _, index_N, count_G = torch.unique(group_N[has_N], return_inverse=True, return_counts=True)
    compared_N = has_N.nonzero()[:, 0][count_G[index_N] > 1]  # a single one has nothing to be compared with
    found_N = torch.zeros_like(component_N)
    found_N[compared_N] = Groups.of(group_N[compared_N]).normalized(component_N[compared_N])
    return found_N
