"""How a long wait is told to come back early: engines and graders that can be interrupted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

SECONDS_BETWEEN_LOOKS = 0.2  # of a `wait` that something else wakes: it then asks `should_return`


class Interruptible(Protocol):
    """What `wait`s and may be asked to come back before anything has ended: a `RolloutEngine`, a `Grader`."""

    should_return: Callable[[], bool]


@contextmanager
def returning_when(asked: Callable[[], bool], *parts: Interruptible) -> Iterator[None]:
    """Within, `wait` of each part comes back early where `asked` says yes."""
    before = [part.should_return for part in parts]
    for part in parts:
        part.should_return = asked
    try:
        yield
    finally:
        for part, asked_before in zip(parts, before):
            part.should_return = asked_before


def never() -> bool:
    """What is asked by `wait` unless somebody sets `should_return`: it waits to the end."""
    return False


class Stopped(Exception):
    """Generation ended early because the run was asked to stop; nothing of the step has been trained on."""
