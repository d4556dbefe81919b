"""Soft adaptive policy optimisation (arXiv 2511.20347): a smooth gate in place of the clip.

    r = exp(logp - old_logp)
    loss = -A sigmoid(tau (r - 1)) 4 / tau,   tau = tau_positive where A > 0, else tau_negative

At r = 1 the gradient is that of REINFORCE. The paper averages within a response, then over responses:
"seq-mean-token-mean", which verl takes whatever its aggregation key says; here the configured aggregation holds.

Shapes: M scored tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridflow.algorithms.policy_loss.ratio import bounded


def sapo(
    logp_M: Tensor,
    old_logp_M: Tensor,
    advantage_M: Tensor,
    *,
    tau_positive: float = 1.0,
    tau_negative: float = 1.05,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Computes the loss of each token ``[M]``, and per-token diagnostics under verl's names.

    Args:
        logp_M: current log-probabilities (with gradient).
        old_logp_M: log-probabilities at the start of the step.
        advantage_M: advantage of each token.
        tau_positive: temperature of the gate where advantages are positive; higher closes it sooner.
        tau_negative: temperature of the gate where they are not.
    """
    log_ratio_M = bounded(logp_M - old_logp_M)
    tau_M = torch.where(advantage_M > 0, logp_M.new_tensor(tau_positive), logp_M.new_tensor(tau_negative))
    gate_M = (tau_M * (log_ratio_M.exp() - 1)).sigmoid()
    return gate_M * (-4 * advantage_M / tau_M), {"ppo_kl": -log_ratio_M.detach()}
