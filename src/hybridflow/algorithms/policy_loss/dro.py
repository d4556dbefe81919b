"""Direct reward optimisation (arXiv 2405.19107): a policy gradient with a quadratic tether to the old policy.

    loss = -(A logp - dro_beta / 2 (logp - old_logp)^2)

The paper regresses the whole response's log-ratio, with a learned value; this is the form per token, as in verl, whose
advantage stands for reward minus value. Its minimum is at logp - old_logp = A / dro_beta; tokens with A = 0 are
tethered.

Shapes: M scored tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def dro(
    logp_M: Tensor, old_logp_M: Tensor, advantage_M: Tensor, *, dro_beta: float = 0.1
) -> tuple[Tensor, dict[str, Tensor]]:
    """Computes the loss of each token ``[M]``, and per-token diagnostics.

    Args:
        logp_M: current log-probabilities (with gradient).
        old_logp_M: log-probabilities at the start of the step.
        advantage_M: advantage of each token.
        dro_beta: strength of the tether.
    """
    change_M = logp_M - old_logp_M
    loss_M = torch.addcmul(change_M.square().mul_(0.5 * dro_beta), advantage_M, logp_M, value=-1)
    return loss_M, {"ppo_kl": -change_M.detach()}
