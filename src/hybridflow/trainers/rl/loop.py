"""The reinforcement-learning loop, the same for all algorithms: they differ in what `estimate` and `update` are given.

Shapes: B sequences, T tokens of all sequences and their prompts, S spans of one version of the weights,
K components of a reward.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from hybridflow.agents.given import NOTHING, Given
from hybridflow.algorithms.advantage.registry import advantage_columns
from hybridflow.algorithms.mismatch import token_ages
from hybridflow.batch import Batch
from hybridflow.config.kinds.rl import RlConfig
from hybridflow.config.pieces.needs import needs_of
from hybridflow.config.pieces.tables import ADVANTAGES
from hybridflow.devices import memory_metrics
from hybridflow.faults import fault_point
from hybridflow.protocols.groups import Group
from hybridflow.protocols.training import Loss, Scorer, TrainEngine
from hybridflow.rewards.graders.given import GivenReward
from hybridflow.tracking.rollouts import write_rollouts
from hybridflow.tracking.signal_watch import TEACHES, teaches
from hybridflow.trainers.rl.batches import batch_of, minibatches, trajectories
from hybridflow.trainers.rl.callbacks import Callback, call_back, require_callbacks
from hybridflow.trainers.rl.corrections import (
    corrected,
    old_logp_is,
    piece_values,
    policy_outputs,
    rejected,
    reweighted,
    whole_gap,
    with_current,
)
from hybridflow.trainers.rl.filters import component_names, failure_counts, nothing_passed, passing, trainable
from hybridflow.trainers.rl.losses import divergence, policy_loss, value_loss, with_loss, with_weights
from hybridflow.trainers.rl.measures import PENALTY, batch_metrics, kl_metrics, rollout_records
from hybridflow.trainers.rl.run import RlRun, open_run
from hybridflow.trainers.rl.shaping import shaped_rewards, token_rewards


def train(
    config: RlConfig,
    *,
    reward: GivenReward | None = None,
    given: Given = NOTHING,
    callbacks: Sequence[Callback] = (),
) -> Path:
    """Runs a configuration to its end, or to where it is asked to stop; the same call then resumes it.

    Args:
        config: the configuration.
        reward: see `open_run`.
        given: see `open_run`.
        callbacks: called after each step, see `callbacks`.

    Returns:
        The run's folder, with ``model/`` in it once the run has ended.

    Raises:
        Interrupted: Ctrl-C or SIGTERM stopped the run; its checkpoint is saved.
    """
    require_callbacks(callbacks)
    with open_run(config, reward=reward, given=given) as run:
        if run.step == 0 and config.eval.before_training:
            record(run, 0, [], None, {})
        for step in run.steps():
            groups, drawn = next_groups(run, step)
            batch, estimated = estimate(run, groups)
            learned = update(run, batch)
            sent = publish_weights(run, step)
            line = record(run, step, groups, batch, learned | drawn | estimated | sent)
            call_back(callbacks, run, step, line, groups, batch)
        run.finish()
    return run.folder.path


def next_groups(run: RlRun, step: int) -> tuple[list[Group], dict[str, float]]:
    """Draws prompts, generates and scores responses until the step has its groups; returns them with counts."""
    fault_point("gen", step)
    f, wanted = run.config.filter, run.config.train.prompts_per_step
    groups: list[Group] = []
    drawn: list[Group] = []
    dropped: Counter[str] = Counter()
    rounds, reward_seconds = 0, 0.0
    with run.clock.phase("gen"):
        run.turn.to_generation()
        while len(groups) < wanted and rounds < (f.max_rounds if f.active else 1):
            found = run.source.collect(step, run.sampler.take(wanted - len(groups)))
            drawn += found
            groups += passing(found, f, dropped)
            reward_seconds += run.source.reward_seconds
            rounds += 1
    run.clock.seconds["reward"] = reward_seconds
    run.clock.seconds["gen"] -= reward_seconds
    if not groups:
        raise nothing_passed(f, dropped, drawn)
    counts = failure_counts(drawn, run.config.reward.on_failure)
    if f.active:
        counts |= {f"training/filtered_groups/{reason}": float(n) for reason, n in dropped.items()}
        counts |= {"training/num_gen_batches": float(rounds), "training/groups": float(len(groups))}
    return groups, counts


def estimate(run: RlRun, groups: list[Group]) -> tuple[Batch, dict[str, float]]:
    """Returns the step's training batch (tokens, log-probabilities and values where they are needed, rewards,
    advantages), and the metrics of this phase.
    """
    config, a = run.config, run.config.algorithm
    run.turn.to_training()
    groups, counts = trainable(groups, config)
    batch = batch_of(groups)
    if not len(batch):  # no response is left to learn from: the step makes no update
        return batch, counts
    version_S, start_S, end_S = (batch[f"span_{name}_S"] for name in ("version", "start", "end"))
    batch["age_T"] = token_ages(version_S, start_S, end_S, batch["loss_mask_T"], run.step)
    scores = score_all(run, batch)
    for name, column_T in scores.get("old_log_prob", {}).items():
        batch["old_logp_T" if name == "logp" else f"{name}_T"] = column_T
    if "old_logp_T" in batch:
        counts |= whole_gap(batch)
    if old_logp_is(config) == "rollout":
        batch["old_logp_T"] = batch["rollout_logp_T"]
    if "ref" in scores:
        batch["ref_logp_T"] = scores["ref"]["logp"]
    if "values" in scores:
        batch["value_T"] = scores["values"]["value"]
    with run.clock.phase("adv"):
        if a.correction.active and a.correction.mode == "decoupled":
            batch, found = corrected(batch, batch["old_logp_T"], a)
            counts |= found
        shaped = shaped_rewards(batch, config, run.moments)
        run.moments = shaped.moments
        if shaped.baseline_B is not None:
            batch["baseline_B"] = shaped.baseline_B
        batch["reward_T"] = token_rewards(batch, shaped.reward_B)
        if a.kl_reward_coef:
            batch["kl_T"] = divergence(batch, a.kl_reward_estimator)
            batch["reward_T"] -= run.kl.coef * batch["kl_T"]
        if needs_of(a.advantage, ADVANTAGES).needs_components and "components_BK" not in batch:
            batch["components_BK"] = torch.zeros(len(batch), 0)  # no response of the step has any
        values = piece_values(a, component_names(groups))
        for name, column_T in advantage_columns(a.advantage, batch, values).items():
            batch[name] = column_T
    return reweighted(rejected(batch), config, run.step + 1), counts


def update(run: RlRun, batch: Batch) -> dict[str, float]:
    """Trains on the batch: one optimizer step for every `sequences_per_update` responses. Returns the mean metrics."""
    config, metrics = run.config, [kl_metrics(batch, run.config.algorithm, run.kl.coef)]
    if PENALTY in metrics[0]:
        run.kl.observe(metrics[0][PENALTY], len(trajectories(batch)[1]))  # the next step's coefficient
    minis = minibatches(batch, config.train.answers_per_update)
    of_critic: list[Callable[[], dict[str, float]]] = []
    if run.critic is not None and config.critic is not None and not run.critic.shared:
        with run.clock.phase("update_critic"):
            for mini in minis * (config.critic.epochs_per_step or config.train.epochs_per_step):
                weighted = with_weights(mini, config)
                of_critic.append(_optimizer_step(run, run.critic.engine, weighted, value_loss(config)))
    if config.critic is None or run.step >= config.critic.warmup_steps:
        with run.clock.phase("update_actor"):
            for i, mini in enumerate(minis * config.train.epochs_per_step):
                current, found = with_current(mini, config, run.engine)
                prepared = with_loss(with_weights(current, config), config)  # weights count what is left
                metrics.append(found)
                if len(prepared):  # else no response has an advantage: nothing to learn from, no step
                    # The gap between engines is measured once: here where old log-probabilities were not computed,
                    # and in the first update, before it changes the weights.
                    loss = policy_loss(config, measure_gap=i == 0 and old_logp_is(config) != "recompute")
                    metrics.append(_optimizer_step(run, run.engine, prepared, loss)())
    with run.clock.phase("update_critic"):  # in a pool of its own it has been trained meanwhile
        metrics += [learned() for learned in of_critic]
    fault_point("update", run.step + 1)
    values = {name: [m[name] for m in metrics if name in m] for m in metrics for name in m}
    return {name: sum(found) / len(found) for name, found in values.items()}


def publish_weights(run: RlRun, step: int) -> dict[str, float]:
    """Publishes the new weights to the generation engine; returns the metrics of that."""
    with run.clock.phase("update_weights"):
        sent = run.publish(step)
    fault_point("publish", step)
    return sent


def record(
    run: RlRun, step: int, groups: list[Group], batch: Batch | None, metrics: dict[str, float]
) -> dict[str, float]:
    """Evaluates, writes the metrics, and saves a checkpoint, each where it is due; returns the step's metrics."""
    config, last = run.config, step == run.total_steps
    if run.held_out is not None and (step == 0 or last or (config.eval.every and step % config.eval.every == 0)):
        metrics = metrics | run.evaluate(step)
        fault_point("eval", step)
    if batch is not None:
        metrics = metrics | run.places.take_metrics() | batch_metrics(run, groups, batch)
        taught = teaches(groups, config.algorithm.advantage, config.reward.clip)
        if taught is not None:
            metrics[TEACHES] = float(taught)
        for watch in run.watches:
            advice = watch.observe(metrics)
            if advice is not None:
                run.trackers.advise(f"step {step}: {advice}")
        if step == 1:
            run.advise_where_none_ended("first step", [t.finish_reason for g in groups for t in g.trajectories])
        if config.track.rollouts_every and (step % config.track.rollouts_every == 0 or last):
            with run.clock.phase("dump_rollout_generations"):
                write_rollouts(
                    run.folder.path / f"rollouts/step-{step:06d}.parquet", rollout_records(run, step, groups, batch)
                )
    times = run.clock.take()
    metrics = memory_metrics() | metrics  # of workers, where there are some, rather than of this process
    if batch is not None:
        metrics |= {
            "training/epoch": run.sampler.drawn // len(run.data),
            "perf/time_per_step": times["timing_s/step"],
            "perf/throughput": batch.total() / times["timing_s/step"],
        }
    metrics = {"training/global_step": step} | metrics | times
    run.note(step, metrics)
    fault_point("record", step)
    due = bool(config.checkpoint.every) and step % config.checkpoint.every == 0
    if (run.note_best(step, metrics) or due) and step and not last:
        with run.clock.phase("save_checkpoint"):
            run.save(step)
        fault_point("saved", step)
    return metrics


# --- the pieces ---


def score_all(run: RlRun, batch: Batch) -> dict[str, dict[str, torch.Tensor]]:
    """Computes the scores of a batch under all models that are asked for, by phase; models of different pools work at
    the same time.
    """
    temperature = run.config.rollout.temperature
    asked: list[tuple[str, Scorer | None, list[str], float]] = [
        ("old_log_prob", run.engine, policy_outputs(run.config), temperature),
        ("ref", run.reference, ["logp"], temperature),
        ("values", None if run.critic is None else run.critic.engine, ["value"], 1.0),
    ]
    pending = {}
    for phase, scorer, outputs, scaled in asked:
        if scorer is not None and outputs:
            with run.clock.phase(phase):
                pending[phase] = scorer.score_later(batch, outputs, temperature=scaled)
    scores = {}
    for phase, result in pending.items():
        with run.clock.phase(phase):
            scores[phase] = result()
    return scores


def _optimizer_step(run: RlRun, engine: TrainEngine, mini: Batch, loss: Loss) -> Callable[[], dict[str, float]]:
    """Begins an optimizer step; returns a function that waits for its end and returns the metrics."""
    result = engine.update_later(mini, loss)

    def finish() -> dict[str, float]:
        update = result()
        run.note_update(update, mini.objects("row"))
        part = "critic" if loss.name == "value" else "actor"
        return update.metrics | {f"{part}/skipped_nonfinite": float(not update.applied)}

    return finish
