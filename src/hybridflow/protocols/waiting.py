"""Long waits that can return early: engines and graders that can be interrupted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

SECONDS_BETWEEN_LOOKS = 0.2  # seconds between calls of `should_return` in a `wait` that something else wakes


class Interruptible(Protocol):
    """Something whose `wait` may be asked to return before anything has ended: a `RolloutEngine`, a `Grader`."""

    should_return: Callable[[], bool]


@contextmanager
def returning_when(asked: Callable[[], bool], *parts: Interruptible) -> Iterator[None]:
    """Lets `wait` of each part return early in the block when `asked` returns True."""
    before = [part.should_return for part in parts]
    for part in parts:
        part.should_return = asked
    try:
        yield
    finally:
        for part, asked_before in zip(parts, before):
            part.should_return = asked_before


def never() -> bool:
    """Returns False: the default of `should_return`, with which `wait` waits to the end."""
    return False


class Stopped(Exception):
    """Generation ended early because the run was asked to stop; nothing of the step has been trained on."""
