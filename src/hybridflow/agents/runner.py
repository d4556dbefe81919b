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
from hybridflow.errors import UserError
from hybridflow.protocols.calls import CallStore
from hybridflow.protocols.episodes import Start
from hybridflow.protocols.generation import Request, Result
from hybridflow.protocols.groups import Trajectory
from hybridflow.protocols.waiting import SECONDS_BETWEEN_LOOKS

CLOSING = 5.0  # seconds that environments may take to close when a run ends


@dataclass(slots=True)
class _Running:
    """A trajectory that is being made."""

    start: Start
    task: asyncio.Task[None] | None = None
    answer: asyncio.Future[Result] | None = None
    over: bool = False  # nothing of it samples any more


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
            asked, self._asked = sorted(self._asked, key=_number), []
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
        self._event_loop().call_soon_threadsafe(_give, answer, result)

    def ended(self) -> list[tuple[int, Trajectory]]:
        """See `Rollouts.ended`. With "rounds" what its caller sees, and when, depends on no time either."""
        with self._change:
            if self.order == "rounds" and self._busy:
                return []
            ended, self._ended = sorted(self._ended, key=_number), []
        if ended and self.calls is not None:
            self.calls.sync()  # a kill while they are scored loses no answer
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
                self._loop.call_soon_threadsafe(_drop, one)

    def close(self) -> None:
        """See `Rollouts.close`. Environments that are open get a moment to close."""
        self.cancel()
        if self._loop is not None:
            loop, self._loop = self._loop, None
            asyncio.run_coroutine_threadsafe(self._finish(), loop).result()
            loop.call_soon_threadsafe(loop.stop)

    async def _finish(self) -> None:
        left = asyncio.all_tasks() - {asyncio.current_task()}
        if left:
            await asyncio.wait(left, timeout=CLOSING)
        if self.pool is not None:
            self.pool.close()

    # --- in the event loop's thread ---

    async def _run(self, number: int, start: Start) -> None:
        calls = Calls(self.section, start.key, list(start.question.messages), self.calls, self._tell_once, start.world)
        world = JournaledWorld(self.make_world, calls)

        async def generate(request: Request) -> Result:
            return await self._generate(number, request, episode)

        episode = Episode(start, self.section, self.language, world, generate)
        await self._play(number, episode)
        self._forget_ask(number)
        await self._close(world)
        for name, value in world.counts.items():
            episode.counts[name] += value
        with self._change:
            if self._running.pop(number, None) is not None:
                self._ended.append((number, episode.trajectory()))
            self._busy.discard(number)
            self._change.notify_all()
        self._wake()

    async def _play(self, number: int, episode: Episode) -> None:
        """Plays an episode to its end, whatever ends it."""
        row = episode.start.question.row
        try:
            async with asyncio.timeout(self.section.timeout) as limit:
                await self.play_of(row)(episode, dict(row))
            episode.ending = episode.ending or "done"
        except EpisodeOver as end:
            episode.ending = end.reason
        except (Exception, asyncio.CancelledError, SystemExit, KeyboardInterrupt) as error:
            if isinstance(error, TimeoutError) and limit.expired():
                episode.ending = "timeout"
                return
            episode.ending = "failed"
            episode.failure = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            with self._change:
                cancelled = number not in self._running
            if not cancelled:
                self._tell_once(type(error).__name__, "a trajectory failed:\n" + _trace(error))

    def _forget_ask(self, number: int) -> None:
        """Ends what still waits for a turn of a trajectory that is over, such as a loop in a thread."""
        with self._change:
            running = self._running.get(number)
            if running is None:
                return
            running.over = True
            if running.answer is None:
                return
            self._asked = [ask for ask in self._asked if ask[0] != number]
            self._busy.add(number)
        running.answer.cancel()

    async def _generate(self, number: int, request: Request, episode: Episode) -> Result:
        began = time.perf_counter()
        answer: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        with self._change:
            running = self._running.get(number)
            if running is None or running.over:
                raise asyncio.CancelledError
            if running.answer is not None:
                raise UserError(
                    "the loop samples a turn while another one of its episode is sampled",
                    why="each turn of an episode continues the one before",
                    fix="await episode.sample() before the next one",
                )
            running.answer = answer
            self._asked.append((number, request))
            self._busy.discard(number)
            self._change.notify_all()
        self._wake()
        result = await answer
        running.answer = None
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
        try:
            loop.run_forever()
        finally:
            loop.close()


def _trace(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)).rstrip()


def _number(numbered: tuple[int, Any]) -> int:
    return numbered[0]


def _give(answer: asyncio.Future[Result], result: Result) -> None:
    if not answer.done():  # else nobody waits for it any more
        answer.set_result(result)


def _drop(running: _Running) -> None:
    """Ends what waits for a trajectory's next turn, and its task."""
    if running.task is not None:
        running.task.cancel()
    if running.answer is not None:
        running.answer.cancel()
