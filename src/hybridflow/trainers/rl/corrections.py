"""The steps between rewards and the loss: filters, outputs of the policy, corrections, statistics.

Order: filter, estimate, reject, then the weights of the loss, whose denominators count what is left.

Shapes: B sequences, T tokens of all sequences and their prompts, M of them with loss, N trajectories.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hybridflow.algorithms.correction import correct
from hybridflow.algorithms.mismatch import measured_gap, shift_metrics
from hybridflow.algorithms.off_policy import off_policy_metrics
from hybridflow.algorithms.pieces import ABSENT, call
from hybridflow.algorithms.policy_loss.registry import STATISTICS
from hybridflow.algorithms.reweighting import pf_ppo_rows
from hybridflow.batch import Batch
from hybridflow.config.kinds.rl import RlConfig
from hybridflow.config.pieces.needs import needs_of
from hybridflow.config.pieces.tables import ADVANTAGES, POLICY_LOSSES
from hybridflow.config.sections.algorithm import AlgorithmSection
from hybridflow.noise import NoiseKey, token_keys
from hybridflow.protocols.training import TrainEngine
from hybridflow.trainers.rl.batches import trajectories

# --- groups ---


# --- before the step's updates ---


def old_logp_is(config: RlConfig) -> str:
    """Returns where the ratio's denominator comes from: "rollout", "recompute", or "current" (the policy of the
    update).
    """
    a = config.algorithm
    if a.old_logp == "rollout" or a.correction.mode == "bypass":
        return "rollout"
    needed = (
        config.train.updates_per_step > 1
        or a.correction.active
        or needs_of(a.policy_loss, POLICY_LOSSES).needs_rollout_logp
        or "logp" in needs_of(a.advantage, ADVANTAGES).outputs
    )
    return "recompute" if a.old_logp == "recompute" or needed else "current"


def policy_outputs(config: RlConfig) -> list[str]:
    """Returns the outputs of the policy that a step computes before its updates, with one forward pass."""
    wanted = [o for o in needs_of(config.algorithm.advantage, ADVANTAGES).outputs if o != "logp"]
    gap = ["log_mass"] if config.rollout.cut else []
    return ["logp", *gap, *wanted] if old_logp_is(config) == "recompute" else wanted


def piece_values(a: AlgorithmSection, components: Sequence[str]) -> dict[str, Any]:
    """Returns the values that estimators take, by name; weights of reward components are in the components' order."""
    values = a.model_dump() | a.values
    if a.reward_weights is not None:
        values["reward_weights"] = [a.reward_weights.get(name, 0.0) for name in components]
    return values


def corrected(batch: Batch, logp_T: Tensor, a: AlgorithmSection) -> tuple[Batch, dict[str, float]]:
    """Returns the batch with the importance weights and without what ``algorithm.correction`` rejects, and its metrics.

    Args:
        batch: whole sequences with ``rollout_logp_T``; weights and bounds "of a sequence" are of each sequence of a
            trajectory.
        logp_T: the policy's log-probabilities of their tokens.
        a: the algorithm.
    """
    c, batch = a.correction, batch.select(list(batch))
    found = correct(
        logp_T,
        batch["rollout_logp_T"],
        batch["loss_mask_T"],
        batch.sequence_of(),
        len(batch),
        weights=c.weights,
        weight_cap=c.weight_cap,
        weight_floor=c.weight_floor,
        normalize=c.normalize,
        reject=c.reject,
    )
    if c.weights != "none":
        batch["rollout_weight_T"] = found.weight_T
    batch["keep_T"] = found.keep_T
    shift = shift_metrics(
        logp_T,
        batch["rollout_logp_T"],
        found.weight_T,
        batch["loss_mask_T"],
        batch.sequence_of(),
        len(batch),
        by_sequence=c.weights == "sequence",
    )
    return batch, engine_gap(batch, logp_T) | shift | found.metrics


def engine_gap(batch: Batch, logp_T: Tensor) -> dict[str, float]:
    """Measures how far the policy with these log-probabilities is from the engine that sampled, under verl's names."""
    return off_policy_metrics(logp_T, batch["rollout_logp_T"], batch["loss_mask_T"], batch.sequence_of(), len(batch))


def whole_gap(batch: Batch) -> dict[str, float]:
    """Returns `engine_gap` and all of `mismatch.gap_metrics`, for a step whose old log-probabilities were computed."""
    mask_T = batch["loss_mask_T"]
    mass_M = batch["log_mass_T"][mask_T] if "log_mass_T" in batch else None
    logp_M, rollout_logp_M, age_M = (batch[name][mask_T] for name in ("old_logp_T", "rollout_logp_T", "age_T"))
    return measured_gap(logp_M, rollout_logp_M, age_M, mass_M) | engine_gap(batch, batch["old_logp_T"])


def rejected(batch: Batch) -> Batch:
    """Returns the batch with a loss only on the tokens that the correction keeps."""
    batch = batch.select(list(batch))
    if "keep_T" in batch:
        batch["loss_mask_T"] = batch["loss_mask_T"] & batch["keep_T"]
        del batch.columns["keep_T"]
    return batch


def reweighted(batch: Batch, config: RlConfig, step: int) -> Batch:
    """Returns the step's responses, each whole, some of them again and some not at all (``reweight``)."""
    if config.reweight is None or not len(batch):
        return batch
    index_B, first_N = trajectories(batch)
    drawn = pf_ppo_rows(
        batch["reward_B"][first_N],
        batch["group_B"][first_N],
        batch["sample_B"][first_N],
        key=NoiseKey(config.run.seed, "reweight", step),
        method=config.reweight.method,
        power=config.reweight.power,
    )
    rows = index_B.argsort(stable=True).split(index_B.bincount().tolist())  # the sequences of each trajectory
    copies = [rows[n] for n in drawn.tolist()]
    batch = batch.take(torch.cat(copies))
    # A copy counts as a response of its own.
    batch["trajectory_B"] = torch.arange(len(copies)).repeat_interleave(torch.tensor([len(copy) for copy in copies]))
    return batch


# --- before each update ---


def needs_current(a: AlgorithmSection) -> bool:
    """Returns whether an update needs the current policy's log-probabilities of the whole mini-batch beforehand."""
    bypass = a.correction.mode == "bypass" and a.correction.active
    return bypass or needs_of(a.policy_loss, POLICY_LOSSES).statistics


def with_current(mini: Batch, config: RlConfig, engine: TrainEngine) -> tuple[Batch, dict[str, float]]:
    """Adds to the mini-batch what depends on the current policy over all of it: one forward pass, where that is needed.

    With ``algorithm.correction.mode=bypass`` these are the importance weights and what is rejected; for the losses in
    `STATISTICS` the columns that they read.
    """
    a = config.algorithm
    metrics: dict[str, float] = {}
    if not needs_current(a) or not len(mini):
        return mini, metrics
    logp_T = engine.score(mini, ["logp"], temperature=config.rollout.temperature)["logp"]
    if a.correction.mode == "bypass" and a.correction.active:
        mini, metrics = corrected(mini, logp_T, a)
        mini = rejected(mini)
    if a.policy_loss in STATISTICS:
        mini = mini.select(list(mini))
        for name, column_T in statistics_columns(mini, logp_T, a.policy_loss, a.model_dump(), config.run.seed).items():
            mini[name] = column_T
    return mini, metrics


def statistics_columns(
    mini: Batch, logp_T: Tensor, loss: str, values: Mapping[str, Any], seed: int
) -> dict[str, Tensor]:
    """Computes the columns that a policy loss makes of a whole mini-batch under the current policy.

    Args:
        mini: the mini-batch: ``loss_mask_T``, ``advantage_T``, ``group_B``, ``sample_B``, ``sequence_B``.
        logp_T: the current policy's log-probabilities.
        loss: a key of `STATISTICS`.
        values: the keys of the ``algorithm`` section.
        seed: the run's seed, of random picks.
    """

    def given(parameter: str) -> Any:
        if parameter == "logp_T" or (parameter == "old_logp_T" and parameter not in mini):
            return logp_T
        if parameter == "mask_T":
            return mini["loss_mask_T"]
        if parameter == "token_key_T":
            bits: list[int] = []
            before: Counter[tuple[int, int, int]] = Counter()  # copies of the same sequence have keys of their own
            for name in zip(*(mini[f"{column}_B"].tolist() for column in ("group", "sample", "sequence"))):
                draw, sample, sequence = name
                stream = f"{loss}/{before[name]}" + f"/{sequence}" * (sequence > 0)
                bits.append(NoiseKey(seed, stream, draw, sample).bits())
                before[name] += 1
            return token_keys(torch.tensor(bits, dtype=torch.int64), mini.lengths())
        held = mini if parameter.endswith("_T") else values
        if parameter in held:
            return held[parameter]
        return ABSENT

    return dict(call(STATISTICS[loss], given))
