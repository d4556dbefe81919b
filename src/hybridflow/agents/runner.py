"""The maker of trajectories in which a model acts: episodes in an event loop beside the thread that owns the engine."""

from __future__ import annotations

import asyncio
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from hybridflow.agents.episode import Episode, EpisodeOver, Language
from hybridflow.agents.play import Play
from hybridflow.agents.processes import HostPool
from hybridflow.agents.world import Calls, JournaledWorld, WorldMaker
from hybridflow.config.sections.agent import AgentSection
from hybridflow.protocols.calls import CallStore
from hybridflow.protocols.episodes import Start
from hybridflow.protocols.generation import Request, Result
from hybridflow.protocols.groups import Trajectory
from hybridflow.protocols.waiting import SECONDS_BETWEEN_LOOKS


@dataclass(slots=True)
class _Running:
    """A trajectory that is being made."""

    start: Start
    task: asyncio.Task[None] | None = None
    answer: asyncio.Future[Result] | None = None


class Agents:
    """Makes trajectories of several turns: see `Rollouts`.

    Args:
        section: the ``agent`` section.
        language: of the run's conversations.
        make_world: makes an environment for each trajectory.
        play_of: the loop of a row.
        order: see `Rollouts.order`.
        calls: keeps answers of tools; None keeps none.
        tell: takes the traceback of the first failure of each kind.
        pool: the processes that tools and environments run in; None: this one.
    """

    def __init__(
        self,
        section: AgentSection,
        language: Language,
        make_world: WorldMaker,
        play_of: Callable[[dict[str, Any]], Play],
        *,
        order: Literal["rounds", "free"],
        calls: CallStore | None = None,
        tell: Callable[[str], None] = lambda text: None,
        pool: HostPool | None = None,
    ) -> None:
        self.section, self.language, self.make_world, self.play_of = section, language, make_world, play_of
        self.order: Literal["rounds", "free"] = order
        self.calls, self.tell, self.pool = calls, tell, pool
        self._count = 0
        self._change = threading.Condition()
        self._running: dict[int, _Running] = {}
        self._busy: set[int] = set()  # trajectories whose code runs: they neither wait for the engine nor have ended
        self._asked: list[tuple[int, Request]] = []
        self._ended: list[tuple[int, Trajectory]] = []
        self._wake: Callable[[], None] = lambda: None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._told: set[str] = set()

    # --- for the engine's owner ---

    def begin(self, start: Start) -> int:
        """See `Rollouts.begin`."""
        number, self._count = self._count, self._count + 1
        loop = self._event_loop()
        with self._change:
            running = self._running[number] = _Running(start)
            self._busy.add(number)

        def go() -> None:
            running.task = loop.create_task(self._run(number, start))

        loop.call_soon_threadsafe(go)
        return number

    def asks(self, *, block: bool) -> list[tuple[int, Request]]:
        """See `Rollouts.asks`. The answers of tools that requests rest on are on disk when it returns them."""
        with self._change:
            if block:
                self._change.wait_for(self._settled, SECONDS_BETWEEN_LOOKS)
            if self.order == "rounds" and self._busy:
                return []
            asked, self._asked = sorted(self._asked, key=lambda ask: ask[0]), []
        if self.calls is not None:
            self.calls.sync()
        return asked

    def _settled(self) -> bool:
        if self.order == "rounds":
            return not self._busy
        return bool(self._asked or self._ended)

    def settled(self) -> bool:
        """See `Rollouts.settled`."""
        with self._change:
            return not self._busy

    def take(self, number: int, result: Result) -> None:
        """See `Rollouts.take`."""
        with self._change:
            if number not in self._running:  # its time was up meanwhile
                return
            answer = self._running[number].answer
            self._busy.add(number)
        assert answer is not None, "it asked for nothing"
        self._event_loop().call_soon_threadsafe(answer.set_result, result)

    def ended(self) -> list[tuple[int, Trajectory]]:
        """See `Rollouts.ended`."""
        with self._change:
            ended, self._ended = self._ended, []
        return ended

    def on_ready(self, wake: Callable[[], None]) -> None:
        """See `Rollouts.on_ready`. With "rounds" nothing has to wake the engine: it is idle when requests are due."""
        if self.order == "free":
            self._wake = wake

    def cancel(self) -> None:
        """See `Rollouts.cancel`. Code that does not end by itself is left to its thread."""
        with self._change:
            running, self._running = self._running, {}
            self._busy.clear()
            self._asked.clear()
            self._ended.clear()
        if self._loop is not None:
            for one in running.values():
                if one.task is not None:
                    self._loop.call_soon_threadsafe(one.task.cancel)

    def close(self) -> None:
        """See `Rollouts.close`."""
        self.cancel()
        if self._loop is not None:
            loop, self._loop = self._loop, None
            if self.pool is not None:
                loop.call_soon_threadsafe(self.pool.close)
            loop.call_soon_threadsafe(loop.stop)

    # --- in the event loop's thread ---

    async def _run(self, number: int, start: Start) -> None:
        calls = Calls(self.section, start.key, list(start.question.messages), self.calls, self._tell_once, start.world)
        world = JournaledWorld(self.make_world, calls)

        async def generate(request: Request) -> Result:
            return await self._generate(number, request, episode)

        episode = Episode(start, self.section, self.language, world, generate)
        limit = asyncio.timeout(self.section.timeout)
        try:
            loop = self.play_of(start.question.row)
            async with limit:
                await loop(episode, dict(start.question.row))
            episode.ending = "done"
        except EpisodeOver as end:
            episode.ending = end.reason
        except asyncio.CancelledError:
            await self._close(world)
            return
        except (Exception, SystemExit, KeyboardInterrupt) as error:  # either of the last two would end the event loop
            if isinstance(error, TimeoutError) and limit.expired():  # else a call took too long
                episode.ending = "timeout"
            else:
                episode.ending, episode.failure = "failed", f"{type(error).__name__}: {error}"
                self._tell_once(type(error).__name__, "a trajectory failed:\n" + _trace(error))
        for name, value in world.counts.items():
            episode.counts[name] += value
        await self._close(world)
        with self._change:
            if self._running.pop(number, None) is not None:
                self._ended.append((number, episode.trajectory()))
            self._busy.discard(number)
            self._change.notify_all()
        self._wake()

    async def _generate(self, number: int, request: Request, episode: Episode) -> Result:
        began = time.perf_counter()
        answer: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        with self._change:
            if number not in self._running:
                raise asyncio.CancelledError
            self._running[number].answer = answer
            self._asked.append((number, request))
            self._busy.discard(number)
            self._change.notify_all()
        self._wake()
        result = await answer
        episode.counts["seconds/generate_sequences"] += time.perf_counter() - began
        return result

    async def _close(self, world: JournaledWorld) -> None:
        try:
            await world.close()
        except Exception as error:  # the trajectory is made; what close could not free costs only its place
            self._tell_once(f"close/{type(error).__name__}", "an environment could not be closed:\n" + _trace(error))

    def _tell_once(self, kind: str, text: str) -> None:
        if kind not in self._told:
            self._told.add(kind)
            self.tell(text)

    def _event_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._serve, args=(self._loop,), daemon=True, name="agents").start()
        return self._loop

    @staticmethod
    def _serve(loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        loop.run_forever()


def _trace(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)).rstrip()
