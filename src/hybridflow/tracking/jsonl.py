"""metrics.jsonl: the record of a run, one JSON object per step."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, SupportsFloat

from hybridflow.errors import UserError


class MetricsFile:
    """Appends one object per step: ``{"step": 3, "actor/pg_loss": 0.12, ...}``.

    A value that is not finite is written as ``null``, since JSON has no form for it; `read_metrics` returns NaN.

    Args:
        path: the file; it appears with the first line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Adds the line of a step; when this returns, the line survives the process."""
        line = json.dumps({"step": step, **{name: _plain(value) for name, value in metrics.items()}})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def truncate_after(self, step: int) -> None:
        """Drops the lines of later steps, and a last line that a kill cut short: a run resumes after `step`."""
        if not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8").splitlines()
        kept = [line for line, values in zip(lines, _parse(self.path, lines)) if values["step"] <= step]
        aside = self.path.with_name(f".{self.path.name}.partial")
        aside.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        os.replace(aside, self.path)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Reads the steps of a run in the order written; a last line that a kill cut short is left out.

    Raises:
        UserError: the file is damaged before its last line.
    """
    if not path.exists():
        return []
    steps = _parse(path, path.read_text(encoding="utf-8").splitlines())
    return [{name: _number(value) for name, value in values.items()} for values in steps]


def _number(value: Any) -> float:
    """Reads what `_plain` wrote; NaN for anything else that a line may hold."""
    if isinstance(value, int | float):
        with suppress(OverflowError):
            return value if math.isfinite(value) else math.nan
    return math.nan


def _plain(value: SupportsFloat) -> int | float | None:
    """Returns a number as JSON has it: an int or a finite float; None for NaN and the infinities."""
    try:
        number = float(value)
    except OverflowError:  # an int larger than any float
        return None
    if not math.isfinite(number):
        return None
    return value if type(value) is int else number


def _parse(path: Path, lines: list[str]) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            values = json.loads(line)
            values["step"] + 0  # every line has its step
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):
                break
            raise UserError(
                f"{path}, line {number} is not a JSON object with a step",
                why="only the last line can be cut short by a kill, so something else has changed the file",
                fix="restore the file, or delete that line",
            ) from error
        steps.append(values)
    return steps
