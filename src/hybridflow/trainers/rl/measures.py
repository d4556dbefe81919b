"""The metrics of a step: its batch, its penalty, and its rollouts.

Shapes: B sequences, T tokens of all sequences and their prompts, M of them with loss, N trajectories.
"""

from __future__ import annotations

from typing import Any

import torch

from hybridflow.algorithms.kl import mean_per_answer
from hybridflow.batch import Batch
from hybridflow.config.sections.algorithm import AlgorithmSection
from hybridflow.protocols.groups import Group
from hybridflow.tracking.rollouts import sequence_columns
from hybridflow.trainers.rl.acting import acting_metrics
from hybridflow.trainers.rl.batches import trajectories
from hybridflow.trainers.rl.diversity import diversity
from hybridflow.trainers.rl.filters import component_names
from hybridflow.trainers.rl.run import RlRun

PENALTY = "actor/reward_kl_penalty"


def kl_metrics(batch: Batch, a: AlgorithmSection, reward_coef: float) -> dict[str, float]:
    """Returns the coefficients of the KL terms and the penalty, under verl's names.

    Args:
        batch: the step's.
        a: the ``algorithm`` section.
        reward_coef: the coefficient of the penalty in this step.
    """
    metrics = {}
    if a.kl_loss_coef:
        metrics["actor/kl_coef"] = a.kl_loss_coef
    if "kl_T" in batch:
        index_B, first_N = trajectories(batch)
        kl = mean_per_answer(batch["kl_T"], batch["loss_mask_T"], index_B[batch.sequence_of()], len(first_N))
        metrics |= {PENALTY: kl, "actor/reward_kl_penalty_coeff": reward_coef}
    return metrics


def batch_metrics(run: RlRun, groups: list[Group], batch: Batch) -> dict[str, float]:
    """Computes rewards and lengths of a step's responses, and advantages of those that are trained on, under verl's
    names.
    """
    mask_T, answers = batch["loss_mask_T"], [t for g in groups for t in g.trajectories]
    scored = [t for t in answers if t.failure is None]
    response_B = torch.tensor([t.length for t in answers], dtype=torch.float32)
    equal = [len({t.reward for t in g.trajectories if t.failure is None}) <= 1 for g in groups]
    metrics = {"training/equal_reward_groups": sum(equal) / max(len(equal), 1)}
    rows = [g.row for g in groups for t in g.trajectories if t.failure is None]
    rewards = [t.reward for t in scored]
    truth = {row: run.data[row].ground_truth for row in set(rows)}
    answered = [t.token_ids for t in scored], [t.response for t in scored]
    metrics |= acting_metrics(groups)
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
    if "reward_T" in batch:  # with penalties, of the responses that are trained on
        index_B, first_N = trajectories(batch)
        own_T = index_B[batch.sequence_of()]
        measured["critic/rewards"] = torch.zeros(len(first_N)).index_add_(0, own_T, batch["reward_T"])
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


def rollout_records(run: RlRun, step: int, groups: list[Group], batch: Batch) -> list[dict[str, Any]]:
    """Lists the sequences of a step as rows of ``rollouts/``, in the order of their groups."""
    names = zip(*(batch[f"{column}_B"].tolist() for column in ("group", "sample", "sequence")))
    means = (
        float(a[m].mean()) if m.any() else 0.0 for a, m in zip(batch.rows("advantage_T"), batch.rows("loss_mask_T"))
    )
    advantage = dict(zip(names, means))  # sequences that are not trained on have none
    records = []
    for g in groups:
        prompt = run.data[g.row]
        for t in g.trajectories:
            for columns in sequence_columns(t):
                shown = columns["prompt_ids"]
                records.append(
                    {
                        "step": step,
                        "draw": g.draw,
                        "sample": t.sample,
                        "data_source": prompt.data_source,
                        "prompt": "".join(run.texts_of(shown)) if shown != list(prompt.token_ids) else prompt.text,
                        "response": t.response,
                        "reward": None if t.failure is not None else t.reward,
                        "advantage": advantage.get((g.draw, t.sample, columns["sequence"])),
                        "finish_reason": t.finish_reason,
                        "ground_truth": "" if prompt.ground_truth is None else str(prompt.ground_truth),
                        "tokens": run.texts_of(columns["token_ids"]),
                    }
                    | columns
                )
    return records
