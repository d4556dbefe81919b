"""The losses that an engine can be asked for by name: from token scores to weighted token losses.

Each reads its own columns of the batch at the M scored tokens. One weight column per loss term (`policy_weight_T`,
`entropy_weight_T`, `kl_weight_T`, `value_weight_T`), so that terms can be normalised apart; see `aggregation`.

Shapes: T tokens of a batch, M scored tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hybridflow.algorithms import preference
from hybridflow.algorithms.kl import KL_ESTIMATORS
from hybridflow.algorithms.mismatch import gap_maxima, gap_sums
from hybridflow.algorithms.pieces import ABSENT, call, columns_read, piece
from hybridflow.algorithms.policy_loss.registry import POLICY_LOSSES
from hybridflow.algorithms.value_loss import clipped_value_loss
from hybridflow.config.locate import is_function_reference, load_function


@dataclass(slots=True)
class Terms:
    """The loss of M tokens, with its metrics.

    Args:
        loss_M: weighted loss of each token: its sum over the mini-batch is what is minimised.
        sums: metrics that add up over the mini-batch.
        means: per-token values whose mean over the mini-batch's scored tokens is a metric.
        maxima: per-token values whose largest is a metric.
        gap: `mismatch.gap_sums` of these tokens; None where it is not measured.
    """

    loss_M: Tensor
    sums: dict[str, Tensor]
    means: dict[str, Tensor]
    maxima: dict[str, Tensor] = field(default_factory=dict)
    gap: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Reads:
    """The inputs of a loss.

    Args:
        outputs: scores of the tokens, by the names of `Scorer.score`.
        columns: columns ``x_T`` of the batch; what a batch lacks of them the loss is not given.
        entropy_gradient: whether the gradient of "entropy" is needed.
    """

    outputs: tuple[str, ...]
    columns: tuple[str, ...]
    entropy_gradient: bool = False


@dataclass(frozen=True, slots=True)
class LossSpec:
    """A loss, and what an engine must know to compute it.

    Args:
        function: from scores, columns and parameters to the loss of each token. Its columns are those that it reads,
            and ``sequence_T``: which sequence of the micro-batch a token belongs to.
        reads: its inputs under these parameters. Engines compute, and send to other processes, nothing else.
    """

    function: Callable[[Mapping[str, Tensor], Mapping[str, Tensor], Mapping[str, Any]], Terms]
    reads: Callable[[Mapping[str, Any]], Reads]


def policy(scores: Mapping[str, Tensor], columns: Mapping[str, Tensor], params: Mapping[str, Any]) -> Terms:
    """Computes the policy loss, minus the entropy bonus, plus the divergence from the reference and a shared trunk's
    value loss.

    Params: "policy_loss" (a key of `POLICY_LOSSES`, or ``file.py:function``) and that function's values under
    "values"; "entropy_coef"; "kl_loss_coef" with "kl_loss_estimator" (a key of `KL_ESTIMATORS`); "value_coef" with the
    params of `value`; "measure_gap".
    Columns: ``policy_weight_T`` and what the policy loss reads. Without ``old_logp_T`` the current policy is the old
    one (a single on-policy update). Where the coefficient is not 0: ``entropy_weight_T``; ``kl_weight_T`` and
    ``ref_logp_T``; those of `value`. ``rollout_weight_T`` multiplies the policy loss alone. With "measure_gap" the
    difference between the two engines is measured (see `mismatch`), from ``rollout_logp_T`` and ``age_T``.
    """
    logp_M = scores["logp"]

    def given(parameter: str) -> Any:
        if parameter == "logp_M":
            return logp_M
        if parameter == "old_logp_M":
            return columns.get("old_logp_T", logp_M.detach())
        if parameter.endswith("_M"):
            return columns.get(f"{parameter[:-1]}T", ABSENT)
        return params.get("values", {}).get(parameter, ABSENT)

    raw_M, means = call(piece(POLICY_LOSSES, params["policy_loss"]), given)
    weight_M = columns["policy_weight_T"]
    if "rollout_weight_T" in columns:
        weight_M = weight_M * columns["rollout_weight_T"]
    loss_M = raw_M * weight_M
    sums = {"actor/pg_loss": loss_M.detach()}
    means = {f"actor/{name}": value for name, value in means.items()}
    means["actor/entropy"] = scores["entropy"].detach()
    maxima, gap = {}, None
    if params.get("measure_gap", True) and "rollout_logp_T" in columns:
        maxima = gap_maxima(logp_M, columns["rollout_logp_T"])
        gap = gap_sums(logp_M, columns["rollout_logp_T"], columns.get("age_T"), scores.get("log_mass"))
    if params.get("entropy_coef", 0.0):
        bonus_M = scores["entropy"] * columns["entropy_weight_T"]
        sums["actor/entropy_loss"] = bonus_M.detach()
        loss_M = loss_M - params["entropy_coef"] * bonus_M
    if params.get("kl_loss_coef", 0.0):
        estimate_M = KL_ESTIMATORS[params["kl_loss_estimator"]](logp_M, columns["ref_logp_T"])
        divergence_M = estimate_M * columns["kl_weight_T"]
        sums["actor/kl_loss"] = divergence_M.detach()
        loss_M = loss_M + params["kl_loss_coef"] * divergence_M
    if params.get("value_coef", 0.0):
        critic = value(scores, columns, params)
        loss_M = loss_M + params["value_coef"] * critic.loss_M
        sums, means = sums | critic.sums, means | critic.means
    return Terms(loss_M, sums, means, maxima, gap)


def value(scores: Mapping[str, Tensor], columns: Mapping[str, Tensor], params: Mapping[str, Any]) -> Terms:
    """Computes the critic's loss. Params: "clip_value". Columns: ``value_T`` (old), ``return_T``,
    ``value_weight_T``.
    """
    raw_M, means = clipped_value_loss(
        scores["value"], columns["value_T"], columns["return_T"], clip_value=params["clip_value"]
    )
    loss_M = raw_M * columns["value_weight_T"]
    return Terms(loss_M, {"critic/vf_loss": loss_M.detach()}, {f"critic/{n}": v for n, v in means.items()})


def cross_entropy(scores: Mapping[str, Tensor], columns: Mapping[str, Tensor], params: Mapping[str, Any]) -> Terms:
    """Computes the negative log-likelihood, for supervised fine-tuning. Columns: ``policy_weight_T``."""
    return Terms(-scores["logp"] * columns["policy_weight_T"], {}, {})


def bradley_terry(scores: Mapping[str, Tensor], columns: Mapping[str, Tensor], params: Mapping[str, Any]) -> Terms:
    """Computes the loss of a reward model on pairs whose two conversations may be in different micro-batches.

    Each token at which a conversation is valued brings half of its pair's loss, and the whole of its own part of the
    gradient: its partner's value, from a scoring pass under the same weights, is a constant here. Params:
    "center_coef". Columns: ``partner_value_T``, ``chosen_T`` (bool), ``margin_T``, ``pair_weight_T``.
    """
    own_M, partner_M, chosen_M = scores["value"], columns["partner_value_T"], columns["chosen_T"]
    raw_M, _ = preference.bradley_terry(
        torch.where(chosen_M, own_M, partner_M),
        torch.where(chosen_M, partner_M, own_M),
        columns["margin_T"],
        center_coef=params.get("center_coef", 0.0),
    )
    return Terms((raw_M - 0.5 * raw_M.detach()) * columns["pair_weight_T"], {}, {})


def _policy_reads(params: Mapping[str, Any]) -> Reads:
    outputs, columns = ["logp", "entropy"], ["policy_weight_T", "rollout_weight_T"]
    columns += columns_read(piece(POLICY_LOSSES, params["policy_loss"]))
    if params.get("entropy_coef", 0.0):
        columns += ["entropy_weight_T"]
    if params.get("kl_loss_coef", 0.0):
        columns += ["kl_weight_T", "ref_logp_T"]
    if params.get("value_coef", 0.0):
        outputs += VALUE.outputs
        columns += VALUE.columns
    if params.get("measure_gap", True):
        outputs += ["log_mass"]
        columns += ["rollout_logp_T", "age_T"]
    return Reads(tuple(outputs), tuple(columns), entropy_gradient=bool(params.get("entropy_coef")))


VALUE = Reads(("value",), ("value_T", "return_T", "value_weight_T"))
PAIRS = Reads(("value",), ("partner_value_T", "chosen_T", "margin_T", "pair_weight_T"))

LOSSES: dict[str, LossSpec] = {
    "policy": LossSpec(policy, _policy_reads),
    "value": LossSpec(value, lambda params: VALUE),
    "cross_entropy": LossSpec(cross_entropy, lambda params: Reads(("logp",), ("policy_weight_T",))),
    "bradley_terry": LossSpec(bradley_terry, lambda params: PAIRS),
}


def loss_spec(name: str) -> LossSpec:
    """Returns a loss: that of a key of `LOSSES`, or what the user's own ``file.py:function`` returns.

    Raises:
        UserError: no such file or function.
    """
    spec: LossSpec = load_function(name)() if is_function_reference(name) else LOSSES[name]
    return spec
