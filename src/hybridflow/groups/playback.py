"""Recorded trajectories, generated once more beside new ones.

The inline engine's log-probabilities repeat bit for bit where every sequence is computed in the same batch as before.
So a step that was interrupted is generated again as a whole. Trajectories that are journaled are played back: their
requests follow from their tokens, and no environment is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Literal

from hybridflow.noise import fork_stream
from hybridflow.protocols.episodes import Rollouts, Start
from hybridflow.protocols.generation import Request, Result
from hybridflow.protocols.groups import TokenSequence, Trajectory

Recorded = Mapping[tuple[str, int, int], list[TokenSequence]]  # by stream, draw and sample


class Playback:
    """Makes trajectories: those that are recorded from their tokens, others by another maker. See `Rollouts`.

    Args:
        live: makes those that are not recorded.
    """

    def __init__(self, live: Rollouts) -> None:
        self.live = live
        self.recorded: Recorded = {}
        self._count = 0
        self._outer: dict[int, int] = {}  # the number here of each trajectory of `live`
        self._inner: dict[int, int] = {}
        self._left: dict[int, Iterator[Request]] = {}  # what each recorded one has still to ask for
        self._starts: dict[int, Start] = {}
        self._asked: list[tuple[int, Request]] = []
        self._ended: list[tuple[int, Trajectory]] = []

    @property
    def order(self) -> Literal["rounds", "free"]:
        """See `Rollouts.order`."""
        return self.live.order

    def begin(self, start: Start) -> int:
        """See `Rollouts.begin`."""
        number, self._count = self._count, self._count + 1
        sequences = self.recorded.get((start.key.stream, start.key.draw, start.key.sample))
        if sequences is None:
            inner = self.live.begin(start)
            self._outer[inner], self._inner[number] = number, inner
            return number
        self._starts[number], self._left[number] = start, requests_of(start, sequences)
        self._next(number)
        return number

    def asks(self, *, block: bool) -> list[tuple[int, Request]]:
        """See `Rollouts.asks`."""
        live = self.live.asks(block=block and bool(self._outer) and not (self.order == "free" and self._asked))
        if self.order == "rounds":
            if not self.settled():
                return []
            live += self.live.asks(block=False)  # it may have settled since: the round has all of them
        asked = [*((self._outer[inner], request) for inner, request in live), *self._asked]
        self._asked = []
        return sorted(asked, key=lambda ask: ask[0])

    def settled(self) -> bool:
        """See `Rollouts.settled`."""
        return self.live.settled()

    def take(self, number: int, result: Result) -> None:
        """See `Rollouts.take`."""
        if number in self._inner:
            self.live.take(self._inner[number], result)
        else:
            self._next(number)

    def ended(self) -> list[tuple[int, Trajectory]]:
        """See `Rollouts.ended`. Of a recorded trajectory an empty one: the journal has it."""
        ended, self._ended = self._ended, []
        for inner, trajectory in self.live.ended():
            number = self._outer.pop(inner)
            del self._inner[number]
            ended.append((number, trajectory))
        return ended

    def on_ready(self, wake: Callable[[], None]) -> None:
        """See `Rollouts.on_ready`."""
        self.live.on_ready(wake)

    def cancel(self) -> None:
        """See `Rollouts.cancel`."""
        self.live.cancel()
        for held in (self._outer, self._inner, self._left, self._starts, self._asked, self._ended):
            held.clear()

    def close(self) -> None:
        """See `Rollouts.close`."""
        self.live.close()

    def _next(self, number: int) -> None:
        request = next(self._left[number], None)
        if request is not None:
            self._asked.append((number, request))
            return
        del self._left[number]
        self._ended.append((number, Trajectory(self._starts.pop(number).key.sample, [], "stop", "", 0.0)))


def requests_of(start: Start, sequences: list[TokenSequence]) -> Iterator[Request]:
    """Yields the requests that a trajectory was made with, turn by turn.

    Args:
        start: of the trajectory.
        sequences: its own.
    """
    replica: int | None = None  # a trajectory stays where its beginning is in a cache
    for i, sequence in enumerate(sequences):
        key, position = start.key, 0
        if i:
            before = sum(earlier.prompt_ids == sequence.prompt_ids for earlier in sequences[:i])
            key = replace(key, stream=fork_stream(key.stream, sequence.prompt_ids, before))
        for turn in sequence.turns:
            yield Request(
                (*sequence.prompt_ids, *sequence.token_ids[: turn.start]),
                replace(start.sampling, max_tokens=turn.limit),
                key,
                replica=replica,
                position=position,
            )
            replica = turn.replica
            position += turn.end - turn.start
