"""Sums and means over ragged segments: the tokens of a sequence, the responses of a group.

Shapes: M values, each in one of S segments. Segments may lie in any order and may be empty.
"""

from __future__ import annotations

from torch import Tensor


def segment_count(index_M: Tensor) -> int:
    """Returns S, one more than the largest index; 0 where there are no values."""
    return int(index_M.max()) + 1 if len(index_M) else 0


def segment_sum(value_M: Tensor, index_M: Tensor, count: int) -> Tensor:
    """Sums every segment ``[count]``, 0 where it is empty; differentiable by the values."""
    return value_M.new_zeros(count).index_add(0, index_M, value_M)


def segment_mean(value_M: Tensor, index_M: Tensor, count: int) -> Tensor:
    """Averages every segment ``[count]``, 0 where it is empty; differentiable by the values."""
    size_S = index_M.bincount(minlength=count).clamp_(min=1)
    return segment_sum(value_M, index_M, count) / size_S.to(value_M.dtype)
