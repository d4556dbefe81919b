"""Supervised fine-tuning: the loop, and putting its run together."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import torch
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hybridflow.algorithms.aggregation import token_weights
from hybridflow.batch import Batch
from hybridflow.checkpoint.run_folder import RunFolder
from hybridflow.checkpoint.store import read_checkpoint, save_checkpoint, saved_steps, step_folder
from hybridflow.checkpoint.weights import export_model, read_weights, write_weights
from hybridflow.config.sections import SftConfig
from hybridflow.data.sampler import Sampler
from hybridflow.data.sft import SftSet, load_sft
from hybridflow.engines.local import LocalEngine
from hybridflow.errors import UserError
from hybridflow.faults import fault_point
from hybridflow.models.load import load_model
from hybridflow.models.lora import add_lora
from hybridflow.protocols import Loss, TrainEngine, Update
from hybridflow.tracking.events import EventLog
from hybridflow.tracking.trackers import Trackers
from hybridflow.trainers.lifecycle import Clock, StopRequest, memory_metrics, pick_device

LOSS_WINDOW = 20  # steps whose mean decides about train.stop_below_loss
NONFINITE_LIMIT = 3  # updates in a row


@dataclass(slots=True)
class SftRun:
    """Everything that the loop works with; use it as a context. `step` is the last step that is done."""

    config: SftConfig
    folder: RunFolder
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    engine: TrainEngine
    data: SftSet
    sampler: Sampler
    trackers: Trackers
    events: EventLog
    stop: StopRequest
    clock: Clock = field(default_factory=Clock)
    step: int = 0
    saved_step: int = 0
    nonfinite_in_a_row: int = 0
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=LOSS_WINDOW))

    def __enter__(self) -> SftRun:
        self.stop.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop.__exit__(kind, error, trace)
        if error is not None:
            self.events.append("failed", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        self.trackers.close(failed=error is not None)
        self.folder.close()

    def done(self) -> bool:
        """Whether all steps are made, or the loss is as low as was asked for."""
        bound = self.config.train.stop_below_loss
        low = bound is not None and len(self.recent) == LOSS_WINDOW and sum(self.recent) / LOSS_WINDOW < bound
        return low or self.step >= self.config.train.steps

    def steps(self) -> Iterator[int]:
        """The steps still to do; each counts as done once the loop asks for the next."""
        while not self.done() and not self.stop.requested():
            yield self.step + 1
            self.step += 1


def train_sft(config: SftConfig) -> Path:
    """Runs a configuration to its end, or to where it is asked to stop; the same call then goes on.

    Returns:
        The run's folder, with ``model/`` in it once the run has ended.
    """
    with open_sft(config) as run:
        for step in run.steps():
            batch = next_batch(run)
            metrics = update(run, batch, step)
            record(run, step, batch, metrics)
        finish(run)
        return run.folder.path


def next_batch(run: SftRun) -> Batch:
    """The step's conversations, tokenised, with their loss weights: every answer token of the batch counts the same."""
    with run.clock.phase("data"):
        batch = run.data.batch([row for _, row in run.sampler.take(run.config.train.sequences_per_update)])
        batch["policy_weight_T"] = token_weights(batch, "token-mean", norm=1)
    return batch


def update(run: SftRun, batch: Batch, step: int) -> dict[str, float]:
    """One optimizer step.

    Raises:
        UserError: the loss was not finite three times in a row; the rows are named.
    """
    with run.clock.phase("update"):
        result = run.engine.update(batch, Loss("cross_entropy"))
    fault_point("update", step)
    _note(run, result, batch, step)
    if result.applied:
        run.recent.append(result.metrics["actor/loss"])
    return {name.replace("actor/", "train/"): value for name, value in result.metrics.items()}


def record(run: SftRun, step: int, batch: Batch, metrics: dict[str, float]) -> None:
    """Writes what happened, and saves a checkpoint where it is due."""
    times = run.clock.take() | memory_metrics()
    metrics |= {
        "training/global_step": step,
        "train/global_tokens": batch.total(),
        "perf/throughput": batch.total() / times["timing_s/step"],
    }
    run.trackers.log(step, metrics | times)
    every = run.config.checkpoint.every
    if every and step % every == 0 and step < run.config.train.steps:
        with run.clock.phase("save_checkpoint"):
            save(run, step)
        fault_point("saved", step)


def save(run: SftRun, step: int) -> None:
    """Writes the checkpoint of a step."""
    save_checkpoint(
        run.folder.checkpoints,
        step,
        write_weights=lambda folder: write_weights(run.model, run.tokenizer, folder),
        engine_state=run.engine.state(),
        run_state={
            "drawn": run.sampler.drawn,
            "data": run.data.fingerprint,
            "recent": list(run.recent),
            "nonfinite_in_a_row": run.nonfinite_in_a_row,
        },
        keep=run.config.checkpoint.keep,
    )
    run.saved_step = step


def finish(run: SftRun) -> None:
    """Saves what is not saved yet; a run that is done leaves its model as a plain Hugging Face folder."""
    if run.step > run.saved_step:
        save(run, run.step)
    if run.done():
        export_model(run.model, run.tokenizer, run.folder.path / "model")
        run.events.append("done", f"{run.step} steps")
    else:
        run.events.append("stopped", f"after step {run.step} of {run.config.train.steps}: {run.stop.reason}")


def open_sft(config: SftConfig) -> SftRun:
    """Opens the run that a configuration describes, going on where its folder's records end.

    Raises:
        UserError: something in the configuration, the data or the folder is wrong.
    """
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    stop = StopRequest(config.run.max_minutes)
    resolved = config.model_dump(mode="json")
    folder = RunFolder(Path(config.run.folder), resolved, resume=config.run.resume)
    try:
        seed = config.run.seed
        events = EventLog(folder.path / "events.jsonl")
        if folder.changed_keys:
            events.append("config", f"settings changed since the run began: {', '.join(folder.changed_keys)}")
        model, tokenizer = load_model(config.model.path, seed=seed)
        if config.model.lora is not None:
            model = add_lora(model, config.model.lora, seed=seed)
        data = load_sft(config.data, tokenizer, seed=seed)
        engine = LocalEngine(
            model,
            config.optim,
            total_steps=config.train.steps,
            tokens_per_microbatch=config.train.tokens_per_microbatch,
            device=pick_device(config.run.device),
        )
        trackers = Trackers(
            folder.path, config.track, resolved_config=resolved, total_steps=config.train.steps, title="sft"
        )
        run = SftRun(
            config=config,
            folder=folder,
            model=model,
            tokenizer=tokenizer,
            engine=engine,
            data=data,
            sampler=Sampler(len(data), seed=seed, shuffle=config.data.shuffle),
            trackers=trackers,
            events=events,
            stop=stop,
        )
        _restore(run)
        run.trackers.start(run.step)
        return run
    except BaseException:
        folder.close()
        raise


def _restore(run: SftRun) -> None:
    steps = saved_steps(run.folder.checkpoints)
    if steps:
        folder = step_folder(run.folder.checkpoints, steps[-1])
        engine_state, run_state = read_checkpoint(folder)
        if run_state["data"] != run.data.fingerprint:
            raise UserError(
                f"the data in {run.data.source} is not what the run in {run.folder.path} began with",
                why="going on would draw other rows than the records say",
                fix="restore the data, or choose another run.folder",
            )
        read_weights(run.model, folder)
        run.engine.load(engine_state)
        run.sampler.drawn = run_state["drawn"]
        run.recent.extend(run_state["recent"])
        run.nonfinite_in_a_row = run_state["nonfinite_in_a_row"]
        run.step = run.saved_step = steps[-1]
        run.events.append("resume", f"going on after step {run.step}")
    if run.done():
        raise UserError(
            f"the run in {run.folder.path} is already done: {run.step} of {run.config.train.steps} steps",
            fix="raise train.steps to train longer, or choose another run.folder",
        )
    run.trackers.metrics.truncate_after(run.step if steps else -1)


def _note(run: SftRun, update: Update, batch: Batch, step: int) -> None:
    run.nonfinite_in_a_row = 0 if update.applied else run.nonfinite_in_a_row + 1
    if update.applied:
        return
    rows = sorted({int(batch["trajectory_B"][i]) for i in update.bad_rows})
    run.events.append("nonfinite", f"step {step}: loss not finite, update not applied; data rows {rows}")
    if run.nonfinite_in_a_row == NONFINITE_LIMIT:
        raise UserError(
            f"the loss was not finite {NONFINITE_LIMIT} updates in a row; last in data rows {rows or 'unknown'}",
            why="no such update was applied",
            fix="lower optim.lr, look at these rows, and start from the last checkpoint",
        )
