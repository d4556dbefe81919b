"""CISPO (arXiv 2506.13585): the clipped ratio is a weight of the policy gradient, so every token learns.

    r = exp(logp - old_logp)
    loss = -sg(clip(r, 1 - clip_low, 1 + clip_high)) A logp

sg stops the gradient. The paper sets no lower bound (the preset's 0.99 is none in effect); verl's default is 0.2 for
both.

Shapes: M scored tokens.
"""

from __future__ import annotations

from torch import Tensor

from hybridflow.algorithms.policy_loss.ratio import bounded


def cispo(
    logp_M: Tensor,
    old_logp_M: Tensor,
    advantage_M: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Computes the loss of each token ``[M]``, and per-token diagnostics under verl's names.

    Args:
        logp_M: current log-probabilities (with gradient).
        old_logp_M: log-probabilities at the start of the step.
        advantage_M: advantage of each token.
        clip_low: the weight is at least ``1 - clip_low``.
        clip_high: the weight is at most ``1 + clip_high``.
    """
    log_ratio_M = bounded(logp_M.detach() - old_logp_M)
    ratio_M = log_ratio_M.exp()
    weight_M = ratio_M.clamp(1 - clip_low, 1 + clip_high)
    metrics = {"pg_clipfrac": (ratio_M != weight_M).float(), "ppo_kl": log_ratio_M.neg_()}
    return weight_M.mul_(advantage_M).neg_() * logp_M, metrics
