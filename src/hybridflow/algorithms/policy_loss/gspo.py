"""Group sequence policy optimisation (arXiv 2507.18071): the ratio of a whole response, normalised by its length.

    s = exp(mean over the response of (logp - old_logp))
    gspo        loss = max(-A s, -A clip(s, 1 - clip_low, 1 + clip_high)), one value for the response  (equation 5)
    gspo_token  the same with each token's own A and s_t = sg(s) exp(logp_t - sg(logp_t))

sg stops the gradient. Both have the same values and gradients where a response has one advantage; gspo takes the mean
of several. A response's loss is given to each of its tokens, so "seq-mean-token-mean" is the paper's mean over
responses.

verl's gspo is the token form, with the log-ratio cut at 10 from above (here at 20 from both sides).

Shapes: M scored tokens, B sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridflow.algorithms.policy_loss.ratio import bounded
from hybridflow.algorithms.segments import segment_count, segment_mean


def gspo(
    logp_M: Tensor,
    old_logp_M: Tensor,
    advantage_M: Tensor,
    sequence_M: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Computes the loss of each token's sequence ``[M]``, and per-token diagnostics under verl's names.

    Args:
        logp_M: current log-probabilities (with gradient).
        old_logp_M: log-probabilities at the start of the step.
        advantage_M: advantage of each token; a sequence's is their mean.
        sequence_M: index of each token's sequence.
        clip_low: the sequence's ratio is clipped below at ``1 - clip_low``; the paper's is 3e-4.
        clip_high: the sequence's ratio is clipped above at ``1 + clip_high``; the paper's is 4e-4.
    """
    log_ratio_M = logp_M - old_logp_M
    count = segment_count(sequence_M)
    ratio_B = bounded(segment_mean(log_ratio_M, sequence_M, count)).exp()
    advantage_B = segment_mean(advantage_M, sequence_M, count)
    plain_B = -advantage_B * ratio_B
    clipped_B = -advantage_B * ratio_B.clamp(1 - clip_low, 1 + clip_high)
    metrics = {
        "pg_clipfrac": (clipped_B > plain_B).float()[sequence_M],
        "ppo_kl": -log_ratio_M.detach(),
    }
    return torch.maximum(plain_B, clipped_B)[sequence_M], metrics


def gspo_token(
    logp_M: Tensor,
    old_logp_M: Tensor,
    advantage_M: Tensor,
    sequence_M: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Computes the loss of each token ``[M]`` with its own advantage; arguments and diagnostics as in `gspo`."""
    log_ratio_M = logp_M.detach() - old_logp_M
    ratio_B = bounded(segment_mean(log_ratio_M, sequence_M, segment_count(sequence_M))).exp_()
    plain_M = -advantage_M * ratio_B[sequence_M]
    clipped_M = -advantage_M * ratio_B.clamp(1 - clip_low, 1 + clip_high)[sequence_M]
    over_M = clipped_M > plain_M
    unit_M = 1 + (logp_M - logp_M.detach())  # 1 with the gradient of logp, as exp(logp - sg(logp)) is
    metrics = {"pg_clipfrac": over_M.float(), "ppo_kl": log_ratio_M.neg_()}
    return torch.where(over_M, clipped_M, plain_M * unit_M), metrics
