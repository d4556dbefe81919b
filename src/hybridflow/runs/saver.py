"""Saves a run. With ``checkpoint.asynchronous`` a checkpoint is completed while the run continues."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hybridflow.checkpoint.artifacts import save_engine
from hybridflow.checkpoint.store import Best, NewCheckpoint
from hybridflow.config.sections.run import CheckpointSection
from hybridflow.engines.background import Background
from hybridflow.protocols.training import TrainEngine


class Saver:
    """Writes the checkpoints of a run, one at a time.

    Args:
        checkpoints: the run's ``checkpoints/``.
        section: how many are kept, and whether the run waits for them.
        tokenizer: is saved beside every model.
        engines: what is trained, by its folder in a checkpoint.
        forget: called when a checkpoint is complete; it deletes what no resume can need any more.
    """

    def __init__(
        self,
        checkpoints: Path,
        section: CheckpointSection,
        tokenizer: PreTrainedTokenizerBase,
        engines: Mapping[str, TrainEngine],
        forget: Callable[[], None] = lambda: None,
    ) -> None:
        self.checkpoints, self.section, self.tokenizer = checkpoints, section, tokenizer
        self.engines, self.forget = engines, forget
        self.saved_step = 0
        self.best: Best | None = None  # by checkpoint.best; its checkpoint is kept
        self._new: NewCheckpoint | None = None  # whose engines' files are being written
        self._completing = False  # its files are complete: it gets its manifest and its place
        self._writing = Background()

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Writes the checkpoint of a step; with ``checkpoint.asynchronous``, copies the state and returns.

        Args:
            step: the step, which is done.
            state: plain values: everything but what engines keep.

        Raises:
            UserError: the disk is full or not writable, now or for the checkpoint before.
        """
        self.settle()
        new = NewCheckpoint(self.checkpoints, step, state, self.section.keep, self.best)
        with new.telling():
            new.begin()
            for name, engine in self.engines.items():
                (new.folder / name).mkdir(exist_ok=True)
                save_engine(engine, self.tokenizer, new.folder / name, background=self.section.asynchronous)
        self._new = new
        if not self.section.asynchronous:
            self.settle()

    def settle(self, *, wait: bool = True) -> None:
        """Completes the checkpoint that is being written, if there is one and all of its files are written.

        Args:
            wait: until they are.

        Raises:
            UserError: the disk is full or not writable.
        """
        new = self._new
        if new is None:
            return
        with new.telling():
            try:
                if not self._completing:
                    if not all(engine.saved(wait=wait) for engine in self.engines.values()):
                        return
                    self._writing.start(new.complete)
                    self._completing = True
                if not self._writing.done(wait=wait):
                    return
            except BaseException:
                self._new, self._completing = None, False
                raise
        self._new, self._completing = None, False
        self.saved_step = new.step
        self.forget()
