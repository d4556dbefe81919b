"""The one loop that runs trajectories on a generation engine: for training and for evaluation."""

from __future__ import annotations

from collections.abc import Sequence

from hybridflow.protocols.episodes import Rollouts, Start
from hybridflow.protocols.generation import Result, RolloutEngine
from hybridflow.protocols.groups import Trajectory


class Driver:
    """Runs trajectories to their end: submits what they ask for, and hands over what the engine made of it.

    Args:
        engine: generates; nobody else submits requests to it meanwhile.
        rollouts: makes trajectories.
    """

    def __init__(self, engine: RolloutEngine, rollouts: Rollouts) -> None:
        self.engine, self.rollouts = engine, rollouts
        rollouts.on_ready(engine.interrupt)
        self._owner: dict[int, int] = {}  # the trajectory that asked for a request, by its handle
        self._running: set[int] = set()
        self._kept: list[Result] = []

    @property
    def running(self) -> bool:
        """Whether a trajectory has not ended yet."""
        return bool(self._running)

    def begin(self, start: Start) -> int:
        """Begins a trajectory; returns its number."""
        number = self.rollouts.begin(start)
        self._running.add(number)
        return number

    def keep(self, results: Sequence[Result]) -> None:
        """Takes results that another caller got from the engine while it waited for its own."""
        self._kept += results

    def advance(self) -> list[tuple[int, Trajectory]]:
        """Waits until something has happened, and returns the trajectories that ended since, by number."""
        if self.rollouts.order == "free" or not self._owner:
            for number, request in self.rollouts.asks(block=not self._owner):
                self._owner[self.engine.submit(request)] = number
        if self._owner:
            arriving, self._kept = self._kept or self.engine.wait(), []
            for result in arriving:
                self.rollouts.take(self._owner.pop(result.handle), result)
        ended = self.rollouts.ended()
        over = {number for number, _ in ended}
        late = [handle for handle, number in self._owner.items() if number in over]
        if late:  # the time of a trajectory was up while the engine worked for it
            self.engine.abort(late)
            self._owner = {handle: number for handle, number in self._owner.items() if number not in over}
        self._running -= over
        return ended

    def stop(self) -> None:
        """Drops all trajectories that have not ended."""
        self.engine.abort(list(self._owner))
        self.rollouts.cancel()
        self._owner.clear()
        self._running.clear()
        self._kept.clear()
