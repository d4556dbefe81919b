"""Divergence proximal policy optimisation (arXiv 2602.04879): a token stops learning when the policies have come apart,
measured by a divergence of probabilities; their ratio, which is wild for unlikely tokens, does not decide.

    loss = -keep sg(min(r, ratio_cap)) A logp,   r = exp(logp - old_logp)
    keep = 0 where A > 0, p > q and D > divergence_high, or A <= 0, p < q and D > divergence_low; else 1

with p = exp(logp), q = exp(old_logp), and of the two outcomes "this token" and "another" the divergence

    dppo_tv  D = |p - q|
    dppo_kl  D = q log(q / p) + (1 - q) log((1 - q) / (1 - p))

sg stops the gradient. verl takes the thresholds from its clip ratios, and its actor's dual clip of 3 for ratio_cap,
where the paper advises a large one; it adds 1e-8 to 1 - p and 1 - q, here they are exact to the last digit.

Shapes: M scored tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hybridflow.algorithms.policy_loss.ratio import bounded


def dppo_tv(
    logp_M: Tensor,
    old_logp_M: Tensor,
    advantage_M: Tensor,
    *,
    divergence_low: float = 0.2,
    divergence_high: float = 0.2,
    ratio_cap: float = 20.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Computes the loss of each token ``[M]``, and per-token diagnostics under verl's names.

    Args:
        logp_M: current log-probabilities (with gradient).
        old_logp_M: log-probabilities at the start of the step.
        advantage_M: advantage of each token.
        divergence_low: the largest divergence of a token that should be less likely.
        divergence_high: the largest divergence of a token that should be likelier.
        ratio_cap: bound on the weight.
    """
    return _dppo(logp_M, old_logp_M, advantage_M, _total_variation, divergence_low, divergence_high, ratio_cap)


def dppo_kl(
    logp_M: Tensor,
    old_logp_M: Tensor,
    advantage_M: Tensor,
    *,
    divergence_low: float = 0.2,
    divergence_high: float = 0.2,
    ratio_cap: float = 20.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Computes the loss as `dppo_tv` does, with the Kullback-Leibler divergence (the paper's thresholds: 0.05)."""
    return _dppo(logp_M, old_logp_M, advantage_M, _binary_kl, divergence_low, divergence_high, ratio_cap)


def _dppo(
    logp_M: Tensor,
    old_logp_M: Tensor,
    advantage_M: Tensor,
    divergence: Callable[[Tensor, Tensor], Tensor],
    divergence_low: float,
    divergence_high: float,
    ratio_cap: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    now_M = logp_M.detach()
    change_M = now_M - old_logp_M
    log_ratio_M = bounded(change_M)
    ratio_M = log_ratio_M.exp()
    apart_M = divergence(now_M, old_logp_M)
    over_M = torch.where(
        advantage_M > 0,
        (change_M > 0) & (apart_M > divergence_high),
        (change_M < 0) & (apart_M > divergence_low),
    )
    metrics = {
        "pg_clipfrac": over_M.float(),
        "pg_clipfrac_lower": ((ratio_M > ratio_cap) & ~over_M).float(),
        "ppo_kl": log_ratio_M.neg_(),
    }
    weight_M = ratio_M.clamp_(max=ratio_cap).mul_(advantage_M).neg_().masked_fill_(over_M, 0.0)
    return weight_M * logp_M, metrics


def _total_variation(logp_M: Tensor, old_logp_M: Tensor) -> Tensor:
    return (logp_M.exp() - old_logp_M.exp()).abs_()


def _binary_kl(logp_M: Tensor, old_logp_M: Tensor) -> Tensor:
    """Computes the KL of the old policy's two outcomes from the current one's; certain tokens have a huge one, not an
    infinite one.
    """
    tiny = torch.finfo(logp_M.dtype).tiny
    rest_M, old_rest_M = (logp.expm1().neg_().clamp_(min=tiny) for logp in (logp_M, old_logp_M))
    same_M = old_logp_M.exp() * (old_logp_M - logp_M)
    return same_M.add_(old_rest_M * (old_rest_M.log() - rest_M.log()))
