"""Supervised fine-tuning: the loop, and the assembly of its run.

Shapes: B sequences, T tokens of all sequences.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybridflow.algorithms.aggregation import token_weights
from hybridflow.batch import Batch
from hybridflow.config.kinds.sft import SftConfig
from hybridflow.data.sft import SftSet, load_sft
from hybridflow.errors import UserError
from hybridflow.faults import fault_point
from hybridflow.models.load import longest_trainable
from hybridflow.placing.build import load_role
from hybridflow.placing.role import sft_role
from hybridflow.protocols.training import Loss
from hybridflow.runs.session import Session, opening, total_steps

LOSS_WINDOW = 20  # steps whose mean decides about train.stop_below_loss


@dataclass(kw_only=True)
class SftRun(Session):
    """Everything that the loop works with; use it as a context."""

    config: SftConfig
    data: SftSet
    context: int | None  # of the model, in tokens
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=LOSS_WINDOW))

    def done(self) -> bool:
        """Returns whether all steps are done, or the loss is as low as the configuration asks."""
        bound = self.config.train.stop_below_loss
        low = bound is not None and len(self.recent) == LOSS_WINDOW and sum(self.recent) / LOSS_WINDOW < bound
        return low or self.step >= self.total_steps

    def extra_state(self) -> dict[str, Any]:
        """Returns the losses that decide about an early end."""
        return {"recent": list(self.recent)}

    def load_extra(self, state: Mapping[str, Any]) -> None:
        """Restores them."""
        self.recent.extend(state["recent"])


def train_sft(config: SftConfig) -> Path:
    """Runs a configuration to its end, or until it is asked to stop; the same call then resumes it.

    Returns:
        The run's folder, with ``model/`` in it once the run has ended.

    Raises:
        Interrupted: Ctrl-C or SIGTERM stopped the run; its checkpoint is saved.
    """
    with open_sft(config) as run:
        for step in run.steps():
            batch = next_batch(run)
            metrics = update(run, batch, step)
            record(run, step, batch, metrics)
        run.finish()
    return run.folder.path


def next_batch(run: SftRun) -> Batch:
    """Returns the step's conversations, tokenised, with their loss weights: every response token of the batch counts
    the same.
    """
    with run.clock.phase("data"):
        batch = run.data.batch([row for _, row in run.sampler.take(run.config.train.sequences_per_update)])
        require_rows_in_context(batch, run.data, run.context)
        batch["policy_weight_T"] = token_weights(batch, "token-mean", norm=1)
    return batch


def require_rows_in_context(batch: Batch, data: SftSet, context: int | None) -> None:
    """Raises a UserError if a row of the data has more tokens than the model can take."""
    for row, length in zip(batch["trajectory_B"].tolist(), batch.lengths().tolist()):
        if context is not None and length > context:
            source, number = data.data.place(row)
            raise UserError(
                f"row {number} of {source} has {length} tokens, the model's context is {context}",
                why="the model has no places for what comes after",
                fix=f"set data.max_tokens={context} and data.over_long=filter (or truncate), or take a model with a "
                "longer context",
            )


def update(run: SftRun, batch: Batch, step: int) -> dict[str, float]:
    """Takes one optimizer step.

    Raises:
        UserError: the loss was not finite three times in a row; the rows are named.
    """
    with run.clock.phase("update"):
        result = run.engine.update(batch, Loss("cross_entropy"))
    fault_point("update", step)
    run.note_update(result, batch["trajectory_B"].tolist())
    if result.applied:
        run.recent.append(result.metrics["actor/loss"])
    return {name.replace("actor/", "train/"): value for name, value in result.metrics.items()}


def record(run: SftRun, step: int, batch: Batch, metrics: dict[str, float]) -> None:
    """Writes the metrics, and saves a checkpoint if one is due."""
    run.record_training(step, batch.total(), metrics)


def open_sft(config: SftConfig) -> SftRun:
    """Opens the run that a configuration describes; resumes it where its folder holds one.

    Raises:
        UserError: something in the configuration, the data or the folder is wrong.
    """
    with opening(config) as opened:
        t = config.train
        model, tokenizer = load_role(sft_role(config, 1), outline=True)
        data = load_sft(config.data, tokenizer, seed=config.run.seed)
        steps = total_steps(t.steps, t.epochs, rows=len(data), rows_per_step=t.sequences_per_update)
        engine = opened.places.trained(sft_role(config, steps))
        run = SftRun(
            opened=opened,
            config=config,
            tokenizer=tokenizer,
            engine=engine,
            data=data,
            trackers=opened.trackers(steps),
            saver=opened.saver(tokenizer, {".": engine}),
            total_steps=steps,
            context=longest_trainable(model),
        )
        run.restore()
        return run
