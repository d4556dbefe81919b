"""Tapered off-policy REINFORCE (arXiv 2503.14286): good responses are imitated whole, bad ones are pushed away only as
long as the policy is still likely to give them.

    loss = -w A logp
    w = 1 where A >= 0, else sg(min(exp(sum over the response of (logp - old_logp)), topr_cap))

sg stops the gradient. The ratio is that of the whole response, so its gradient is the sum over the response's tokens:
"seq-mean-token-sum" is the paper's mean over responses. topr_cap is 1 there. verl does not have it.

Shapes: M scored tokens, B sequences.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hybridflow.algorithms.segments import segment_count, segment_sum


def topr(
    logp_M: Tensor, old_logp_M: Tensor, advantage_M: Tensor, sequence_M: Tensor, *, topr_cap: float = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Computes the loss of each token ``[M]``, and per-token diagnostics.

    Args:
        logp_M: current log-probabilities (with gradient).
        old_logp_M: log-probabilities of the policy that gave the responses.
        advantage_M: advantage of each token.
        sequence_M: index of each token's sequence.
        topr_cap: bound on the ratio of sequences with negative advantages.
    """
    change_M = logp_M.detach() - old_logp_M
    log_ratio_B = segment_sum(change_M, sequence_M, segment_count(sequence_M))
    bound = math.log(topr_cap)
    capped_M = (log_ratio_B > bound)[sequence_M] & (advantage_M < 0)
    ratio_M = log_ratio_B.clamp(max=bound).exp_()[sequence_M]
    weight_M = torch.where(advantage_M < 0, ratio_M, 1.0).mul_(advantage_M).neg_()
    return weight_M * logp_M, {"pg_clipfrac": capped_M.float(), "ppo_kl": change_M.neg_()}
