"""REINFORCE's policy gradient (Williams, 1992). RLOO, ReMax, OPO and GPG train with it, each with its own advantage.

    loss = -A logp

There is no ratio: the gradient is right for responses of the current policy, one update per step. verl has it under the
name gpg, and under reinforce for its bypass mode.

Shapes: M scored tokens.
"""

from __future__ import annotations

from torch import Tensor


def reinforce(logp_M: Tensor, old_logp_M: Tensor, advantage_M: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Computes the loss of each token ``[M]``, and per-token diagnostics.

    Args:
        logp_M: current log-probabilities (with gradient).
        old_logp_M: log-probabilities at the start of the step, for the diagnostics alone.
        advantage_M: advantage of each token.
    """
    return -advantage_M * logp_M, {"ppo_kl": old_logp_M - logp_M.detach()}
