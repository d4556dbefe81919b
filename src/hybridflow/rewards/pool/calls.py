"""Calls of reward functions in flight, and the responses that they belong to."""

from __future__ import annotations

from dataclasses import dataclass

from hybridflow.protocols.rewards import Answers, Score


@dataclass(eq=False, slots=True)
class GroupCalls:
    """Responses to one prompt that are being scored; `scores` by index, None where there is none yet."""

    key: int
    function: str
    answers: Answers
    data: bytes
    scores: list[Score | None]
    left: int
    forgotten: bool = False


@dataclass(eq=False, slots=True)
class Call:
    """One call of a function.

    Args:
        group: what it scores.
        index: which response of it; see `RewardFunction.calls`.
        deaths: of processes during this call.
        begun: when it was last given to a process.
    """

    group: GroupCalls
    index: int | None
    deaths: int = 0
    begun: float = 0.0
