"""What every run shares: stopping in order, timing of phases, and memory."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType


class Interrupted(KeyboardInterrupt):
    """A signal stopped the run, and its checkpoint is saved: the caller stops too."""


class StopRequest:
    """Turns Ctrl-C, SIGTERM, a wall-clock limit and a program's own request into a question that the loop asks; use it
    as a context.

    A second Ctrl-C ends the process at once.

    Args:
        max_minutes: wall-clock limit from now; None for no limit.
    """

    def __init__(self, max_minutes: float | None = None) -> None:
        self.deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self.max_minutes = max_minutes
        self.signal: str | None = None
        self._asked: str | None = None
        self._before: dict[int, object] = {}

    def request(self, reason: str) -> None:
        """Asks the run to stop after the current step; it is saved, and the same program resumes it.

        Args:
            reason: why, for the run's records.
        """
        self._asked = reason

    @property
    def reason(self) -> str | None:
        """Why the run should stop, or None."""
        if self.signal is None and self.deadline is not None and time.monotonic() > self.deadline:
            return f"the limit of {self.max_minutes:g} minutes (run.max_minutes) was reached"
        return self.signal or self._asked

    def requested(self) -> bool:
        """Returns whether the run should stop."""
        return self.reason is not None

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[number] = signal.signal(number, self._on_signal)
            except ValueError:  # not in the main thread: the program that runs us there handles signals
                break
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        print("\nstopping: saving a checkpoint first (once more to end at once)", file=sys.stderr, flush=True)


class Clock:
    """Wall seconds of each phase of a step, as ``timing_s/<phase>``."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._began = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time inside to a phase."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

    def take(self) -> dict[str, float]:
        """Returns the metrics since the last call, with the whole step's time; starts the next step."""
        now = time.perf_counter()
        metrics = {f"timing_s/{name}": value for name, value in self.seconds.items()}
        metrics["timing_s/step"] = now - self._began
        self.seconds, self._began = {}, now
        return metrics
