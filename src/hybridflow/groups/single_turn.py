"""Trajectories of one turn: a prompt and a response to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from hybridflow.protocols.episodes import Start
from hybridflow.protocols.generation import Request, Result
from hybridflow.protocols.groups import Trajectory, one_turn


class SingleTurn:
    """Makes trajectories of one turn: see `Rollouts`.

    Args:
        decode: token ids of a response to text.
    """

    order: Literal["rounds", "free"] = "free"

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self.decode = decode
        self._count = 0
        self._started: dict[int, Start] = {}
        self._asked: list[tuple[int, Request]] = []
        self._ended: list[tuple[int, Trajectory]] = []

    def begin(self, start: Start) -> int:
        """See `Rollouts.begin`."""
        number, self._count = self._count, self._count + 1
        self._started[number] = start
        self._asked.append((number, Request(start.question.token_ids, start.sampling, start.key)))
        return number

    def asks(self, *, block: bool) -> list[tuple[int, Request]]:
        """See `Rollouts.asks`."""
        asked, self._asked = self._asked, []
        return asked

    def settled(self) -> bool:
        """See `Rollouts.settled`."""
        return True

    def take(self, number: int, result: Result) -> None:
        """See `Rollouts.take`."""
        start = self._started.pop(number)
        sequence = one_turn(list(start.question.token_ids), result, start.sampling.max_tokens)
        text = self.decode(result.token_ids)
        self._ended.append((number, Trajectory(start.key.sample, [sequence], result.finish_reason, text, 0.0)))

    def ended(self) -> list[tuple[int, Trajectory]]:
        """See `Rollouts.ended`."""
        ended, self._ended = self._ended, []
        return ended

    def on_ready(self, wake: Callable[[], None]) -> None:
        """See `Rollouts.on_ready`: nothing happens here outside of calls."""

    def cancel(self) -> None:
        """See `Rollouts.cancel`."""
        self._started.clear()
        self._asked.clear()
        self._ended.clear()

    def close(self) -> None:
        """See `Rollouts.close`."""
