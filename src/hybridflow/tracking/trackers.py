"""The records of a step: metrics.jsonl always; console, TensorBoard and wandb as configured."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, SupportsFloat

from hybridflow.config.sections.run import TrackSection
from hybridflow.tracking.console import ProgressConsole
from hybridflow.tracking.events import EventLog
from hybridflow.tracking.jsonl import MetricsFile
from hybridflow.tracking.tensorboard import TensorBoardTracker
from hybridflow.tracking.wandb import WandbTracker

_INSTALL = "pip install 'hybridflow[{}]'"
_GOES_ON = "training continues, and metrics.jsonl has everything"


def not_installed(config: TrackSection) -> Iterator[str]:
    """Yields a line for each tracker that is asked for and cannot be started, as a run prints it."""
    for name in ("tensorboard", "wandb"):
        if getattr(config, name) and importlib.util.find_spec(name) is None:
            yield f"warning: {name}: not available; install it with: {_INSTALL.format(name)}; {_GOES_ON}"


class Tracker(Protocol):
    """A record of every step besides metrics.jsonl."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes the metrics of a step."""
        ...

    def close(self, *, failed: bool) -> None:
        """Ends; `failed` says whether the run ended with an error."""
        ...


class Trackers:
    """Sends metrics and events to all trackers of a run; use it as a context, or `close` it.

    ``metrics.jsonl`` is the record: an error there is raised. The others are a convenience: one that raises, at the
    start or later, is switched off with one warning, and training continues.

    Args:
        folder: the run's folder; it exists.
        config: which trackers there are.
        resolved_config: the whole configuration, for trackers that show it.
        total_steps: where the run ends.
        title: first word of the progress line.
    """

    def __init__(
        self, folder: Path, config: TrackSection, *, resolved_config: Mapping[str, Any], total_steps: int, title: str
    ) -> None:
        self.folder, self.config, self.resolved_config = folder, config, resolved_config
        self.total_steps, self.title = total_steps, title
        self.metrics = MetricsFile(folder / "metrics.jsonl")
        self.events = EventLog(folder / "events.jsonl")
        self._active: dict[str, Tracker] = {}
        self._started = False
        self._began = time.monotonic()

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.close(failed=kind is not None)

    def start(self, done_steps: int = 0) -> None:
        """Starts the trackers that are configured. `log` starts them if needed; an earlier start shows on the terminal
        that the run is alive.

        Args:
            done_steps: steps that an earlier process has done and that stay; 0 in a new run.
        """
        if self._started:
            return
        self._started = True
        if self.config.console:
            self._start(
                "console",
                lambda: ProgressConsole(self.title, self.total_steps, done_steps=done_steps, began=self._began),
            )
        if self.config.tensorboard:
            first = done_steps + 1 if done_steps else 0
            self._start("tensorboard", lambda: TensorBoardTracker(self.folder, first_step=first))
        if self.config.wandb:
            project, resolved = self.config.project, self.resolved_config
            self._start("wandb", lambda: WandbTracker(self.folder, project=project, config=resolved))
            tracker = self._active.get("wandb")
            if isinstance(tracker, WandbTracker) and tracker.where:
                self.events.append("wandb", tracker.where)
                self.note(f"wandb: {tracker.where}")

    def log(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Records the metrics of a step, then passes them to the trackers.

        Raises:
            OSError: metrics.jsonl cannot be written.
        """
        self.metrics.append(step, metrics)
        self.start(max(0, step - 1))
        numbers = {name: float(value) for name, value in metrics.items()}
        for name, tracker in list(self._active.items()):
            try:
                tracker.log(step, numbers)
            except Exception as error:
                self._switch_off(name, error)

    def close(self, *, failed: bool = False) -> None:
        """Ends all trackers; more than once is fine. Never raises."""
        for name, tracker in list(self._active.items()):
            try:
                tracker.close(failed=failed)
            except Exception as error:
                self._switch_off(name, error)
        self._active = {}

    def advise(self, text: str) -> None:
        """Prints and records advice on something that may be wrong; the run continues."""
        self.tell("advice", f"advice: {text}", text)

    def tell(self, kind: str, said: str, text: str | None = None) -> None:
        """Prints an event and records it in events.jsonl.

        Args:
            kind: of the event.
            said: printed for the user.
            text: of the event, if it differs.
        """
        self.events.append(kind, said if text is None else text)
        if self.config.console:
            self.note(said)

    def note(self, text: str) -> None:
        """Prints a line above the progress bar, or on stderr if there is none."""
        with suppress(OSError, ValueError):  # no terminal is left to print it to; events.jsonl has it
            console = self._active.get("console")
            if isinstance(console, ProgressConsole):
                console.note(text)
            else:
                print(text, file=sys.stderr, flush=True)

    def _start(self, name: str, make: Callable[[], Tracker]) -> None:
        try:
            self._active[name] = make()
        except ImportError as error:
            self._warn(name, f"not available ({error}); install it with: {_INSTALL.format(name)}")
        except Exception as error:
            self._switch_off(name, error)

    def _switch_off(self, name: str, error: Exception) -> None:
        tracker = self._active.pop(name, None)
        if isinstance(tracker, ProgressConsole):
            with suppress(Exception):  # it has failed already; only the terminal must be released
                tracker.close(failed=True)
        reason = " ".join(str(error).split())[:500] or "no reason given"
        self._warn(name, f"switched off after {type(error).__name__}: {reason}")

    def _warn(self, name: str, text: str) -> None:
        self.events.append("warning", f"{name}: {text}")
        self.note(f"warning: {name}: {text}; {_GOES_ON}")
