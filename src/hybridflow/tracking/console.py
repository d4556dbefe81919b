"""Live progress in the terminal: the step, the time left, and the few numbers that matter.

On a terminal, one bar that stays at the bottom; anywhere else (a log file, a pipe, a notebook) plain ASCII lines.
"""

from __future__ import annotations

import atexit
import math
import re
import sys
import time
from collections import deque
from collections.abc import Mapping

from rich.console import Console as RichConsole
from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

HELD_OUT = "held-out"
# Label, the metrics it may be found under (the first that is there), and how it is written.
NUMBERS = (
    ("reward", ("critic/score/mean",), "{:.3f}"),
    (HELD_OUT, (), "{:.3f}"),
    ("loss", ("train/loss", "actor/pg_loss"), "{:.4f}"),
    ("value loss", ("critic/loss",), "{:.4g}"),
    ("accuracy", ("train/accuracy",), "{:.3f}"),
    ("KL", ("actor/reward_kl_penalty", "actor/kl_loss"), "{:.4f}"),
    ("entropy", ("actor/entropy",), "{:.3f}"),
    ("gradient", ("actor/grad_norm", "train/grad_norm"), "{:.3g}"),
    ("length", ("response_length/mean",), "{:.0f}"),
    ("tokens/s", ("perf/throughput",), "{:,.0f}"),
)
# On responses of the current weights a policy loss is always 0, while its gradient is not. It is then not shown.
NOTHING = {"loss": ("0.0000", "-0.0000")}
LINES = 500  # where there is no terminal; a step that takes longer than a second always has one
SECONDS_BETWEEN_LINES = 1.0
STEPS_FOR_PACE = 20

_HELD_OUT = re.compile(r"val-core/(?P<source>.+)/[^/]+/mean@\d+")


class ProgressConsole:
    """Shows the progress of a run, supervised or reinforced.

    Args:
        title: first word of the line, such as "train".
        total_steps: where the run ends.
        done_steps: steps that an earlier process has done already.
        began: when the first step began (`time.monotonic`); now, if not given.
    """

    def __init__(self, title: str, total_steps: int, *, done_steps: int = 0, began: float | None = None) -> None:
        self.title, self.total_steps, self.step = title, total_steps, done_steps
        self._numbers: dict[str, str] = {}
        self._pace = deque([(time.monotonic() if began is None else began, done_steps)], maxlen=STEPS_FOR_PACE + 1)
        self._last_line, self._told_step = -math.inf, done_steps
        self._every = max(1, math.ceil(total_steps / LINES))
        self._live: Live | None = None
        if sys.stdout.isatty() and not RichConsole().is_dumb_terminal:
            self._live = Live(get_renderable=self._render, refresh_per_second=4)
            self._live.start()
            # A visible cursor looks the same, and is still there after `kill -9`.
            self._live.console.show_cursor(True)
            atexit.register(self.close)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows the numbers of a step that is done, and of the last evaluation, with its step.

        What a step does not measure is not shown: the gradient of an earlier step would read as an update of this one.
        """
        self.step = step
        now = time.monotonic()
        if step == 0:
            self._pace.clear()  # the evaluation before training does not count for the pace
        self._pace.append((now, step))
        evaluated = held_out(metrics) or {name: metrics[name] for name in ("val/accuracy",) if name in metrics}
        self._numbers = {label: text for label, text in self._numbers.items() if label == HELD_OUT}
        for label, names, form in NUMBERS:
            value = next((metrics[name] for name in names if name in metrics), None)
            text = "" if value is None else form.format(value)
            if text and text not in NOTHING.get(label, ()):
                self._numbers[label] = text
        if evaluated:
            mean = sum(evaluated.values()) / len(evaluated)
            self._numbers[HELD_OUT] = f"{mean:.3f} (at {step})"
        due = step % self._every == 0 or step == self.total_steps or now - self._last_line > SECONDS_BETWEEN_LINES
        if self._live is None and (evaluated or due):
            if self._every > 1 and self._last_line == -math.inf:
                self.note(f"a line for every {self._every} steps, or second; metrics.jsonl has every step")
            self._tell(now)

    def note(self, text: str) -> None:
        """Writes a line of text, above the bar if there is one."""
        if self._live is None:
            # Not through rich: it would end the whole process if the reader closes the pipe.
            print(text, flush=True)
        else:
            self._live.console.print(Text(text))

    def close(self, *, failed: bool = False) -> None:
        """Leaves the last state on the terminal and gives it back."""
        if self._live is not None:
            live, self._live = self._live, None
            atexit.unregister(self.close)
            live.stop()
        elif self.step != self._told_step:
            self._tell(time.monotonic())

    def _tell(self, now: float) -> None:
        self._last_line, self._told_step = now, self.step
        self.note(self._line())

    def _line(self) -> str:
        left = self._seconds_left()
        parts = [f"{self.title} {self.step}/{self.total_steps}"]
        parts += [f"{label} {self._numbers[label]}" for label, _, _ in NUMBERS if label in self._numbers]
        return "  ".join(parts + ([f"{duration(left)} left"] if left else []))

    def _render(self) -> Group:
        bar = Table.grid(padding=(0, 1))
        left = self._seconds_left()
        bar.add_row(
            Text(self.title, style="bold"),
            ProgressBar(total=self.total_steps, completed=self.step, width=30),
            f"{self.step}/{self.total_steps}",
            Text("" if left is None else f"{duration(left)} left", style="cyan"),
        )
        numbers = Text()
        for label, _, _ in NUMBERS:
            if label in self._numbers:
                numbers.append(f"{label} ", style="dim").append(f"{self._numbers[label]}  ")
        return Group(bar, numbers)

    def _seconds_left(self) -> float | None:
        """Estimates the remaining seconds from the pace of the last steps; None while there is none."""
        (began, first), (ended, last) = self._pace[0], self._pace[-1]
        if last <= first:
            return None
        return (ended - began) / (last - first) * (self.total_steps - last)


def held_out(metrics: Mapping[str, float]) -> dict[str, float]:
    """Returns the mean held-out reward of each data source in a step's metrics; empty if the step has no evaluation."""
    found = {match["source"]: metrics[name] for name in metrics if (match := _HELD_OUT.fullmatch(name))}
    return {source: value for source, value in found.items() if math.isfinite(value)}


def duration(seconds: float) -> str:
    """Formats seconds: ``7 s``, ``3:05 min``, ``2:10 h``.

    >>> duration(185)
    '3:05 min'
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d} h"
