"""The critic's loss: squared error, with PPO's clip around the values at the start of the step.

    1/2 max((v - R)^2, (clip(v, v_old - c, v_old + c) - R)^2)

The clip is that of the OpenAI baselines implementation of PPO (arXiv 1707.06347 does not have it); verl's c is 0.5.

Shapes: M scored tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def clipped_value_loss(
    value_M: Tensor, old_value_M: Tensor, return_M: Tensor, *, clip_value: float | None = 0.5
) -> tuple[Tensor, dict[str, Tensor]]:
    """Computes the loss of each token ``[M]``, and per-token diagnostics under verl's names.

    Args:
        value_M: current values (with gradient).
        old_value_M: values at the start of the step (no gradient).
        return_M: the targets of the values.
        clip_value: how far a value may usefully move from the old one in a step; None for no bound.
    """
    error_M = (value_M - return_M).square()
    if clip_value is None:
        return 0.5 * error_M, {"vpred_mean": value_M.detach()}
    kept_M = torch.clamp(value_M, old_value_M - clip_value, old_value_M + clip_value)
    clipped_M = (kept_M - return_M).square()
    clipped = (clipped_M > error_M).float()
    return 0.5 * torch.maximum(error_M, clipped_M), {"vf_clipfrac": clipped, "vpred_mean": value_M.detach()}
