"""Answers of tools and environments that a run has had: kept on disk before the model sees them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class CallPlace:
    """Where in a run a call was made.

    Args:
        stream: of the trajectory's noise, and of its environment's seed.
        draw: of its prompt.
        sample: of its samples.
        turn: which turn it followed; 0 for `reset`.
        number: which call of that turn; -1 for the environment's own answer.
        asked: a digest of all that the environment was given up to this turn. Where the model did something else at the
            same place, no answer is there.
    """

    stream: str
    draw: int
    sample: int
    turn: int
    number: int
    asked: str = ""


class CallStore(Protocol):
    """Keeps answers (`checkpoint.calls.CallJournal` does). Any thread may call it."""

    def find(self, place: CallPlace) -> dict[str, Any] | None:
        """Returns the answer that was kept for a call of this step; None where there is none."""
        ...

    def add(self, place: CallPlace, answer: dict[str, Any]) -> None:
        """Takes an answer; it is on disk after the next `sync`."""
        ...

    def sync(self) -> None:
        """Writes all answers that were added to the disk."""
        ...
