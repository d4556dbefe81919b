"""The losses that an engine can be asked for by name: from token scores to weighted token losses.

Each reads its own columns of the batch at the M scored tokens. One weight column per loss term (`policy_weight_T`,
`entropy_weight_T`), so that terms can be normalised apart; see `aggregation`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from hybridflow.algorithms.policy_loss import POLICY_LOSSES


@dataclass(slots=True)
class Terms:
    """What a loss makes of M tokens.

    Args:
        loss_M: weighted loss of each token: its sum over the mini-batch is what is minimised.
        sums: metrics that add up over the mini-batch.
        means: per-token values whose mean over the mini-batch's scored tokens is a metric.
        maxima: per-token values whose largest is a metric.
    """

    loss_M: Tensor
    sums: dict[str, Tensor]
    means: dict[str, Tensor]
    maxima: dict[str, Tensor] = field(default_factory=dict)


def policy(scores: Mapping[str, Tensor], columns: Mapping[str, Tensor], params: Mapping[str, Any]) -> Terms:
    """Policy loss minus the entropy bonus.

    Params: "policy_loss" (a key of `POLICY_LOSSES`) and that function's values under "values"; "entropy_coef".
    Columns: ``advantage_T``, ``policy_weight_T``, ``entropy_weight_T`` where the coefficient is not 0, and
    ``old_logp_T``; without the last, the current policy is the old one (a single on-policy update). With
    ``rollout_logp_T`` the difference between the two engines is measured (verl's names).
    """
    logp_M = scores["logp"]
    old_logp_M = columns.get("old_logp_T", logp_M.detach())
    raw_M, means = POLICY_LOSSES[params["policy_loss"]](
        logp_M, old_logp_M, columns["advantage_T"], **params.get("values", {})
    )
    loss_M = raw_M * columns["policy_weight_T"]
    sums = {"actor/pg_loss": loss_M.detach()}
    means = {f"actor/{name}": value for name, value in means.items()}
    means["actor/entropy"] = scores["entropy"].detach()
    maxima = {}
    if "rollout_logp_T" in columns:  # the gap between the engine that sampled and the one that trains
        gap_M = (logp_M.detach().exp() - columns["rollout_logp_T"].exp()).abs()
        means["training/rollout_probs_diff_mean"] = maxima["training/rollout_probs_diff_max"] = gap_M
        means["rollout_corr/kl"] = columns["rollout_logp_T"] - logp_M.detach()
    if params.get("entropy_coef", 0.0):
        bonus_M = scores["entropy"] * columns["entropy_weight_T"]
        sums["actor/entropy_loss"] = bonus_M.detach()
        loss_M = loss_M - params["entropy_coef"] * bonus_M
    return Terms(loss_M, sums, means, maxima)


def cross_entropy(scores: Mapping[str, Tensor], columns: Mapping[str, Tensor], params: Mapping[str, Any]) -> Terms:
    """Negative log-likelihood, for supervised fine-tuning. Columns: ``policy_weight_T``."""
    return Terms(-scores["logp"] * columns["policy_weight_T"], {}, {})


LOSSES: dict[str, Callable[[Mapping[str, Tensor], Mapping[str, Tensor], Mapping[str, Any]], Terms]] = {
    "policy": policy,
    "cross_entropy": cross_entropy,
}

# Columns that a loss reads besides the scores; an engine carries those that the batch has to its device.
COLUMNS = ("advantage_T", "old_logp_T", "policy_weight_T", "entropy_weight_T", "rollout_logp_T")
