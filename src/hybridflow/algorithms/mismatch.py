"""The gap between the engine that sampled and the policy that trains, by its causes: sums and their metrics.

For a token that was drawn with log-probability r and has log-probability l under the policy, both over the words it
was drawn from (its support), with d = r - l, and with m the policy's log mass of that support (0 for a whole
vocabulary), the divergence KL(sampler | policy over the whole vocabulary) has two estimates without bias:

    k1   mean of d - m
    k3   mean of exp(-d) - 1 + d - m        less variance: the first part is never negative

Either is the sum of three parts, exactly:

    numerics    mean over the fresh tokens: the same weights, computed by two engines
    staleness   mean over all tokens less that: what older weights add, if numerics are alike in old and fresh tokens
    support     mean of -m: what cutting by top-p, top-k or min-p adds. Training scores over the support, so that this
                part is not in its ratios

A token is fresh where the weights that drew it are those that score it. Without a fresh token numerics cannot be kept
apart, and count as staleness.

Quantiles of |d| come from a histogram of logarithmic bins, so that they add up over micro-batches and ranks; each is
within `ACCURACY` (1.1 %) of the true one, and 0 below 2^-27. d is kept within 20 in the exponential.

What a correction leaves of it is `shift_left`: with the ratio w* of policy to sampler and the weight w that stands for
it, the mean of |w - w*| is the L1 distance between the weighted sampler and the policy, which bounds the bias of a
gradient; without weights it is the mean of |1 - w*|, the `shift`.

Shapes: T tokens, M trained tokens, B sequences, S spans of one weight version, G sums.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hybridflow.algorithms.policy_loss.ratio import bounded
from hybridflow.algorithms.segments import segment_sum

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999}
PER_OCTAVE, LOWEST, HIGHEST = 32, -27, 7  # bins to a factor of two, and the powers of two where they begin and end
ACCURACY = 2 ** (0.5 / PER_OCTAVE) - 1
BINS = PER_OCTAVE * (HIGHEST - LOWEST) + 2  # the first holds what is smaller, the last what is larger

# What is summed over tokens; p and q are the probabilities under policy and sampler.
SUMS = (
    "tokens", "k1", "k3", "stale_tokens", "stale_k1", "stale_k3", "support", "diff", "diff2", "p", "q", "pp", "qq", "pq"
)  # fmt: skip


def token_ages(version_S: Tensor, start_S: Tensor, end_S: Tensor, mask_T: Tensor, version: int) -> Tensor:
    """Computes how many versions older than `version` the weights are that each token was drawn with ``[T]``; 0
    elsewhere.

    Args:
        version_S: weight version of each span.
        start_S: its first token, counted from the response's first.
        end_S: one after its last.
        mask_T: the tokens of the responses, which the spans cover in order.
        version: of the weights that score them.
    """
    age_T = torch.zeros(len(mask_T), dtype=torch.int64)
    age_T[mask_T] = version - torch.repeat_interleave(version_S, end_S - start_S)
    return age_T


def gap_sums(
    logp_M: Tensor, rollout_logp_M: Tensor, age_M: Tensor | None = None, log_mass_M: Tensor | None = None
) -> Tensor:
    """Computes the sums that `gap_metrics` reads, in float64 on the host ``[G]``: add them over parts of a batch.

    Args:
        logp_M: log-probabilities under the policy that trains, over the words that each token was drawn from.
        rollout_logp_M: those of the engine that sampled.
        age_M: how many versions older the weights are that drew a token; None: all tokens are fresh.
        log_mass_M: log-probability under the policy of all words that a token was drawn from; None: the whole
            vocabulary.
    """
    l_M, r_M = logp_M.detach().cpu().double(), rollout_logp_M.detach().cpu().double()
    d_M, p_M, q_M = r_M - l_M, l_M.exp(), r_M.exp()
    k3_M = bounded(-d_M).exp() - 1 + d_M
    stale_M = torch.zeros(len(d_M), dtype=torch.bool) if age_M is None else age_M.cpu() > 0
    support = 0.0 if log_mass_M is None else -float(log_mass_M.detach().cpu().double().sum())
    columns = (
        torch.ones_like(d_M), d_M, k3_M, stale_M.double(), d_M.where(stale_M, 0), k3_M.where(stale_M, 0),
        torch.zeros_like(d_M), (p_M - q_M).abs(), (p_M - q_M).square(), p_M, q_M, p_M * p_M, q_M * q_M, p_M * q_M,
    )  # fmt: skip
    sums = torch.stack(columns).sum(1)
    sums[SUMS.index("support")] = support
    place_M = ((d_M.abs().nan_to_num(torch.inf).log2() - LOWEST) * PER_OCTAVE).floor() + 1
    return torch.cat([sums, place_M.clamp(0, BINS - 1).long().bincount(minlength=BINS).double()])


def gap_maxima(logp_M: Tensor, rollout_logp_M: Tensor) -> dict[str, Tensor]:
    """Computes values of each token ``[M]`` whose largest is the metric of that name."""
    logp_M = logp_M.detach()
    return {
        "mismatch/abs_logp_diff/max": (rollout_logp_M - logp_M).abs(),
        "training/rollout_probs_diff_max": (rollout_logp_M.exp() - logp_M.exp()).abs(),
    }


def gap_metrics(sums_G: Tensor) -> dict[str, float]:
    """Computes the metrics of a batch, under verl's names where it has them; none of an empty one.

    Args:
        sums_G: of `gap_sums`, added over all of the batch's tokens.
    """
    found = dict(zip(SUMS, sums_G[: len(SUMS)].tolist()))
    n = found["tokens"]
    if not n:
        return {}
    metrics = {"mismatch/stale_tokens": found["stale_tokens"] / n}
    for kind in ("k1", "k3"):
        fresh = n - found["stale_tokens"]
        same = found[kind] / n
        numerics = (found[kind] - found[f"stale_{kind}"]) / fresh if fresh else 0.0
        parts = {"numerics": numerics, "staleness": same - numerics, "support": found["support"] / n}
        metrics |= {f"mismatch/{kind}/{part}": value for part, value in parts.items()}
        metrics[f"mismatch/{kind}/total"] = sum(parts.values())
        metrics[{"k1": "rollout_corr/kl", "k3": "rollout_corr/k3_kl"}[kind]] = same
    counts = sums_G[len(SUMS) :].cumsum(0)
    for name, share in QUANTILES.items():
        metrics[f"mismatch/abs_logp_diff/{name}"] = _value_of(int((counts < math.ceil(share * n)).sum()))
    mean = found["diff"] / n
    metrics["training/rollout_probs_diff_mean"] = mean
    metrics["training/rollout_probs_diff_std"] = math.sqrt(max(0.0, found["diff2"] / n - mean * mean))
    spread_p, spread_q = (found[2 * x] / n - (found[x] / n) ** 2 for x in "pq")
    if spread_p > 0 and spread_q > 0:
        shared = found["pq"] / n - found["p"] * found["q"] / n**2
        metrics["training/rollout_actor_probs_pearson_corr"] = shared / math.sqrt(spread_p * spread_q)
    return metrics


def measured_gap(
    logp_M: Tensor, rollout_logp_M: Tensor, age_M: Tensor | None = None, log_mass_M: Tensor | None = None
) -> dict[str, float]:
    """Computes all metrics of a batch whose log-probabilities are at hand as a whole; the arguments are those of
    `gap_sums`.
    """
    if not len(logp_M):
        return {}
    largest = {name: float(value_M.max()) for name, value_M in gap_maxima(logp_M, rollout_logp_M).items()}
    return gap_metrics(gap_sums(logp_M, rollout_logp_M, age_M, log_mass_M)) | largest


def shift_metrics(
    logp_T: Tensor,
    rollout_logp_T: Tensor,
    weight_T: Tensor,
    mask_T: Tensor,
    sequence_T: Tensor,
    count: int,
    *,
    by_sequence: bool,
) -> dict[str, float]:
    """Computes ``mismatch/shift``, and what a correction leaves of it, ``mismatch/shift_left``.

    Args:
        logp_T: log-probabilities of the policy that trains.
        rollout_logp_T: those of the engine that sampled.
        weight_T: what each token's loss is multiplied with; 0 where it is rejected.
        mask_T: which tokens carry loss.
        sequence_T: index of each token's sequence, below `count`.
        count: number of sequences B.
        by_sequence: the weights stand for ratios of whole sequences.
    """
    log_ratio_M, sequence_M = (logp_T.detach() - rollout_logp_T.detach())[mask_T].double(), sequence_T[mask_T]
    if not len(log_ratio_M):
        return {}
    if by_sequence:
        log_ratio_M = segment_sum(log_ratio_M, sequence_M, count)[sequence_M]
    ratio_M = bounded(log_ratio_M).exp()
    left_M = (weight_T[mask_T] - ratio_M).abs()
    return {"mismatch/shift": float((1 - ratio_M).abs().mean()), "mismatch/shift_left": float(left_M.mean())}


def _value_of(place: int) -> float:
    """Returns the value that represents a bin: its middle, on the logarithmic scale."""
    if place == 0:
        return 0.0
    if place >= BINS - 1:
        return math.inf
    return float(2.0 ** ((place - 0.5) / PER_OCTAVE + LOWEST))
