"""The clipped surrogate of PPO (arXiv 1707.06347), with clip-higher (2503.14476) and the dual clip (1912.09729).

    r = exp(logp - old_logp)
    loss = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))
    where A < 0 and a dual clip c is set: min(loss, -A c)

Shapes: M scored tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridflow.algorithms.policy_loss.ratio import bounded


def ppo_clip(
    logp_M: Tensor,
    old_logp_M: Tensor,
    advantage_M: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    clip_dual: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Computes the loss of each token ``[M]``, and per-token diagnostics under verl's names.

    Args:
        logp_M: current log-probabilities (with gradient).
        old_logp_M: log-probabilities at the start of the step (no gradient).
        advantage_M: advantage of each token.
        clip_low: the ratio is clipped below at ``1 - clip_low``.
        clip_high: the ratio is clipped above at ``1 + clip_high``.
        clip_dual: bound c > 1 on the ratio for negative advantages; None for no bound.
    """
    log_ratio_M = bounded(logp_M - old_logp_M)
    ratio_M = log_ratio_M.exp()
    cost_M = -advantage_M
    plain_M = cost_M * ratio_M
    clipped_M = cost_M * ratio_M.clamp(1 - clip_low, 1 + clip_high)
    loss_M = torch.maximum(plain_M, clipped_M)
    metrics = {"pg_clipfrac": (clipped_M > plain_M).float(), "ppo_kl": -log_ratio_M.detach()}
    if clip_dual is not None:
        bound_M = cost_M * clip_dual
        metrics["pg_clipfrac_lower"] = ((advantage_M < 0) & (loss_M > bound_M)).float()
        loss_M = torch.where(advantage_M < 0, torch.minimum(loss_M, bound_M), loss_M)
    return loss_M, metrics
