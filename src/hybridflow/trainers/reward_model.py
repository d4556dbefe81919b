"""Trains a reward model on preferences (Bradley and Terry 1952; arXiv 2203.02155, equation 1): the loop, and the
assembly of its run.

A step scores its pairs first, under the weights that the update begins with. That gives accuracy and margin, and every
conversation the value of its partner: both of a pair need not be in one micro-batch, or on one rank, for the gradient
to be that of the whole batch (`algorithms.losses.bradley_terry`). It costs one more forward pass, a third of an update.

Shapes: B conversations, T tokens of all conversations, N pairs; 2: the preferred conversation of each, and the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hybridflow.algorithms.preference import bradley_terry
from hybridflow.batch import Batch
from hybridflow.config.kinds.reward_model import RewardModelConfig
from hybridflow.data.preference import PreferenceSet, load_preferences, use_template
from hybridflow.errors import UserError
from hybridflow.faults import fault_point
from hybridflow.models.classifier import padding_of
from hybridflow.models.load import context_of
from hybridflow.placing.build import load_role
from hybridflow.placing.role import reward_model_role
from hybridflow.protocols.training import Loss
from hybridflow.runs.session import Session, opening, total_steps


@dataclass(kw_only=True)
class RewardModelRun(Session):
    """Everything that the loop works with; use it as a context."""

    config: RewardModelConfig
    data: PreferenceSet
    held_out: PreferenceSet | None


def train_reward_model(config: RewardModelConfig) -> Path:
    """Runs a configuration to its end, or until it is asked to stop; the same call then resumes it.

    Returns:
        The run's folder. Once the run has ended, ``model/`` in it is a sequence classifier of one label.

    Raises:
        Interrupted: Ctrl-C or SIGTERM stopped the run; its checkpoint is saved.
    """
    with open_reward_model(config) as run:
        if run.step == 0 and run.held_out is not None:
            run.trackers.log(0, evaluate(run))
        for step in run.steps():
            batch = next_batch(run)
            metrics = update(run, batch, step)
            record(run, step, batch, metrics)
        run.finish()
    return run.folder.path


def next_batch(run: RewardModelRun) -> Batch:
    """Returns the step's pairs, tokenised, with the columns of their loss."""
    with run.clock.phase("data"):
        return run.data.batch([row for _, row in run.sampler.take(run.config.train.pairs_per_update)])


def update(run: RewardModelRun, batch: Batch, step: int) -> dict[str, float]:
    """Takes one optimizer step; returns its metrics, with how the model judged the pairs before the step.

    Raises:
        UserError: the loss was not finite three times in a row; the rows are named.
    """
    center = run.config.train.center_coef
    with run.clock.phase("score"):
        value_N2 = values_of(run, batch)
        batch["partner_value_T"] = torch.zeros(batch.total(), dtype=value_N2.dtype)
        batch["partner_value_T"][batch["loss_mask_T"]] = value_N2.flip(1).flatten()
    with run.clock.phase("update"):
        result = run.engine.update(batch, Loss("bradley_terry", {"center_coef": center}))
    fault_point("update", step)
    run.note_update(result, batch["trajectory_B"].tolist())
    own = {name.replace("actor/", "train/"): value for name, value in result.metrics.items()}
    return {f"train/{name}": value for name, value in pair_metrics(value_N2, batch, center).items()} | own


def evaluate(run: RewardModelRun) -> dict[str, float]:
    """Computes loss, accuracy and margin on the held-out pairs."""
    assert run.held_out is not None
    count, size = len(run.held_out), run.config.train.pairs_per_update
    rows = range(count if run.config.eval.max_rows is None else min(count, run.config.eval.max_rows))
    total: dict[str, float] = {}
    with run.clock.phase("testing"):
        for first in rows[::size]:
            if run.stop.requested():
                run.trackers.tell("evaluation", f"stopped in the evaluation of step {run.step + 1}: it is left out")
                return {}
            batch = run.held_out.batch(rows[first : first + size])
            found = pair_metrics(values_of(run, batch), batch, run.config.train.center_coef)
            for name, value in found.items():
                total[f"val/{name}"] = total.get(f"val/{name}", 0.0) + value * len(batch) / 2
    return {name: value / len(rows) for name, value in total.items()}


def record(run: RewardModelRun, step: int, batch: Batch, metrics: dict[str, float]) -> None:
    """Evaluates if an evaluation is due, writes the metrics, and saves a checkpoint if one is due."""
    every = run.config.eval.every
    if run.held_out is not None and (step == run.total_steps or (every and step % every == 0)):
        metrics = metrics | evaluate(run)
    run.record_training(step, batch.total(), metrics)


def values_of(run: RewardModelRun, batch: Batch) -> Tensor:
    """Computes ``[N, 2]`` rewards of the preferred conversation of each pair and of the other, without gradients."""
    return run.engine.score(batch, ["value"])["value"][batch["loss_mask_T"]].view(-1, 2)


def pair_metrics(value_N2: Tensor, batch: Batch, center_coef: float) -> dict[str, float]:
    """Computes means over pairs: "loss", "accuracy" (ties count half), "margin", "chosen_reward", "rejected_reward"."""
    chosen_N, rejected_N = value_N2.double().unbind(1)
    margin_N = batch["margin_T"][batch["loss_mask_T"]][::2].double()
    loss_N, _ = bradley_terry(chosen_N, rejected_N, margin_N, center_coef=center_coef)
    return {
        "loss": float(loss_N.mean()),
        "accuracy": float((0.5 * (chosen_N - rejected_N).sign() + 0.5).mean()),
        "margin": float((chosen_N - rejected_N).mean()),
        "chosen_reward": float(chosen_N.mean()),
        "rejected_reward": float(rejected_N.mean()),
    }


def open_reward_model(config: RewardModelConfig) -> RewardModelRun:
    """Opens the run that a configuration describes; resumes it where its folder holds one.

    Raises:
        UserError: something in the configuration, the data or the folder is wrong.
    """
    with opening(config) as opened:
        t = config.train
        tokenizer, data, held_out = load_pairs(config)
        steps = total_steps(t.steps, t.epochs, rows=len(data), rows_per_step=t.pairs_per_update)
        engine = opened.places.trained(reward_model_role(config, steps))
        run = RewardModelRun(
            opened=opened,
            config=config,
            tokenizer=tokenizer,
            engine=engine,
            data=data,
            trackers=opened.trackers(steps),
            saver=opened.saver(tokenizer, {".": engine}),
            total_steps=steps,
            held_out=held_out,
        )
        run.restore()
        return run


def load_pairs(config: RewardModelConfig) -> tuple[PreTrainedTokenizerBase, PreferenceSet, PreferenceSet | None]:
    """Loads the tokenizer with its template, the training pairs, and the held-out ones.

    Raises:
        UserError: one of them does not fit.
    """
    seed, m, d = config.run.seed, config.model, config.data
    model, tokenizer = load_role(reward_model_role(config, 1), outline=True)
    context = context_of(model)
    if context is not None and d.max_tokens > context:
        raise UserError(f"data.max_tokens is {d.max_tokens}, the context of {m.path} is {context}", fix="lower it")
    use_template(tokenizer, d.template, key="data.template")
    padding = padding_of(m.path, seed=seed)
    data = load_preferences(d.train, d, tokenizer, seed=seed, padding=padding)
    held_out = None if d.eval is None else load_preferences(d.eval, d, tokenizer, seed=seed, padding=padding)
    return tokenizer, data, held_out
