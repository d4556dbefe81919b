"""How a long wait is told to come back early: engines and graders that can be interrupted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

SECONDS_BETWEEN_LOOKS = 0.2  # of a `wait` that something else wakes: see `Interruptible`


@runtime_checkable
class Interruptible(Protocol):
    """What a `RolloutEngine` or `Grader` also offers whose `wait` may come back before anything has ended.

    Attributes:
        should_return: asked now and then while `wait` waits; once it says yes, `wait` returns what there is.
    """

    should_return: Callable[[], bool]


@contextmanager
def returning_when(asked: Callable[[], bool], *parts: object) -> Iterator[None]:
    """Within, `wait` of each part that is `Interruptible` comes back early where `asked` says yes."""
    able = [part for part in parts if isinstance(part, Interruptible)]
    before = [part.should_return for part in able]
    for part in able:
        part.should_return = asked
    try:
        yield
    finally:
        for part, asked_before in zip(able, before):
            part.should_return = asked_before


def never() -> bool:
    """What `Interruptible` parts ask unless they are told: they wait to the end."""
    return False


class Stopped(Exception):
    """Generation ended early because the run was asked to stop; nothing of the step has been trained on."""
