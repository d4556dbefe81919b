"""The reinforcement-learning loop. Algorithms differ in what `estimate` and `update` are given, not in another loop."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hybridflow.algorithms.advantage import advantage_columns
from hybridflow.algorithms.aggregation import token_weights
from hybridflow.algorithms.kl import KL_ESTIMATORS, mean_per_answer
from hybridflow.algorithms.mismatch import token_ages
from hybridflow.batch import Batch
from hybridflow.config.algorithms import ADVANTAGES, POLICY_LOSSES
from hybridflow.config.locate import is_function_reference
from hybridflow.config.pieces import needs_of
from hybridflow.config.sections import RlConfig
from hybridflow.faults import fault_point
from hybridflow.protocols import Group, Loss, Scorer, TrainEngine, Trajectory
from hybridflow.tracking.rollouts import write_rollouts
from hybridflow.trainers.diversity import diversity
from hybridflow.trainers.group_engine import score_later, update_later
from hybridflow.trainers.learning import (
    component_names,
    corrected,
    failure_counts,
    nothing_passed,
    old_logp_is,
    part_sizes,
    passing,
    piece_values,
    policy_outputs,
    rejected,
    reweighted,
    trainable,
    whole_gap,
    with_current,
)
from hybridflow.trainers.lifecycle import memory_metrics
from hybridflow.trainers.rl_run import RlRun, open_run
from hybridflow.trainers.roles import sequences_per_update
from hybridflow.trainers.shaping import shaped_rewards, token_rewards
from hybridflow.trainers.signal_watch import TEACHES, teaches


def train(config: RlConfig) -> Path:
    """Runs a configuration to its end, or to where it is asked to stop; the same call then goes on.

    Returns:
        The run's folder, with ``model/`` in it once the run has ended.

    Raises:
        Interrupted: Ctrl-C or SIGTERM stopped the run; its checkpoint is saved.
    """
    with open_run(config) as run:
        if run.step == 0 and config.eval.before_training:
            record(run, 0, [], None, {})
        for step in run.steps():
            groups, drawn = next_groups(run, step)
            batch, estimated = estimate(run, groups)
            learned = update(run, batch)
            sent = publish_weights(run, step)
            record(run, step, groups, batch, learned | drawn | estimated | sent)
        run.finish()
    return run.folder.path


def next_groups(run: RlRun, step: int) -> tuple[list[Group], dict[str, float]]:
    """Draws prompts until the step has its groups, answered, scored and passed by the filter; and what was counted."""
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
        raise nothing_passed(f, dropped)
    counts = failure_counts(drawn, run.config.reward.on_failure)
    if f.active:
        counts |= {f"training/filtered_groups/{reason}": float(n) for reason, n in dropped.items()}
        counts |= {"training/num_gen_batches": float(rounds), "training/groups": float(len(groups))}
    return groups, counts


def estimate(run: RlRun, groups: list[Group]) -> tuple[Batch, dict[str, float]]:
    """The step's training batch: tokens, log-probabilities and values where they are needed, rewards, advantages.

    Besides it, what was measured on the way.
    """
    config, a = run.config, run.config.algorithm
    run.turn.to_training()
    groups, counts = trainable(groups, config)
    batch = batch_of(groups)
    if not len(batch):  # nothing is left to learn from: the step makes no update
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
        batch["reward_T"] = token_rewards(batch, shaped_rewards(batch, config, run.moments))
        if a.kl_reward_coef:
            batch["kl_T"] = divergence(batch, a.kl_reward_estimator)
            batch["reward_T"] -= run.kl.coef * batch["kl_T"]
        if needs_of(a.advantage, ADVANTAGES).needs_components and "components_BK" not in batch:
            batch["components_BK"] = torch.zeros(len(batch), 0)  # no answer of the step has any
        values = piece_values(a, component_names(groups))
        for name, column_T in advantage_columns(a.advantage, batch, values).items():
            batch[name] = column_T
    return reweighted(rejected(batch), config, run.step + 1), counts


def update(run: RlRun, batch: Batch) -> dict[str, float]:
    """Trains on the batch: one optimizer step for every `sequences_per_update` answers. Returns the mean metrics."""
    config, metrics = run.config, [kl_metrics(run, batch)]
    minis = batch.split(part_sizes(len(batch), sequences_per_update(config)))
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
                if len(prepared):  # else no answer has an advantage: nothing to learn from, no step
                    # The gap between engines is measured once: here where old log-probabilities were not computed,
                    # and in the first update, before it changes the weights.
                    loss = policy_loss(config, measure_gap=i == 0 and old_logp_is(config) != "recompute")
                    metrics.append(_optimizer_step(run, run.engine, prepared, loss)())
    with run.clock.phase("update_critic"):  # in a pool of its own it has learned meanwhile
        metrics += [learned() for learned in of_critic]
    fault_point("update", run.step + 1)
    values = {name: [m[name] for m in metrics if name in m] for m in metrics for name in m}
    return {name: sum(found) / len(found) for name, found in values.items()}


def publish_weights(run: RlRun, step: int) -> dict[str, float]:
    """Gives the new weights to the generation engine; what was measured of that."""
    with run.clock.phase("update_weights"):
        sent = run.publish(step)
    fault_point("publish", step)
    return sent


def record(run: RlRun, step: int, groups: list[Group], batch: Batch | None, metrics: dict[str, float]) -> None:
    """Evaluates, writes what happened, and saves a checkpoint, each where it is due."""
    config, last = run.config, step == run.total_steps
    if run.eval_prompts is not None and (step == 0 or last or (config.eval.every and step % config.eval.every == 0)):
        metrics = metrics | run.evaluate(step)
        fault_point("eval", step)
    if batch is not None:
        metrics = metrics | run.places.take_metrics() | batch_metrics(run, groups, batch)
        taught = teaches(groups, config.algorithm.advantage, config.reward.clip)
        if taught is not None:
            metrics[TEACHES] = float(taught)
        for watch in run.watches():
            advice = watch.observe(metrics)
            if advice is not None:
                run.trackers.advise(f"step {step}: {advice}")
        if step == 1:
            run.advise_where_none_ended("first step", [t.finish_reason for g in groups for t in g.trajectories])
        if config.track.rollouts_every and (step % config.track.rollouts_every == 0 or last):
            with run.clock.phase("dump_rollout_generations"):
                write_rollouts(
                    run.folder.path / f"rollouts/step-{step:06d}.parquet", _records(run, step, groups, batch)
                )
    times = run.clock.take()
    metrics = memory_metrics() | metrics  # of workers, where there are some, rather than of this process
    if batch is not None:
        metrics |= {
            "training/epoch": run.sampler.drawn // len(run.prompts),
            "perf/time_per_step": times["timing_s/step"],
            "perf/throughput": batch.total() / times["timing_s/step"],
        }
    run.note(step, {"training/global_step": step} | metrics | times)
    fault_point("record", step)
    due = bool(config.checkpoint.every) and step % config.checkpoint.every == 0
    if (run.note_best(step, metrics) or due) and step and not last:
        with run.clock.phase("save_checkpoint"):
            run.save(step)
        fault_point("saved", step)


# --- the pieces ---


def score_all(run: RlRun, batch: Batch) -> dict[str, dict[str, torch.Tensor]]:
    """What the models say of a batch, by phase: models of different pools work at the same time."""
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
                pending[phase] = score_later(scorer, batch, outputs, temperature=scaled)
    scores = {}
    for phase, result in pending.items():
        with run.clock.phase(phase):
            scores[phase] = result()
    return scores


def batch_of(groups: list[Group]) -> Batch:
    """Groups as one batch, a row per answer.

    Columns: ``input_ids_T``, ``loss_mask_T`` (the answer), ``rollout_logp_T``, ``reward_B``, ``group_B`` (the draw),
    ``sample_B``, ``trajectory_B``, ``span_version_S``, ``span_start_S``, ``span_end_S``, and the object column ``row``.
    Where the reward has components: ``components_BK``, in the order of `component_names`, NaN for one that an answer
    lacks. Where it has parts:
    ``step_reward_T``. Where greedy answers were
    asked for: ``baseline_B``. Where tokens were drawn from a part of the vocabulary: ``support_size_T`` (0 stands for
    all of it) and ``support_ids_K``.
    """
    answers = [(g, t) for g in groups for t in g.trajectories]
    ragged: dict[str, list[Any]] = {}
    if any(t.support is not None for _, t in answers):
        sizes = [t.support.sizes if t.support else [0] * len(t.token_ids) for _, t in answers]
        ragged["support_size_T"] = [[0] * len(g.prompt_ids) + size for (g, _), size in zip(answers, sizes)]
        ragged["support_ids_K"] = [t.support.ids if t.support else [] for _, t in answers]
    names = component_names(groups)
    dense: dict[str, list[Any]] = {}
    if names:
        dense["components_BK"] = [[t.components.get(name, math.nan) for name in names] for _, t in answers]
    if any(t.step_rewards for _, t in answers):
        ragged["step_reward_T"] = [[0.0] * len(g.prompt_ids) + _by_token(t) for g, t in answers]
    if any(g.baseline is not None for g in groups):
        dense["baseline_B"] = [g.baseline for g, _ in answers]
    batch = Batch.from_rows(
        {
            **ragged,
            **dense,
            "input_ids_T": [g.prompt_ids + t.token_ids for g, t in answers],
            "loss_mask_T": [[False] * len(g.prompt_ids) + [True] * len(t.token_ids) for g, t in answers],
            "rollout_logp_T": [[0.0] * len(g.prompt_ids) + t.logps for g, t in answers],
            "reward_B": [t.reward for _, t in answers],
            "group_B": [g.draw for g, _ in answers],
            "sample_B": [t.sample for _, t in answers],
            "trajectory_B": list(range(len(answers))),
            "span_version_S": [[s.version for s in t.spans] for _, t in answers],
            "span_start_S": [[s.start for s in t.spans] for _, t in answers],
            "span_end_S": [[s.end for s in t.spans] for _, t in answers],
            "row": [g.row for g, _ in answers],
        }
    )
    if not answers:  # empty lists have no type of their own, and nothing is computed of them
        batch["loss_mask_T"], batch["advantage_T"] = torch.zeros(0, dtype=torch.bool), torch.zeros(0)
    return batch


def _by_token(t: Trajectory) -> list[float]:
    """The rewards of an answer's parts, on its tokens; parts may end with the same one."""
    found = [0.0] * len(t.token_ids)
    for position, reward in t.step_rewards:
        found[position] += reward
    return found


def divergence(batch: Batch, estimator: str) -> torch.Tensor:
    """The policy's divergence from the reference at every token ``[T]``, 0 where there is no loss.

    Where old log-probabilities were not computed, the sampler's stand for the policy's: no forward pass for this alone.
    """
    logp_T = batch["old_logp_T"] if "old_logp_T" in batch else batch["rollout_logp_T"]
    return KL_ESTIMATORS[estimator](logp_T, batch["ref_logp_T"]) * batch["loss_mask_T"]


def kl_metrics(run: RlRun, batch: Batch) -> dict[str, float]:
    """Coefficients of the KL terms and the penalty, under verl's names; the controller takes the penalty in."""
    a, metrics = run.config.algorithm, {}
    if a.kl_loss_coef:
        metrics["actor/kl_coef"] = a.kl_loss_coef
    if "kl_T" in batch:
        kl = mean_per_answer(batch["kl_T"], batch["loss_mask_T"], batch.sequence_of(), len(batch))
        metrics |= {"actor/reward_kl_penalty": kl, "actor/reward_kl_penalty_coeff": run.kl.coef}
        run.kl.observe(kl, len(batch))
    return metrics


def with_weights(mini: Batch, config: RlConfig) -> Batch:
    """A mini-batch with a weight column per loss term."""
    a, mini = config.algorithm, mini.select(list(mini))
    weight_T = token_weights(mini, a.aggregation, norm=config.rollout.max_response_tokens, values=a.values)
    mini["policy_weight_T"] = weight_T
    for name, wanted in [("entropy", a.entropy_coef), ("kl", a.kl_loss_coef), ("value", config.critic is not None)]:
        if wanted:
            mini[f"{name}_weight_T"] = weight_T
    return mini


def with_loss(mini: Batch, config: RlConfig) -> Batch:
    """The answers from which the actor can learn: those with an advantage, or all where it has other loss terms."""
    a, shared = config.algorithm, config.critic is not None and config.critic.shared_trunk
    every = a.entropy_coef or a.kl_loss_coef or shared or not config.train.skip_zero_advantage
    every = every or is_function_reference(a.policy_loss) or needs_of(a.policy_loss, POLICY_LOSSES).every_answer
    return mini.select(list(mini)) if every else with_signal(mini)


def with_signal(mini: Batch) -> Batch:
    """The answers whose advantage is not zero everywhere. Weights were computed before, so the gradient is the same."""
    size_T = mini["advantage_T"].abs() * mini["loss_mask_T"]
    signal_B = size_T.new_zeros(len(mini)).index_add_(0, mini.sequence_of(), size_T)
    return mini.take(signal_B.nonzero()[:, 0])


def _optimizer_step(run: RlRun, engine: TrainEngine, mini: Batch, loss: Loss) -> Callable[[], dict[str, float]]:
    """Begins an optimizer step; what it returns waits for its end and gives the metrics."""
    result = update_later(engine, mini, loss)

    def finish() -> dict[str, float]:
        update = result()
        run.note_update(update, mini.objects("row"))
        part = "critic" if loss.name == "value" else "actor"
        return update.metrics | {f"{part}/skipped_nonfinite": float(not update.applied)}

    return finish


def policy_loss(config: RlConfig, *, measure_gap: bool = True) -> Loss:
    """The configured loss of the actor, as the engine takes it; see `losses.policy`."""
    a = config.algorithm
    params: dict[str, Any] = {
        "policy_loss": a.policy_loss,
        "values": a.values | {n: getattr(a, n) for n in needs_of(a.policy_loss, POLICY_LOSSES).values if hasattr(a, n)},
        "measure_gap": measure_gap,
        "entropy_coef": a.entropy_coef,
        "kl_loss_coef": a.kl_loss_coef,
        "kl_loss_estimator": a.kl_loss_estimator,
        "temperature": config.rollout.temperature,
    }
    if config.critic is not None and config.critic.shared_trunk:
        params |= {"value_coef": a.value_coef, "clip_value": a.clip_value}
    return Loss("policy", params)


def value_loss(config: RlConfig) -> Loss:
    """The configured loss of a critic with a model of its own."""
    return Loss("value", {"clip_value": config.algorithm.clip_value})


def batch_metrics(run: RlRun, groups: list[Group], batch: Batch) -> dict[str, float]:
    """Rewards and lengths of a step's answers, advantages of those that are trained on, under verl's names."""
    mask_T, answers = batch["loss_mask_T"], [t for g in groups for t in g.trajectories]
    scored = [t for t in answers if t.failure is None]
    response_B = torch.tensor([len(t.token_ids) for t in answers], dtype=torch.float32)
    equal = [len({t.reward for t in g.trajectories if t.failure is None}) <= 1 for g in groups]
    metrics = {"training/equal_reward_groups": sum(equal) / max(len(equal), 1)}
    rows = [g.row for g in groups for t in g.trajectories if t.failure is None]
    rewards = [t.reward for t in scored]
    truth = {row: run.prompts[row].ground_truth for row in set(rows)}
    answered = [t.token_ids for t in scored], [t.response for t in scored]
    metrics |= diversity(*answered, rows, rewards, [truth[row] for row in rows])
    measured = {
        "critic/score": torch.tensor([t.reward for t in scored]),
        "critic/rewards": torch.tensor([t.reward for t in scored]),
        "critic/advantages": batch["advantage_T"][mask_T],
        "response_length": response_B,
        "prompt_length": torch.tensor([len(g.prompt_ids) for g in groups for _ in g.trajectories]).float(),
    }
    for name in component_names(groups):
        measured[f"reward/{name}"] = torch.tensor([t.components[name] for t in scored if name in t.components])
    if "reward_T" in batch:  # with penalties, of the answers that are trained on
        measured["critic/rewards"] = torch.zeros(len(batch)).index_add_(0, batch.sequence_of(), batch["reward_T"])
    if "value_T" in batch:
        value_M, return_M = batch["value_T"][mask_T], batch["return_T"][mask_T]
        measured |= {"critic/values": value_M, "critic/returns": return_M}
        if len(value_M) > 1:
            metrics["critic/vf_explained_var"] = float(1 - (return_M - value_M).var() / (return_M.var() + 1e-5))
    for name, values in measured.items():
        if not len(values):
            continue
        metrics |= {
            f"{name}/mean": float(values.mean()),
            f"{name}/max": float(values.max()),
            f"{name}/min": float(values.min()),
        }
    metrics["response_length/clip_ratio"] = float((response_B >= run.config.rollout.max_response_tokens).float().mean())
    metrics["perf/total_num_tokens"] = batch.total()
    return metrics


def _records(run: RlRun, step: int, groups: list[Group], batch: Batch) -> list[dict[str, Any]]:
    names = zip(batch["group_B"].tolist(), batch["sample_B"].tolist())
    means = (
        float(a[m].mean()) if m.any() else 0.0 for a, m in zip(batch.rows("advantage_T"), batch.rows("loss_mask_T"))
    )
    advantage = dict(zip(names, means))  # answers that are not trained on have none
    records = []
    for g in groups:
        prompt = run.prompts[g.row]
        for t in g.trajectories:
            records.append(
                {
                    "step": step,
                    "draw": g.draw,
                    "sample": t.sample,
                    "data_source": prompt.data_source,
                    "prompt": prompt.text,
                    "response": t.response,
                    "reward": None if t.failure is not None else t.reward,
                    "advantage": advantage.get((g.draw, t.sample)),
                    "finish_reason": t.finish_reason,
                    "ground_truth": str(prompt.ground_truth),
                    "token_ids": t.token_ids,
                    "tokens": run.texts_of(t.token_ids),
                    "logps": t.logps,
                }
            )
    return records
