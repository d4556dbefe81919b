"""Whitening: values with mean 0 and variance 1 over the tokens that carry loss."""

from __future__ import annotations

from torch import Tensor

EPSILON = 1e-8  # added to the variance


def whiten(value_T: Tensor, mask_T: Tensor) -> Tensor:
    """``(value - mean) / sqrt(variance + 1e-8)`` ``[T]``, 0 where `mask_T` is False.

    The statistics are over all masked-in tokens at once, so give it a whole step; the variance is the unbiased one
    (divides by one less than their number), as in verl. A single token has no variance: it becomes 0.
    """
    kept_M = value_T[mask_T]
    whitened_T = value_T.new_zeros(len(value_T))
    if len(kept_M) > 1:
        whitened_T[mask_T] = (kept_M - kept_M.mean()) * (kept_M.var() + EPSILON).rsqrt()
    return whitened_T
