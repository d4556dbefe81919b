"""Decoupled PPO (arXiv 2505.24298; the idea: 2110.00641): for responses of older policies, three policies.

    w = exp(old_logp - rollout_logp)      the proximal policy over the behaviour policy, which drew the response
    loss = w ppo_clip(logp, old_logp, A)  the current policy is clipped around the proximal one

The proximal policy is that at the start of the step. With behaviour_cap, tokens with w above it have weight 0, as in
AReaL; the paper has no cap. verl gets the same from ppo_clip with token weights of its rollout correction, which cut w
instead.

Shapes: M scored tokens.
"""

from __future__ import annotations

from torch import Tensor

from hybridflow.algorithms.policy_loss.ppo_clip import ppo_clip
from hybridflow.algorithms.policy_loss.ratio import bounded


def decoupled_ppo(
    logp_M: Tensor,
    old_logp_M: Tensor,
    advantage_M: Tensor,
    rollout_logp_M: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    clip_dual: float | None = None,
    behaviour_cap: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Computes the loss of each token ``[M]``, and per-token diagnostics: those of `ppo_clip`, and the weights under
    AReaL's name.

    Args:
        logp_M: current log-probabilities (with gradient).
        old_logp_M: log-probabilities of the proximal policy, at the start of the step.
        advantage_M: advantage of each token.
        rollout_logp_M: log-probabilities of the policy that gave the responses.
        clip_low: the ratio is clipped below at ``1 - clip_low``.
        clip_high: the ratio is clipped above at ``1 + clip_high``.
        clip_dual: bound c > 1 on the ratio for negative advantages; None for no bound.
        behaviour_cap: tokens with a weight above this do not count; None for no cap.
    """
    weight_M = bounded(old_logp_M - rollout_logp_M).exp_()
    loss_M, metrics = ppo_clip(
        logp_M, old_logp_M, advantage_M, clip_low=clip_low, clip_high=clip_high, clip_dual=clip_dual
    )
    metrics["behave_imp_weight"] = weight_M
    if behaviour_cap is not None:
        over_M = weight_M > behaviour_cap
        metrics["behave_imp_weight"] = weight_M = weight_M.masked_fill_(over_M, 0.0)
        metrics["behave_dropfrac"] = over_M.float()
    return loss_M * weight_M, metrics
