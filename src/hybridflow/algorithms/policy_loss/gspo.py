"""Group sequence policy optimisation (arXiv 2507.18071): the ratio of a whole answer, normalised by its length.

    s = exp(mean over the answer of (logp - old_logp))
    gspo        loss = max(-A s, -A clip(s, 1 - clip_low, 1 + clip_high)), one value for the answer  (equation 5)
    gspo_token  the same with each token's own A and s_t = sg(s) exp(logp_t - sg(logp_t))

sg stops the gradient. Both have the same values and gradients where an answer has one advantage; gspo takes the mean of
several. An answer's loss is given to each of its tokens, so "seq-mean-token-mean" is the paper's mean over answers.

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
    """Loss of each token's sequence ``[M]``, and per-token diagnostics under verl's names.

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
    loss_B, clipped_B = _clipped(ratio_B, advantage_B, clip_low, clip_high)
    metrics = {"pg_clipfrac": clipped_B[sequence_M], "ppo_kl": -log_ratio_M.detach()}
    return loss_B[sequence_M], metrics


def gspo_token(
    logp_M: Tensor,
    old_logp_M: Tensor,
    advantage_M: Tensor,
    sequence_M: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of each token ``[M]`` with its own advantage; arguments and diagnostics as in `gspo`."""
    log_ratio_M = (logp_M - old_logp_M).detach()
    mean_B = segment_mean(log_ratio_M, sequence_M, segment_count(sequence_M))
    # exp(logp - sg(logp)) is 1 with the gradient of logp, and so is what is added here.
    ratio_M = bounded(mean_B).exp_()[sequence_M] * (1 + logp_M - logp_M.detach())
    loss_M, clipped_M = _clipped(ratio_M, advantage_M, clip_low, clip_high)
    return loss_M, {"pg_clipfrac": clipped_M, "ppo_kl": -log_ratio_M}


def _clipped(ratio: Tensor, advantage: Tensor, clip_low: float, clip_high: float) -> tuple[Tensor, Tensor]:
    """The clipped surrogate, and 1 where the clip took over."""
    plain = -advantage * ratio
    clipped = -advantage * ratio.clamp(1 - clip_low, 1 + clip_high)
    return torch.maximum(plain, clipped), (clipped > plain).float()
