"""What every run has: its folder, engine and records, its step, and how it resumes after it was stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hybridflow.checkpoint.artifacts import export_engine
from hybridflow.checkpoint.run_folder import RunFolder
from hybridflow.checkpoint.store import read_checkpoint, saved_steps, step_folder
from hybridflow.config.kinds.registry import TrainingConfig, kind_for
from hybridflow.data.sampler import Sampler
from hybridflow.devices import memory_metrics
from hybridflow.errors import UserError
from hybridflow.faults import fault_point
from hybridflow.placing.places import Places, serve_torchrun
from hybridflow.protocols.training import TrainEngine, Update
from hybridflow.protocols.waiting import Stopped
from hybridflow.runs.finished import AlreadyDone, said_changes
from hybridflow.runs.lifecycle import Clock, Interrupted, StopRequest
from hybridflow.runs.nonfinite import NonfiniteUpdates
from hybridflow.runs.saver import Saver
from hybridflow.tracking.events import EventLog
from hybridflow.tracking.trackers import Trackers


def total_steps(steps: int | None, epochs: int | None, *, rows: int, rows_per_step: int) -> int:
    """Returns the steps of a run: as many as are given, or as many as find their rows in this many epochs.

    Raises:
        UserError: not even one step does.
    """
    if steps is not None:
        return steps
    assert epochs is not None
    if epochs * rows < rows_per_step:
        raise UserError(
            f"there is nothing to train: a step takes {rows_per_step} rows, and epochs x rows are {epochs} x {rows}",
            fix="raise train.epochs, or take fewer rows in a step",
        )
    return epochs * rows // rows_per_step


class TrainingRows(Protocol):
    """The rows that a run draws from."""

    @property
    def source(self) -> str:
        """A description of the source of the rows."""

    @property
    def fingerprint(self) -> str:
        """Changes with the rows: with other rows, a resumed run would draw prompts that do not match its records."""

    def sampler(self, *, seed: int) -> Sampler:
        """Draws from the rows."""


@dataclass(frozen=True)
class Opened:
    """What a run has before its model is built.

    Args:
        config: what is run.
        folder: the run's, locked.
        stop: whether the run should stop; it counts from here.
        places: where models are built: in this process, or in others that have begun.
    """

    config: TrainingConfig
    folder: RunFolder
    stop: StopRequest
    places: Places

    def trackers(self, total_steps: int) -> Trackers:
        """Opens the records of a run of this many steps."""
        return Trackers(
            self.folder.path,
            self.config.track,
            resolved_config=self.config.model_dump(mode="json"),
            total_steps=total_steps,
            title=kind_for(self.config).name,
        )

    def saver(
        self,
        tokenizer: PreTrainedTokenizerBase,
        engines: Mapping[str, TrainEngine],
        forget: Callable[[], None] = lambda: None,
    ) -> Saver:
        """Makes what saves these engines; see `Saver`."""
        return Saver(self.folder.checkpoints, self.config.checkpoint, tokenizer, engines, forget)


@contextmanager
def opening(config: TrainingConfig) -> Iterator[Opened]:
    """Opens the run's folder, its stop request and its processes for the block.

    On an error the processes end and the folder is unlocked. In a process that torchrun started as a worker this serves
    the controller, and does not come back.

    Raises:
        UserError: see `RunFolder` and `Places`.
    """
    serve_torchrun(config.placement)
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    stop = StopRequest(config.run.max_minutes)
    plain, kind = config.model_dump(mode="json"), kind_for(config).config
    folder = RunFolder(Path(config.run.folder), plain, resume=config.run.resume, kind=kind)
    try:
        places = Places(config, EventLog(folder.path / "events.jsonl").append)
        try:
            yield Opened(config, folder, stop, places)
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

    Args:
        opened: its folder, its stop request, its processes.
        tokenizer: of the model.
        engine: what is trained.
        data: the rows that it is trained on.
        trackers: where its records go.
        saver: what saves the engine, and others that are trained beside it.
        total_steps: where it ends.
    """

    opened: Opened
    tokenizer: PreTrainedTokenizerBase
    engine: TrainEngine
    data: TrainingRows
    trackers: Trackers
    saver: Saver
    total_steps: int
    clock: Clock = field(default_factory=Clock)
    step: int = 0

    def __post_init__(self) -> None:
        self.folder, self.stop, self.places = self.opened.folder, self.opened.stop, self.opened.places
        self.sampler = self.data.sampler(seed=self.opened.config.run.seed)
        self.nonfinite = NonfiniteUpdates(self.trackers.events)
        self._fingerprint = self.data.fingerprint
        self._drawn_before = 0  # the sampler's count when the current step began

    def __enter__(self) -> Self:
        self.stop.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        """Ends the run. A step that was stopped while it generated is undone, and what was done before is saved."""
        try:
            if isinstance(error, Stopped):
                self.sampler.drawn = self._drawn_before  # these prompts are drawn again
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
        """Completes, after an error, the checkpoint that is being written: its step was done before the error."""
        try:
            self.saver.settle()
        except Exception as error:  # the first error is the one that is raised
            self.trackers.events.append(
                "failed", f"the checkpoint that was being written was lost: {str(error).splitlines()[:1]}"
            )

    def done(self) -> bool:
        """Returns whether nothing is left to do."""
        return self.step >= self.total_steps

    def steps(self) -> Iterator[int]:
        """Yields the steps still to do; each counts as done once the loop asks for the next."""
        while not self.done() and not self.stop.requested():
            self._drawn_before = self.sampler.drawn
            self.places.begin_step(self.step + 1)
            yield self.step + 1
            self.step += 1
            self.saver.settle(wait=False)

    def record_training(self, step: int, tokens: int, metrics: Mapping[str, float]) -> None:
        """Writes the metrics of a step that trained on this many tokens, and saves a checkpoint if one is due."""
        times = self.clock.take()
        counts = {
            "training/global_step": step,
            "train/global_tokens": tokens,
            "perf/throughput": tokens / times["timing_s/step"],
        }
        self.trackers.log(step, memory_metrics() | dict(metrics) | counts | times)
        every = self.opened.config.checkpoint.every
        if every and step % every == 0 and step < self.total_steps:
            with self.clock.phase("save_checkpoint"):
                self.save(step)
            fault_point("saved", step)

    def note_update(self, update: Update, data_rows: list[int]) -> None:
        """Counts an update that was not applied because the loss was not finite; see `NonfiniteUpdates.note`.

        Raises:
            UserError: three in a row.
        """
        self.nonfinite.note(update, data_rows, self.step + 1)

    def extra_state(self) -> dict[str, Any]:
        """Returns plain values that a kind of run keeps in its checkpoints besides the common ones."""
        return {}

    def load_extra(self, state: Mapping[str, Any]) -> None:
        """Restores what `extra_state` returned."""

    def save(self, step: int) -> None:
        """Writes the checkpoint of a step; see `Saver.save`."""
        state = {
            "drawn": self.sampler.drawn,
            "data": self._fingerprint,
            "nonfinite_in_a_row": dict(self.nonfinite.in_a_row),
            **self.extra_state(),
        }
        self.saver.save(step, state)

    def keep(self, step: int) -> None:
        """Saves a step that is done, unless it is saved; returns when its checkpoint is complete."""
        self.saver.settle()
        if step > self.saver.saved_step:
            self.save(step)
            self.saver.settle()

    def restore(self) -> None:
        """Resumes from the newest checkpoint, if there is one, and drops records of later steps.

        Raises:
            UserError: it is damaged, of another model, or of other data.
            AlreadyDone: the run is at its end.
        """
        steps = saved_steps(self.folder.checkpoints)
        if steps:
            folder = step_folder(self.folder.checkpoints, steps[-1])
            run_state = read_checkpoint(folder)
            if run_state["data"] != self._fingerprint:
                raise UserError(
                    f"the data in {self.data.source} is not what the run in {self.folder.path} began with",
                    why="resuming would draw other rows than the records say",
                    fix="restore the data, or choose another run.folder",
                )
            for name, engine in self.saver.engines.items():
                engine.load(folder / name)
            self.sampler.drawn = run_state["drawn"]
            self.nonfinite.in_a_row = run_state["nonfinite_in_a_row"]
            self.load_extra(run_state)
            self.step = self.saver.saved_step = steps[-1]
        if self.done() and self.folder.exported_step() == self.step:
            length = self.opened.config.train
            raise AlreadyDone(self.folder.path, self.step, self.total_steps, self.folder.changed, length)
        self.folder.keep_config()
        self.trackers.start(self.step)
        if steps:
            self.trackers.tell("resume", f"resuming after step {self.step} of {self.total_steps}, from {folder}")
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
        self.keep(self.step)
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
