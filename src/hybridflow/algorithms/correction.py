"""Correction of off-policy samples: importance weights that are cut, and samples that are rejected.

With d = logp - rollout logp of a token that another engine, or an older policy, drew:

    token weight     min(exp(d), cap)                      truncated importance sampling
    sequence weight  min(exp(sum of d), cap)               the same for all tokens of a sequence
    with a floor     exp(.) within [floor, cap], else 0    IcePop (arXiv 2510.18855)

    k1 = -d,  k2 = d^2 / 2,  k3 = exp(d) - 1 - d           what is compared with the bounds of a rejection level
    token_k     of a token, which alone is rejected
    seq_sum_k, seq_mean_k, seq_max_k                       of a sequence, which is rejected as a whole

The bounds of k1 are those of a ratio, of the sampler's probability to the policy's (as in verl, whose k1 is -d), for
seq_sum of the product of a sequence's ratios, for seq_mean of their geometric mean. Several levels at once: a token
must pass all. d is kept within 20. Following Yao et al., "Your efficient RL framework secretly brings you off-policy RL
training" (2025), and Liu et al., "When speed kills stability" (2025).

What verl does differently: normalisation divides by the mean over rejected tokens too, here by that over those that are
kept; sequences without a loss token count in its means over sequences; its metrics fail where every weight is 0.

Shapes: T tokens, M loss tokens, B sequences, S those with a loss token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hybridflow.algorithms.policy_loss.ratio import bounded
from hybridflow.algorithms.segments import segment_sum


@dataclass(frozen=True, slots=True)
class Correction:
    """The weights and rejections of a correction, with its metrics.

    Args:
        weight_T: factor of each token's policy loss (no gradient); 0 where `keep_T` is False.
        keep_T: the loss mask, without what was rejected.
        metrics: by verl's names, each behind ``rollout_corr/``.
    """

    weight_T: Tensor
    keep_T: Tensor
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True)
class _Sequences:
    """Sums over the loss tokens of each sequence that has any: index ``[M]``, numbers of loss tokens ``[S]``."""

    index_M: Tensor
    length_S: Tensor

    def sum(self, value_M: Tensor) -> Tensor:
        return segment_sum(value_M, self.index_M, len(self.length_S))

    def mean(self, value_M: Tensor) -> Tensor:
        return self.sum(value_M) / self.length_S

    def max(self, value_M: Tensor) -> Tensor:
        lowest_S = value_M.new_full((len(self.length_S),), -torch.inf)
        return lowest_S.scatter_reduce_(0, self.index_M, value_M, "amax")


def correct(
    logp_T: Tensor,
    rollout_logp_T: Tensor,
    mask_T: Tensor,
    sequence_T: Tensor,
    count: int,
    *,
    weights: str = "none",
    weight_cap: float = 2.0,
    weight_floor: float | None = None,
    normalize: bool = False,
    reject: Mapping[str, Sequence[float]] | None = None,
) -> Correction:
    """Computes weights and rejections of a whole step; no padding, no gradient.

    Args:
        logp_T: log-probabilities of the policy that trains.
        rollout_logp_T: those of the engine that sampled.
        mask_T: which tokens carry loss.
        sequence_T: index of each token's sequence, below `count`.
        count: number of sequences B.
        weights: "none", "token" or "sequence".
        weight_cap: weights are cut at this; with a floor those above it become 0.
        weight_floor: weights below it become 0; None for no floor.
        normalize: divide the weights by their mean, over kept tokens or sequences that keep a token.
        reject: bounds by level, such as ``{"seq_mean_k1": [0.9, 1.1], "token_k3": [0.1]}``; a k1 level with one bound u
            has the lower bound 1 / u.
    """
    log_ratio_M = (logp_T.detach() - rollout_logp_T.detach())[mask_T]
    length_B = torch.bincount(sequence_T[mask_T], minlength=count)
    index_B = (length_B > 0).cumsum(0) - 1
    sequences = _Sequences(index_B[sequence_T[mask_T]], length_B[length_B > 0])
    metrics: dict[str, float] = {}
    weight_M, keep_M = torch.ones_like(log_ratio_M), torch.ones_like(log_ratio_M, dtype=torch.bool)
    if len(log_ratio_M):
        if reject:
            keep_M = _reject(log_ratio_M, sequences, reject, metrics)
        if weights != "none":
            ratio_M = _ratio(log_ratio_M, sequences, weights)
            weight_M = _cut(ratio_M, weight_cap, weight_floor)
            metrics |= _weight_metrics(ratio_M, weight_M, sequences, weights, weight_cap, weight_floor)
            if normalize:
                factor = _mean_weight(weight_M, keep_M, sequences, weights)
                weight_M = weight_M / factor
                metrics["rollout_is_batch_norm_factor"] = factor
    keep_T, weight_T = mask_T.clone(), log_ratio_M.new_zeros(len(mask_T))
    keep_T[mask_T] = keep_M
    weight_T[mask_T] = weight_M.where(keep_M, 0)
    return Correction(weight_T, keep_T, {f"rollout_corr/{name}": value for name, value in metrics.items()})


def _ratio(log_ratio_M: Tensor, sequences: _Sequences, weights: str) -> Tensor:
    """Computes the importance weight of each token before it is cut ``[M]``."""
    assert weights in ("token", "sequence"), weights
    if weights == "sequence":
        return bounded(sequences.sum(log_ratio_M)).exp()[sequences.index_M]
    return bounded(log_ratio_M).exp()


def _cut(ratio_M: Tensor, cap: float, floor: float | None) -> Tensor:
    if floor is None:
        return ratio_M.clamp(max=cap)
    return ratio_M.where((ratio_M >= floor) & (ratio_M <= cap), 0)


def _mean_weight(weight_M: Tensor, keep_M: Tensor, sequences: _Sequences, weights: str) -> float:
    """Computes the number that normalised weights are divided by; 1 where no weight is left."""
    if weights == "sequence":  # one entry per sequence, however long it is
        kept_S = sequences.sum(keep_M.to(weight_M.dtype)) > 0
        mean = float(sequences.max(weight_M)[kept_S].mean()) if bool(kept_S.any()) else 0.0
    else:
        mean = float(weight_M[keep_M].mean()) if bool(keep_M.any()) else 0.0
    return mean if mean > 0 else 1.0


def _reject(
    log_ratio_M: Tensor, sequences: _Sequences, reject: Mapping[str, Sequence[float]], metrics: dict[str, float]
) -> Tensor:
    """Returns which tokens pass every level ``[M]``; adds the metrics of each level to `metrics`."""
    d_M = bounded(log_ratio_M)
    keep_M = torch.ones_like(d_M, dtype=torch.bool)
    for level, bounds in reject.items():
        scope, kind = level.rsplit("_", 1)
        value_M = {"k1": lambda: -d_M, "k2": lambda: 0.5 * d_M.square(), "k3": lambda: d_M.exp() - 1 - d_M}[kind]()
        low, high = -math.inf, bounds[-1]
        if kind == "k1":
            low, high = (math.log(bounds[0]) if len(bounds) == 2 else -math.log(high)), math.log(high)
        if scope == "token":
            value_S = sequences.mean(value_M)
        else:
            value_S = {"seq_sum": sequences.sum, "seq_mean": sequences.mean, "seq_max": sequences.max}[scope](value_M)
            value_M = value_S[sequences.index_M]
        passes_M = (value_M >= low) & (value_M <= high)
        keep_M &= passes_M
        metrics |= _level_metrics(f"rollout_rs_{level}", value_M, value_S, scope == "token", low, high)
        metrics |= _masked_fractions(f"rollout_rs_{level}", passes_M, sequences)
    metrics |= _masked_fractions("rollout_rs", keep_M, sequences)
    return keep_M


def _masked_fractions(prefix: str, keep_M: Tensor, sequences: _Sequences) -> dict[str, float]:
    """Computes the shares of tokens that are rejected, and of sequences that lose a token."""
    rejected_M = (~keep_M).float()
    return {
        f"{prefix}_masked_fraction": float(rejected_M.mean()),
        f"{prefix}_seq_masked_fraction": float((sequences.sum(rejected_M) > 0).float().mean()),
    }


def _level_metrics(
    prefix: str, value_M: Tensor, value_S: Tensor, by_token: bool, low: float, high: float
) -> dict[str, float]:
    """Describes the statistic of a level: mean over tokens, spread cut at the bounds, and the same over sequences."""
    judged = value_M if by_token else value_S
    return {
        f"{prefix}_mean": float(value_M.mean()),
        f"{prefix}_max": float(value_M.max()),
        f"{prefix}_min": float(value_M.min()),
        f"{prefix}_std": float(value_M.clamp(low, high).std(correction=0)),
        f"{prefix}_fraction_high": float((judged > high).float().mean()),
        f"{prefix}_fraction_low": float((judged < low).float().mean()),
        **_sequence_metrics(prefix, value_S, value_S, 0.0, low, high),
    }


def _weight_metrics(
    ratio_M: Tensor, weight_M: Tensor, sequences: _Sequences, weights: str, cap: float, floor: float | None
) -> dict[str, float]:
    """Describes the weights before rejection and normalisation. The extremes of tokens are those of cut weights, the
    ones of sequences of the ratios themselves, as in verl.
    """
    low = 1 / cap if floor is None else floor
    by_sequence = weights == "sequence"
    ratio_S, weight_S = sequences.mean(ratio_M), sequences.mean(weight_M)
    judged = sequences.max(ratio_M) if by_sequence else ratio_M
    seen = judged if by_sequence else weight_M
    square = float(weight_M.square().mean())
    metrics = {
        "rollout_is_mean": float(weight_M.mean()),
        "rollout_is_max": float(seen.max()),
        "rollout_is_min": float(seen.min()),
        "rollout_is_std": float(weight_M.std(correction=0)),
        "rollout_is_eff_sample_size": float(weight_M.mean()) ** 2 / square if square else 0.0,
        "rollout_is_ratio_fraction_high": float((judged > cap).float().mean()),
        "rollout_is_ratio_fraction_low": float((judged < low).float().mean()),
        **_sequence_metrics("rollout_is", weight_S, ratio_S, 1.0, low, cap),
    }
    if floor is not None:
        metrics["rollout_is_oob_ratio"] = float(((ratio_M < floor) | (ratio_M > cap)).float().mean())
    return metrics


def _sequence_metrics(
    prefix: str, value_S: Tensor, judged_S: Tensor, ideal: float, low: float, high: float
) -> dict[str, float]:
    return {
        f"{prefix}_seq_mean": float(value_S.mean()),
        f"{prefix}_seq_std": float(value_S.std()) if len(value_S) > 1 else 0.0,
        f"{prefix}_seq_max": float(value_S.max()),
        f"{prefix}_seq_min": float(value_S.min()),
        f"{prefix}_seq_max_deviation": float((value_S - ideal).abs().max()),
        f"{prefix}_seq_fraction_high": float((judged_S > high).float().mean()),
        f"{prefix}_seq_fraction_low": float((judged_S < low).float().mean()),
    }
