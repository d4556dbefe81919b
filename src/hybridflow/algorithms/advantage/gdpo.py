"""Rewards of several components, normalised apart: GDPO (arXiv 2601.05242).

    A_ik = (r_ik - mean of the group) / (std of the group + 1e-6)        for each component k
    S_i  = sum_k w_k A_ik
    A_i  = (S_i - mean of the step) / (std of the step + 1e-6)

As each component is normalised on its own, none drowns another by its scale, and answers of equal sums stay apart where
they earned them otherwise. The last line is over trajectories, as in the paper, and keeps the size of advantages
whatever the number of components; as S has the mean 0 in every group, only its division matters. verl takes the last
statistics over tokens, so that advantages there depend on lengths and do not vanish in a group of equal rewards.
Shapes: N trajectories, K components.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hybridflow.algorithms.advantage.groups import EPSILON, Groups


def gdpo(components_NK: Tensor, group_N: Tensor, *, reward_weights: Sequence[float] | None = None) -> Tensor:
    """Advantage of each trajectory, ``[N]``.

    Args:
        components_NK: the reward's components.
        group_N: group of each trajectory (any integers).
        reward_weights: weight of each component, in their order; None: 1 for all.

    Raises:
        ValueError: a group has one member only.
    """
    groups, sum_N = Groups.of(group_N), components_NK.new_zeros(len(components_NK))
    weights = [1.0] * components_NK.shape[1] if reward_weights is None else reward_weights
    for component_N, weight in zip(components_NK.unbind(1), weights, strict=True):
        sum_N = sum_N + weight * groups.normalized(component_N)
    return sum_N / (torch.std(sum_N) + EPSILON) if len(sum_N) else sum_N
