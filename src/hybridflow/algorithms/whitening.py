"""Whitening: values with mean 0 and variance 1 over the tokens that carry loss.

The statistics are over all these tokens at once, so give it a whole step; the variance is the unbiased one (divides by
one less than their number), as in verl. A single token has no variance: it becomes 0. Shapes: M tokens with loss,
N trajectories.
"""

from __future__ import annotations

from torch import Tensor

EPSILON = 1e-8  # added to the variance


def whiten(value_M: Tensor) -> Tensor:
    """Computes ``(value - mean) / sqrt(variance + 1e-8)`` ``[M]``."""
    if len(value_M) < 2:
        return value_M.new_zeros(len(value_M))
    variance = value_M.var()
    return (value_M - value_M.mean()).mul_((variance + EPSILON).rsqrt())


def whiten_trajectories(value_N: Tensor, length_N: Tensor) -> Tensor:
    """Computes `whiten` of values that all tokens of a trajectory share: one for each trajectory ``[N]``.

    Args:
        value_N: the value of every token with loss of a trajectory.
        length_N: how many these are.
    """
    tokens = int(length_N.sum())
    if tokens < 2:
        return value_N.new_zeros(len(value_N))
    weight_N = length_N.to(value_N.dtype)
    centered_N = value_N - (value_N * weight_N).sum() / tokens
    variance = (centered_N.square() * weight_N).sum() / (tokens - 1)
    return centered_N * (variance + EPSILON).rsqrt()
