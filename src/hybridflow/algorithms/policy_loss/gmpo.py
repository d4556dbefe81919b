"""Geometric-mean policy optimisation (arXiv 2507.20673): the geometric mean of a response's clipped ratios.

    d = logp - old_logp, cut at clip_high from above where A > 0, and at -clip_low from below where A < 0
    loss = -A exp(mean over the response of d), one value for the response

The clips are bounds of the log-ratio: 0.4 lets ratios go from exp(-0.4) to exp(0.4), as in the paper. A response's loss
is given to each of its tokens, so "seq-mean-token-mean" is the paper's mean over responses. A response whose tokens
have several advantages has their mean.

verl (geo_mean) takes the plain mean over the micro-batch whatever the aggregation, so that a step depends on how it is
split; and it cuts by the sign of each token's advantage though the response's is what multiplies the ratio.

Shapes: M scored tokens, B sequences.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hybridflow.algorithms.policy_loss.ratio import bounded
from hybridflow.algorithms.segments import segment_count, segment_mean


def gmpo(
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
        clip_low: log-ratios are cut below at ``-clip_low`` where the advantage is negative.
        clip_high: log-ratios are cut above at ``clip_high`` where the advantage is positive.
    """
    log_ratio_M = logp_M - old_logp_M
    count = segment_count(sequence_M)
    advantage_B = segment_mean(advantage_M, sequence_M, count)
    lower_B = torch.full_like(advantage_B, -math.inf).masked_fill_(advantage_B < 0, -clip_low)
    upper_B = torch.full_like(advantage_B, math.inf).masked_fill_(advantage_B > 0, clip_high)
    cut_M = log_ratio_M.clamp(lower_B[sequence_M], upper_B[sequence_M])
    ratio_B = bounded(segment_mean(cut_M, sequence_M, count)).exp()
    change_M = log_ratio_M.detach()
    metrics = {
        "pg_clipfrac": (change_M > upper_B[sequence_M]).float(),
        "pg_clipfrac_lower": (change_M < lower_B[sequence_M]).float(),
        "ppo_kl": -change_M,
    }
    return (-advantage_B * ratio_B)[sequence_M], metrics
