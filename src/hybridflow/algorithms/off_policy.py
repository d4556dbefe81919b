"""The distance of the policy that trains from the one that sampled: diagnostic metrics, under verl's names.

With d = logp - rollout logp of a sampled token, and a sequence's perplexity exp(-mean logp):

    kl           mean of -d: estimates KL(sampler | policy), may be negative
    k3_kl        mean of exp(d) - d - 1: the same with less variance, never negative
    chi2_token   mean of exp(d)^2 - 1: how much the importance weights of tokens vary
    chi2_seq     the same of a whole sequence, whose log-ratio is the sum of its tokens'
    *ppl*        perplexities of both, and how they differ, as means over sequences

d is kept within 20, and all is computed in float64: squares of small gaps vanish in float32. verl counts sequences
without a loss token in the means over sequences, as perplexity 1; here they do not count. It does not bound d in k3_kl.
Shapes: T tokens, M loss tokens, B sequences, S those with a loss token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridflow.algorithms.policy_loss.ratio import bounded
from hybridflow.algorithms.segments import segment_sum


def off_policy_metrics(
    logp_T: Tensor, rollout_logp_T: Tensor, mask_T: Tensor, sequence_T: Tensor, count: int
) -> dict[str, float]:
    """Computes the numbers above, each behind ``rollout_corr/``; none where no token carries loss.

    Args:
        logp_T: log-probabilities of the policy that trains.
        rollout_logp_T: those of the engine that sampled.
        mask_T: which tokens carry loss.
        sequence_T: index of each token's sequence, below `count`.
        count: number of sequences B.
    """
    logp_M, rollout_logp_M = (values_T.detach()[mask_T].double() for values_T in (logp_T, rollout_logp_T))
    sequence_M = sequence_T[mask_T]
    if not len(logp_M):
        return {}
    ratio_M = logp_M - rollout_logp_M
    safe_M = bounded(ratio_M)
    length_B = torch.bincount(sequence_M, minlength=count)
    used_B = length_B > 0

    def sums(value_M: Tensor) -> Tensor:
        return segment_sum(value_M, sequence_M, count)[used_B]

    length_S = length_B[used_B]
    log_ppl_S, rollout_log_ppl_S = -sums(logp_M) / length_S, -sums(rollout_logp_M) / length_S
    sum_S = sums(ratio_M)
    difference_S = sum_S / length_S
    found = {
        "kl": -ratio_M.mean(),
        "k3_kl": (safe_M.exp() - safe_M - 1).mean(),
        "training_ppl": log_ppl_S.exp().mean(),
        "rollout_ppl": rollout_log_ppl_S.exp().mean(),
        "training_log_ppl": log_ppl_S.mean(),
        "rollout_log_ppl": rollout_log_ppl_S.mean(),
        "log_ppl_diff": -difference_S.mean(),
        "log_ppl_diff_max": -difference_S.min(),
        "log_ppl_diff_min": -difference_S.max(),
        "log_ppl_abs_diff": difference_S.abs().mean(),
        "ppl_ratio": (-difference_S).exp().mean(),
        "chi2_token": (2 * safe_M).exp().mean() - 1,
        "chi2_seq": (2 * bounded(sum_S)).exp().mean() - 1,
    }
    return {f"rollout_corr/{name}": float(value) for name, value in found.items()}
