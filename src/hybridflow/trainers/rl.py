"""The reinforcement-learning loop. Algorithms differ in what `estimate` and `update` are given, not in another loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hybridflow.algorithms.advantage import ADVANTAGES
from hybridflow.algorithms.aggregation import token_weights
from hybridflow.batch import Batch
from hybridflow.config.sections import AlgorithmSection, RlConfig
from hybridflow.faults import fault_point
from hybridflow.protocols import Group, Loss, Sampling
from hybridflow.tracking.rollouts import write_rollouts
from hybridflow.trainers.evaluate import evaluate
from hybridflow.trainers.lifecycle import memory_metrics
from hybridflow.trainers.rl_run import RlRun, open_run, sequences_per_update, updates_per_step


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
            groups = next_groups(run, step)
            batch = estimate(run, groups)
            metrics = update(run, batch)
            publish_weights(run, step)
            record(run, step, groups, batch, metrics)
        run.finish()
    return run.folder.path


def next_groups(run: RlRun, step: int) -> list[Group]:
    """Draws the step's prompts and returns them answered and scored."""
    fault_point("gen", step)
    with run.clock.phase("gen"):
        groups = run.source.collect(step, run.sampler.take(run.config.train.prompts_per_step))
    run.clock.seconds["reward"] = run.source.reward_seconds
    run.clock.seconds["gen"] -= run.source.reward_seconds
    return groups


def estimate(run: RlRun, groups: list[Group]) -> Batch:
    """The step's training batch: tokens, old log-probabilities where they are needed, advantages."""
    config = run.config
    batch = batch_of(groups)
    if config.algorithm.old_logp == "rollout":
        batch["old_logp_T"] = batch["rollout_logp_T"]
    elif config.algorithm.old_logp == "recompute" or updates_per_step(config) > 1:
        with run.clock.phase("old_log_prob"):
            batch["old_logp_T"] = run.engine.score(batch, ["logp"], temperature=config.rollout.temperature)["logp"]
    with run.clock.phase("adv"):
        batch["advantage_T"] = advantages(batch, config.algorithm)
    return batch


def update(run: RlRun, batch: Batch) -> dict[str, float]:
    """Trains on the batch: one optimizer step for every `sequences_per_update` answers. Returns the mean metrics."""
    config, metrics = run.config, []
    size = sequences_per_update(config)
    for epoch in range(config.train.epochs_per_step):
        for i, mini in enumerate(batch.split([size] * (len(batch) // size))):
            prepared = with_weights(mini, config)
            if epoch or i:  # the gap between engines is measured while both hold the same weights
                del prepared.columns["rollout_logp_T"]
            if not len(prepared):
                continue  # every group of equal reward: nothing to learn from, no step
            with run.clock.phase("update_actor"):
                result = run.engine.update(prepared, policy_loss(config))
            run.note_update(result, prepared.objects("row"))
            metrics.append(result.metrics | {"actor/skipped_nonfinite": float(not result.applied)})
    fault_point("update", run.step + 1)
    values = {name: [m[name] for m in metrics if name in m] for m in metrics for name in m}
    return {name: sum(found) / len(found) for name, found in values.items()}


def publish_weights(run: RlRun, step: int) -> None:
    """Gives the new weights to the generation engine."""
    with run.clock.phase("update_weights"):
        run.publish(step)
    fault_point("publish", step)


def record(run: RlRun, step: int, groups: list[Group], batch: Batch | None, metrics: dict[str, float]) -> None:
    """Evaluates, writes what happened, and saves a checkpoint, each where it is due."""
    config, last = run.config, step == run.config.train.steps
    if run.eval_prompts is not None and (step == 0 or last or (config.eval.every and step % config.eval.every == 0)):
        with run.clock.phase("testing"):
            metrics = metrics | _evaluate(run, step)
        fault_point("eval", step)
    if batch is not None:
        metrics = metrics | batch_metrics(batch, config.rollout.max_response_tokens)
        if config.track.rollouts_every and (step % config.track.rollouts_every == 0 or last):
            with run.clock.phase("dump_rollout_generations"):
                write_rollouts(
                    run.folder.path / f"rollouts/step-{step:06d}.parquet", _records(run, step, groups, batch)
                )
    times = run.clock.take() | memory_metrics()
    if batch is not None:
        metrics |= {
            "training/epoch": run.sampler.drawn // len(run.prompts),
            "perf/time_per_step": times["timing_s/step"],
            "perf/throughput": batch.total() / times["timing_s/step"],
        }
    run.trackers.log(step, {"training/global_step": step} | metrics | times)
    fault_point("record", step)
    if step and config.checkpoint.every and step % config.checkpoint.every == 0 and not last:
        with run.clock.phase("save_checkpoint"):
            run.save(step)
        fault_point("saved", step)


# --- the pieces ---


def batch_of(groups: list[Group]) -> Batch:
    """Groups as one batch, a row per answer.

    Columns: ``input_ids_T``, ``loss_mask_T`` (the answer), ``rollout_logp_T``, ``reward_B``, ``group_B`` (the draw),
    ``trajectory_B``, ``span_version_S``, ``span_start_S``, ``span_end_S``, and the object column ``row``.
    """
    answers = [(g, t) for g in groups for t in g.trajectories]
    return Batch.from_rows(
        {
            "input_ids_T": [g.prompt_ids + t.token_ids for g, t in answers],
            "loss_mask_T": [[False] * len(g.prompt_ids) + [True] * len(t.token_ids) for g, t in answers],
            "rollout_logp_T": [[0.0] * len(g.prompt_ids) + t.logps for g, t in answers],
            "reward_B": [t.reward for _, t in answers],
            "group_B": [g.draw for g, _ in answers],
            "trajectory_B": list(range(len(answers))),
            "span_version_S": [[s.version for s in t.spans] for _, t in answers],
            "span_start_S": [[s.start for s in t.spans] for _, t in answers],
            "span_end_S": [[s.end for s in t.spans] for _, t in answers],
            "row": [g.row for g, _ in answers],
        }
    )


def advantages(batch: Batch, algorithm: AlgorithmSection) -> torch.Tensor:
    """The estimator's advantage of each answer, on each of its tokens ``[T]``."""
    estimator = ADVANTAGES[algorithm.advantage]
    advantage_B = estimator(batch["reward_B"], batch["group_B"], normalize_by_std=algorithm.normalize_by_std)
    return advantage_B[batch.sequence_of()] * batch["loss_mask_T"]


def with_weights(mini: Batch, config: RlConfig) -> Batch:
    """A mini-batch with a weight column per loss term, less the answers that have no loss whatever the weights are."""
    weight_T = token_weights(mini, config.algorithm.aggregation, norm=config.rollout.max_response_tokens)
    mini["policy_weight_T"] = weight_T
    if config.algorithm.entropy_coef:
        mini["entropy_weight_T"] = weight_T
        return mini
    return with_signal(mini) if config.train.skip_zero_advantage else mini


def with_signal(mini: Batch) -> Batch:
    """The answers whose advantage is not zero everywhere. Weights were computed before, so the gradient is the same."""
    signal_B = torch.zeros(len(mini)).index_add_(0, mini.sequence_of(), mini["advantage_T"].abs())
    return mini.take(signal_B.nonzero()[:, 0])


def policy_loss(config: RlConfig) -> Loss:
    """The configured loss, as the engine takes it."""
    a = config.algorithm
    values = {"clip_low": a.clip_low, "clip_high": a.clip_high, "clip_dual": a.clip_dual}
    params = {"policy_loss": a.policy_loss, "values": values, "entropy_coef": a.entropy_coef}
    return Loss("policy", params | {"temperature": config.rollout.temperature})


def batch_metrics(batch: Batch, max_response_tokens: int) -> dict[str, float]:
    """Rewards, advantages and lengths of a step, under verl's names."""
    mask_T = batch["loss_mask_T"]
    response_B = torch.zeros(len(batch)).index_add_(0, batch.sequence_of(), mask_T.float())
    prompt_B = batch.lengths() - response_B
    reward_B = batch["reward_B"].float()
    groups, index = torch.unique(batch["group_B"], return_inverse=True)
    low, high = (
        torch.zeros(len(groups)).scatter_reduce(0, index, reward_B, r, include_self=False) for r in ("amin", "amax")
    )
    metrics = {"training/equal_reward_groups": float((low == high).float().mean())}
    for name, values in [
        ("critic/score", reward_B),
        ("critic/rewards", reward_B),
        ("critic/advantages", batch["advantage_T"][mask_T]),
        ("response_length", response_B),
        ("prompt_length", prompt_B),
    ]:
        metrics |= {
            f"{name}/mean": float(values.mean()),
            f"{name}/max": float(values.max()),
            f"{name}/min": float(values.min()),
        }
    metrics["response_length/clip_ratio"] = float((response_B >= max_response_tokens).float().mean())
    metrics["perf/total_num_tokens"] = batch.total()
    return metrics


def _evaluate(run: RlRun, step: int) -> dict[str, float]:
    assert run.eval_prompts is not None
    metrics, records = evaluate(
        run.rollout,
        run.eval_prompts,
        run.reward,
        decode=run.decode,
        sampling=Sampling(run.config.rollout.max_response_tokens, 0.0, run.source.sampling.stop_token_ids),
        seed=run.config.run.seed,
        max_rows=run.config.eval.max_rows,
    )
    for r in records:
        r |= {"step": step, "tokens": run.texts_of(r["token_ids"])}
    write_rollouts(run.folder.path / f"evaluations/step-{step:06d}.parquet", records)
    return metrics


def _records(run: RlRun, step: int, groups: list[Group], batch: Batch) -> list[dict[str, Any]]:
    advantage = iter(
        float(a[m].mean()) if m.any() else 0.0 for a, m in zip(batch.rows("advantage_T"), batch.rows("loss_mask_T"))
    )
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
                    "reward": t.reward,
                    "advantage": next(advantage),
                    "finish_reason": t.finish_reason,
                    "ground_truth": str(prompt.ground_truth),
                    "token_ids": t.token_ids,
                    "tokens": run.texts_of(t.token_ids),
                    "logps": t.logps,
                }
            )
    return records
