"""What every run has: its folder, engine and records, where it stands, and how it is saved and gone on with."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hybridflow.checkpoint.artifacts import export_engine, save_engine
from hybridflow.checkpoint.run_folder import RunFolder
from hybridflow.checkpoint.store import Best, NewCheckpoint, read_checkpoint, saved_steps, step_folder
from hybridflow.config.kinds.registry import TrainingConfig
from hybridflow.config.sections.run import CheckpointSection, LengthSection
from hybridflow.data.sampler import Sampler
from hybridflow.devices import memory_metrics
from hybridflow.engines.background import Background
from hybridflow.errors import UserError
from hybridflow.faults import fault_point
from hybridflow.placing.places import Places, serve_torchrun
from hybridflow.protocols.training import TrainEngine, Update
from hybridflow.protocols.waiting import Stopped
from hybridflow.runs.finished import AlreadyDone, said_changes
from hybridflow.runs.lifecycle import Clock, Interrupted, StopRequest
from hybridflow.tracking.events import EventLog
from hybridflow.tracking.trackers import Trackers

NONFINITE_LIMIT = 3  # updates in a row


def total_steps(steps: int | None, epochs: int | None, *, rows: int, rows_per_step: int) -> int:
    """Steps of a run: as many as are given, or as find their rows in so many epochs.

    Raises:
        UserError: not even one step does.
    """
    if steps is not None:
        return steps
    assert epochs is not None
    if epochs * rows < rows_per_step:
        raise UserError(
            f"there is nothing to train: {epochs} epochs of {rows} rows are fewer than the {rows_per_step} of one step",
            fix="raise train.epochs, or take fewer rows in a step",
        )
    return epochs * rows // rows_per_step


@contextmanager
def opening(config: TrainingConfig) -> Iterator[tuple[RunFolder, StopRequest, Places, dict[str, Any]]]:
    """The run's folder, locked, its stop request, its processes, and its plain configuration.

    On an error the processes end and the folder is let go of. In a process that torchrun started as a worker this
    serves the controller, and does not come back.

    Raises:
        UserError: see `RunFolder` and `Places`.
    """
    serve_torchrun(config.placement)
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    stop = StopRequest(config.run.max_minutes)
    resolved = config.model_dump(mode="json")
    folder = RunFolder(Path(config.run.folder), resolved, resume=config.run.resume)
    try:
        places = Places(config, EventLog(folder.path / "events.jsonl").append)
        try:
            yield folder, stop, places, resolved
        except BaseException:
            places.close()
            raise
    except BaseException:
        folder.close()
        raise


@dataclass(kw_only=True)
class Session:
    """The state of a run; use it as a context.

    `step` is the last step that is done. `steps()` gives those to do, and ends early when the run is asked to stop.
    """

    folder: RunFolder
    places: Places
    tokenizer: PreTrainedTokenizerBase
    engine: TrainEngine
    sampler: Sampler
    trackers: Trackers
    stop: StopRequest
    total_steps: int
    checkpoint: CheckpointSection
    length: LengthSection
    data_source: str
    data_fingerprint: str
    clock: Clock = field(default_factory=Clock)
    step: int = 0
    saved_step: int = 0
    best: Best | None = None  # by checkpoint.best; its checkpoint is kept
    nonfinite_in_a_row: dict[str, int] = field(default_factory=dict)  # of the actor, of the critic
    on_its_way: NewCheckpoint | None = None  # whose engines' files are being written
    completing: bool = False  # these are there, and it gets its manifest and its place
    writing: Background = field(default_factory=Background)
    drawn_before: int = 0  # the sampler's count when the step now under way began

    def __enter__(self) -> Self:
        self.stop.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        """Ends the run. A step that was stopped while it generated is undone, and what was done before is saved."""
        try:
            if isinstance(error, Stopped):
                self.sampler.drawn = self.drawn_before  # these prompts are drawn again
                self.finish()
            elif error is not None and not isinstance(error, Interrupted):
                text = f"{type(error).__name__}: {(str(error) or '-').splitlines()[0]}"
                self.trackers.events.append("failed", text)
                self._save_what_can_be()
        finally:
            self.stop.__exit__(kind, error, trace)
            self.trackers.close(failed=error is not None and not isinstance(error, Stopped))
            self.places.close()
            self.folder.close()
        return isinstance(error, Stopped)

    def _save_what_can_be(self) -> None:
        """After an error: the checkpoint that is on its way is of a step that was done before."""
        try:
            self.settle()
        except Exception as error:  # the first error is the one that is raised
            self.trackers.events.append("failed", f"the checkpoint on its way was lost: {str(error).splitlines()[:1]}")

    def done(self) -> bool:
        """Whether nothing is left to do."""
        return self.step >= self.total_steps

    def steps(self) -> Iterator[int]:
        """The steps still to do; each counts as done once the loop asks for the next."""
        while not self.done() and not self.stop.requested():
            self.drawn_before = self.sampler.drawn
            self.places.begin_step(self.step + 1)
            yield self.step + 1
            self.step += 1
            self.settle(wait=False)

    def record_training(self, step: int, tokens: int, metrics: Mapping[str, float]) -> None:
        """Writes what happened in a step that trained on so many tokens, and saves a checkpoint where it is due."""
        times = self.clock.take()
        counts = {
            "training/global_step": step,
            "train/global_tokens": tokens,
            "perf/throughput": tokens / times["timing_s/step"],
        }
        self.trackers.log(step, memory_metrics() | dict(metrics) | counts | times)
        if self.checkpoint.every and step % self.checkpoint.every == 0 and step < self.total_steps:
            with self.clock.phase("save_checkpoint"):
                self.save(step)
            fault_point("saved", step)

    def note_update(self, update: Update, data_rows: list[int]) -> None:
        """Counts updates that were not applied because the loss was not finite.

        Args:
            update: what the engine did.
            data_rows: for every sequence of the mini-batch, its row in the data.

        Raises:
            UserError: three in a row; the rows are named.
        """
        part = "critic" if "critic/loss" in update.metrics else "actor"
        if update.applied:
            self.nonfinite_in_a_row[part] = 0
            return
        self.nonfinite_in_a_row[part] = self.nonfinite_in_a_row.get(part, 0) + 1
        rows = sorted({data_rows[i] for i in update.bad_rows})
        self.trackers.events.append(
            "nonfinite", f"step {self.step + 1}: loss not finite, update not applied; data rows {rows or 'unknown'}"
        )
        if self.nonfinite_in_a_row[part] == NONFINITE_LIMIT:
            loss, norm = (update.metrics.get(f"{part}/{name}", math.nan) for name in ("loss", "grad_norm"))
            whose, key = ("the critic: ", "critic.optim.lr") if part == "critic" else ("", "optim.lr")
            raise UserError(
                f"the loss was not finite {NONFINITE_LIMIT} updates in a row; last in data rows {rows or 'unknown'}",
                why=f"{whose}loss {loss}, gradient norm {norm}; no such update was applied",
                fix=f"lower {key}, look at these rows, and start from the last checkpoint",
            )

    def extra_state(self) -> dict[str, Any]:
        """Plain values that a kind of run keeps in its checkpoints besides the common ones."""
        return {}

    def load_extra(self, state: Mapping[str, Any]) -> None:
        """Takes back what `extra_state` gave."""

    def engines(self) -> dict[str, TrainEngine]:
        """What is trained, by its folder in a checkpoint."""
        return {".": self.engine}

    def save(self, step: int) -> None:
        """Writes the checkpoint of a step; with ``checkpoint.asynchronous``, copies what it needs and goes on.

        Raises:
            UserError: the disk is full or not writable, now or for the checkpoint before.
        """
        self.settle()
        state = {
            "drawn": self.sampler.drawn,
            "data": self.data_fingerprint,
            "nonfinite_in_a_row": dict(self.nonfinite_in_a_row),
            **self.extra_state(),
        }
        new = NewCheckpoint(self.folder.checkpoints, step, state, self.checkpoint.keep, self.best)
        with new.telling():
            new.begin()
            for name, engine in self.engines().items():
                (new.folder / name).mkdir(exist_ok=True)
                save_engine(engine, self.tokenizer, new.folder / name, background=self.checkpoint.asynchronous)
        self.on_its_way = new
        if not self.checkpoint.asynchronous:
            self.settle()

    def settle(self, *, wait: bool = True) -> None:
        """Completes the checkpoint that is on its way, if there is one and all of its files are written.

        Args:
            wait: until they are.

        Raises:
            UserError: the disk is full or not writable.
        """
        new = self.on_its_way
        if new is None:
            return
        with new.telling():
            try:
                if not self.completing:
                    if not all(engine.saved(wait=wait) for engine in self.engines().values()):
                        return
                    self.writing.start(new.complete)
                    self.completing = True
                if not self.writing.done(wait=wait):
                    return
            except BaseException:
                self.on_its_way, self.completing = None, False
                raise
        self.on_its_way, self.completing = None, False
        self.saved_step = new.step
        self.forget(new.step)

    def forget(self, step: int) -> None:
        """Lets go of what no resume can need now that this step has a checkpoint."""

    def restore(self) -> None:
        """Goes on from the newest checkpoint, if there is one, and drops records of later steps.

        Raises:
            UserError: it is damaged, of another model, or of other data.
            AlreadyDone: the run is at its end.
        """
        steps = saved_steps(self.folder.checkpoints)
        if steps:
            folder = step_folder(self.folder.checkpoints, steps[-1])
            run_state = read_checkpoint(folder)
            if run_state["data"] != self.data_fingerprint:
                raise UserError(
                    f"the data in {self.data_source} is not what the run in {self.folder.path} began with",
                    why="going on would draw other rows than the records say",
                    fix="restore the data, or choose another run.folder",
                )
            for name, engine in self.engines().items():
                engine.load(folder / name)
            self.sampler.drawn = run_state["drawn"]
            self.nonfinite_in_a_row = run_state["nonfinite_in_a_row"]
            self.load_extra(run_state)
            self.step = self.saved_step = steps[-1]
        if self.done() and self.folder.exported_step() == self.step:
            raise AlreadyDone(self.folder.path, self.step, self.total_steps, self.folder.changed, self.length)
        self.folder.keep_config()
        self.trackers.start(self.step)
        if steps:
            self.trackers.tell("resume", f"going on after step {self.step} of {self.total_steps}, from {folder}")
        if self.folder.changed:
            self.trackers.tell("config", f"settings changed since: {said_changes(self.folder.changed)}")
        if self.step > self.total_steps:
            text = f"{self.step} steps are done, more than the {self.total_steps} asked for: the run ends here"
            self.trackers.tell("config", text)
        self.trackers.metrics.truncate_after(self.step if steps else -1)

    def finish(self) -> Path:
        """Saves what is not saved yet; a run that is done leaves ``model/``, a plain Hugging Face folder.

        Returns:
            The run's folder.

        Raises:
            Interrupted: a signal stopped the run; everything is saved.
        """
        self.settle()
        if self.step > self.saved_step:
            self.save(self.step)
            self.settle()
        fault_point("finish", self.step)
        if self.done():
            export_engine(self.engine, self.tokenizer, self.folder.path / "model")
            self.folder.note_export(self.step)
            self.trackers.events.append("done", f"{self.step} steps")
        else:
            self.trackers.events.append("stopped", f"after step {self.step} of {self.total_steps}: {self.stop.reason}")
            if self.stop.signal is not None:
                raise Interrupted(f"{self.stop.signal} after step {self.step}")
        return self.folder.path
