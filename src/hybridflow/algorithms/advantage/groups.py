"""Statistics of groups of trajectories, the same for all group baselines.

Values are taken above the group's lowest one before anything is averaged. So members of a group that are worth the same
are worth exactly nothing against each other, whatever the rounding of a mean. Shapes: N trajectories, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EPSILON = 1e-6  # added to a standard deviation, as in verl


@dataclass(frozen=True, slots=True)
class Groups:
    """The groups of trajectories, and the size of each.

    Args:
        index_N: group of each trajectory, 0..G-1.
        size_G: trajectories of each group.
    """

    index_N: Tensor
    size_G: Tensor

    @staticmethod
    def of(group_N: Tensor) -> Groups:
        """Makes them from any integers that tell groups apart.

        Raises:
            ValueError: a group has one member only: there is nothing to compare it with.
        """
        _, index_N, size_G = torch.unique(group_N, return_inverse=True, return_counts=True)
        if len(size_G) and int(size_G.min()) < 2:
            raise ValueError("a group has a single trajectory; group baselines need at least two")
        return Groups(index_N, size_G)

    def sum(self, value_N: Tensor) -> Tensor:
        """Sums the values of each group ``[G]``."""
        return value_N.new_zeros(len(self.size_G)).index_add_(0, self.index_N, value_N)

    def lowest(self, value_N: Tensor) -> Tensor:
        """Returns the lowest value of each group ``[G]``."""
        none_G = value_N.new_empty(len(self.size_G))
        return none_G.scatter_reduce_(0, self.index_N, value_N, "amin", include_self=False)

    def highest(self, value_N: Tensor) -> Tensor:
        """Returns the highest value of each group ``[G]``."""
        return -self.lowest(-value_N)

    def above_lowest(self, value_N: Tensor) -> Tensor:
        """Computes ``value - lowest of the group`` ``[N]``: exactly 0 where all are equal."""
        return value_N - self.lowest(value_N)[self.index_N]

    def centered(self, value_N: Tensor) -> Tensor:
        """Computes ``value - mean of the group`` ``[N]``."""
        above_N = self.above_lowest(value_N)
        return above_N - (self.sum(above_N) / self.size_G)[self.index_N]

    def std(self, value_N: Tensor) -> Tensor:
        """Computes the standard deviation of each group ``[G]``, the unbiased one (divides by n - 1), as in verl; 0 if
        n = 1.
        """
        return (self.sum(self.centered(value_N).square()) / (self.size_G - 1).clamp(min=1)).sqrt()

    def normalized(self, value_N: Tensor, by_std: bool = True) -> Tensor:
        """Computes ``(value - mean) / (std + 1e-6)`` ``[N]``, or the same without the division."""
        centered_N = self.centered(value_N)
        return centered_N / (self.std(value_N) + EPSILON)[self.index_N] if by_std else centered_N
