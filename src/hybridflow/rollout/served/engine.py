"""Engines that generate outside of this process: requests are sent at once, results arrive in order of completion.

`AsyncEngine` is a `RolloutEngine` without the protocol of one engine: a thread with an asyncio loop sends requests to
one or several replicas, and `wait` sleeps until a request has ended. The code for one engine implements
`replica.Hooks`.

A replica that died, that fails again and again, or that was silent for `answer_timeout` is started again, or evicted
where this run did not start it. Its requests are requeued and start over with the same seeds: no part of them was
handed out, so nothing is lost or counted twice. A restarted replica has the weights of its folder: `on_restart` is
called, in the thread that waits, and must publish the current ones; before that nothing is sampled from it.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any, TypeVar

import torch

from hybridflow.errors import UserError
from hybridflow.protocols.generation import Request, Result
from hybridflow.protocols.waiting import SECONDS_BETWEEN_LOOKS, never
from hybridflow.protocols.weights import Receipt, WeightStream
from hybridflow.rollout.job import Decode, Job, check_request
from hybridflow.rollout.served.replica import (
    Flight,
    Hooks,
    Piece,
    Replica,
    ReplicaFailed,
    ReplicaLost,
    all_of,
    cost_of,
    why_lost,
)
from hybridflow.rollout.startup import Supervision
from hybridflow.rollout.stopping import StopText
from hybridflow.weights.channel import Channel, WeightRoute
from hybridflow.weights.stream import WeightSyncError

T = TypeVar("T")

TRIES = 4  # times that a request is sent to a replica that fails, before the replica counts as broken
BACK_OFF = 0.2  # seconds before the second time; doubled each time
ABORT_AGAIN = 1.0  # seconds after which a request that did not end is aborted again: it may have overtaken its request


class AsyncEngine(Hooks):
    """A `RolloutEngine` whose replicas run in other processes; see the head of this file.

    Args:
        names: of the replicas, for messages.
        max_model_len: most tokens of a sequence, prompt and response together.
        managed: whether this process may start replicas again that died.
        supervision: when a replica counts as hung, and how often each is started again.
        route: how `update_weights` sends a stream of this process.
        decode: token ids to text; needed by requests that end by their text.

    Attributes:
        version: of the weights that are sampled from.
        on_restart: publishes the current weights; called from `wait` when a replica was started again.
        note: is called with (kind, text) for every event of a replica.
    """

    def __init__(
        self,
        names: list[str],
        *,
        max_model_len: int,
        managed: bool,
        supervision: Supervision | None = None,
        route: WeightRoute | None = None,
        decode: Decode | None = None,
    ) -> None:
        self.max_model_len, self.decode = max_model_len, decode
        self.should_return: Callable[[], bool] = never
        self.version = 0
        self.paused = False
        self.asleep = False
        self.on_restart: Callable[[], object] | None = None
        self.note: Callable[[str, str], None] = lambda kind, text: None
        self.managed, self.supervision, self._route = managed, supervision or Supervision(), route
        self._channel: Channel | None = None
        self._published = False  # whether the weights differ from those that replicas start with
        self._next_handle = 0
        self._oldest = 0  # results of older handles are kept back; above 0 while `on_restart` runs
        self._queue: list[Job] = []
        self._in_flight: set[int] = set()
        # What the thread of the loop passes to the one that waits:
        self._changed = threading.Condition()
        self._ready: list[Result] = []
        self._stale = False  # a replica needs the current weights
        self._error: BaseException | None = None
        self._interrupted = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="hybridflow-rollout", daemon=True)
        self._thread.start()
        self._live = [Replica(name) for name in names]
        self._began = len(names)
        self._running = asyncio.Event()  # cleared while paused, and while weights arrive
        self._loop.call_soon_threadsafe(self._running.set)

    def open(self) -> None:
        """Starts all replicas; a subclass calls it when it is set up. If one cannot start, ends those that did."""
        try:
            self._do(all_of([self._first_start(replica) for replica in self._live]))
        except BaseException:
            self.close()
            raise

    # --- requests ---

    same_memory = False

    @property
    def replicas(self) -> int:
        """How many there are now: `Request.replica` counts them."""
        return len(self._live)

    def submit(self, request: Request) -> int:
        """See `RolloutEngine.submit`. Requests leave for their replicas with `wait` or `poll`: then all are known."""
        check_request(request, decodes=self.decode is not None, max_model_len=self.max_model_len)
        wanted = request.replica
        if wanted is not None and not 0 <= wanted < self._began:
            raise UserError(f"a request for replica {wanted}, counted from 0, of {self._began}")
        self._check(request)
        job = Job(self._next_handle, request)
        self._next_handle += 1
        self._queue.append(job)
        self._in_flight.add(job.handle)
        return job.handle

    def wait(self) -> list[Result]:
        """See `RolloutEngine.wait`.

        Raises:
            UserError: no replica is left, or one fails for a reason that the user must mend.
        """
        self._send()
        try:
            return self._collect()
        finally:
            if not self._oldest:
                self._interrupted = False

    def _collect(self) -> list[Result]:
        while True:
            with self._changed:
                while not (self._stale or self._error or self._takes()):
                    if not any(handle >= self._oldest for handle in self._in_flight):
                        return []
                    assert not (self.paused or self.asleep), "waiting for a paused engine would never end"
                    if (self._interrupted and not self._oldest) or self.should_return():
                        return []
                    self._changed.wait(SECONDS_BETWEEN_LOOKS)
                if self._error is not None:
                    raise self._error
                stale, self._stale = self._stale, False
                if not stale:
                    taken = self._takes()
                    self._ready = [result for result in self._ready if result.handle < self._oldest]
                    self._in_flight -= {result.handle for result in taken}
                    return taken
            self._publish_again()

    def poll(self) -> list[Result]:
        """Returns what `wait` would give at once; sends what was submitted, and does not wait for it.

        Raises:
            UserError: see `wait`.
        """
        self._send()
        with self._changed:
            if not (self._stale or self._error or self._takes()):
                return []
        return self._collect()

    def interrupt(self) -> None:
        """See `RolloutEngine.interrupt`; it wakes the thread that waits."""
        with self._changed:
            self._interrupted = True
            self._changed.notify_all()

    def abort(self, handles: Iterable[int]) -> list[Result]:
        """See `RolloutEngine.abort`. What ended and was not handed out yet comes with the reason that it ended for."""
        wanted = set(handles) & self._in_flight
        never = [job for job in self._queue if job.handle in wanted]
        self._queue = [job for job in self._queue if job.handle not in wanted]
        if len(never) < len(wanted):
            self._do(self._abort_flights(wanted))
        with self._changed:
            done = [result for result in self._ready if result.handle in wanted]
            self._ready = [result for result in self._ready if result.handle not in wanted]
        self._in_flight -= wanted
        return done + [job.result("abort") for job in never]

    def pause(self) -> None:
        """See `RolloutEngine.pause`."""
        self.paused = True
        self._do(self._hold())

    def resume(self) -> None:
        """See `RolloutEngine.resume`."""
        self.paused = False
        self._do(self._release())

    # --- weights and memory ---

    def receivers(self) -> list[str]:
        """Returns the host of every process that takes weights, in the order of their indices; see `receive_weights`.

        It becomes shorter when a replica is evicted that this run cannot start again.
        """
        return [host for replica in self._live for host in self._hosts(replica)]

    def receive_weights(self, address: str, version: int) -> list[Receipt]:
        """Makes every process take the stream that is sent at `address`, and returns what each received.

        Requests in flight continue with the new weights: their results have several spans.

        Raises:
            WeightSyncError: a process could not take it, or its replica died; the latter is started again meanwhile.
        """
        assert not self.asleep, "weights for a sleeping engine: wake it first"
        return self._do(self._receive(address, version))

    def update_weights(self, stream: WeightStream, version: int) -> list[Receipt]:
        """See `RolloutEngine.update_weights`, for a stream of this process.

        Raises:
            WeightSyncError: a process could not take it.
        """
        if self._channel is None or self._channel.receivers != self.receivers():
            if self._channel is not None:
                self._channel.close()
            self._channel = Channel(self.receivers(), self._route)
        return self._channel.publish(stream, lambda address: self.receive_weights(address, version))

    def forget(self) -> None:
        """See `RolloutEngine.forget`: the prefix cache has memory of its own."""

    def sleep(self) -> None:
        """See `RolloutEngine.sleep`."""
        assert not self._in_flight, "sleep with requests in flight"
        self._do(self._each(self._sleep))
        self.asleep = True

    def wake(self) -> None:
        """See `RolloutEngine.wake`."""
        self._do(self._each(self._wake))
        self.asleep = False

    def close(self) -> None:
        """See `RolloutEngine.close`. What is in flight is lost."""
        if self._loop.is_closed():
            return
        if self._channel is not None:
            self._channel.close()
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # --- for a subclass ---

    def stop_text(self, job: Job) -> StopText | None:
        """Makes the search for the texts that end a job, begun at its current token; None where the job has no such
        texts.

        An engine may ignore it: tokens after such a text are cut off. It may use it to end a job sooner.
        """
        sampling = job.request.sampling
        if not sampling.stop and sampling.stop_regex is None:
            return None
        assert self.decode is not None
        return StopText(sampling.stop, sampling.stop_regex, self.decode, [*job.request.generated_ids, *job.tokens])

    # --- in the caller's thread ---

    def _send(self) -> None:
        if self._queue:
            queue, self._queue = self._queue, []
            self._loop.call_soon_threadsafe(self._deal, queue)

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs it in the loop's thread, to its end."""
        if self._error is not None:
            work.close()
            raise self._error
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _takes(self) -> list[Result]:
        return [result for result in self._ready if result.handle >= self._oldest]

    def _publish_again(self) -> None:
        """Publishes the current weights to a replica that was started again.

        The publisher may generate, to verify the weights: meanwhile `wait` returns no other results.
        """
        if self.on_restart is None:
            raise RuntimeError(
                "a replica does not have the current weights, and nothing can send them: on_restart is None"
            )
        oldest, self._oldest = self._oldest, self._next_handle
        try:
            self.on_restart()
        finally:
            self._oldest = oldest

    # --- in the loop's thread: requests ---

    def _deal(self, queue: list[Job]) -> None:
        """Gives jobs to replicas: those of one prompt to one, the longest first, each to the one with least to do."""
        together: dict[tuple[Any, ...], list[Job]] = {}
        for job in queue:
            r = job.request
            together.setdefault((r.prompt_ids, r.replica), []).append(job)
        loads = {replica: replica.load() for replica in self._live}
        for jobs in sorted(together.values(), key=cost_of, reverse=True):
            wanted = jobs[0].request.replica
            known = wanted is not None and wanted < len(self._live)
            replica = self._live[wanted] if known else min(self._live, key=loads.__getitem__)  # type: ignore[index]
            loads[replica] += cost_of(jobs)
            for job in jobs:
                self._fly(replica, Flight(job))

    def _fly(self, replica: Replica, flight: Flight) -> None:
        replica.flights.add(flight)
        flight.task = self._loop.create_task(self._run(replica, flight))
        if replica.watch is None or replica.watch.done():
            replica.watch = self._loop.create_task(self._watch(replica))

    async def _run(self, replica: Replica, flight: Flight) -> None:
        """Sends a job until it has ended, or its replica is lost."""
        job, failures = flight.job, 0
        try:
            while True:
                await replica.current.wait()
                await self._running.wait()
                if not replica.current.is_set():
                    continue
                version = self.version
                flight.out = True
                try:
                    piece = await self._generate(replica, job)
                except ReplicaFailed as error:
                    failures += 1
                    if failures == TRIES:
                        raise ReplicaLost(f"failed {TRIES} times: {error}") from error
                    if replica.said != str(error):
                        replica.said = str(error)
                        self.note("rollout", f"{replica.name} failed, and is asked again: {error}")
                    await asyncio.sleep(BACK_OFF * 2 ** (failures - 1))
                    continue
                finally:
                    flight.out = False
                replica.answered.set()
                reason = self._extend(job, piece, version)
                if reason != "abort" or flight.aborting:
                    return self._ended(replica, flight, reason)
        except ReplicaLost as error:
            self._lost(replica, str(error))
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            self._fail(error)

    def _ended(self, replica: Replica, flight: Flight, reason: str) -> None:
        replica.flights.discard(flight)
        with self._changed:
            self._ready.append(flight.job.result(reason, self._live.index(replica) if replica in self._live else 0))
            self._changed.notify_all()

    def _extend(self, job: Job, piece: Piece, version: int) -> str:
        """Adds the engine's reply to a job, up to a text that ends it; returns why it ends there."""
        assert len(piece.tokens) == len(piece.logps)
        first, count, reason = len(job.tokens), len(piece.tokens), str(piece.reason)
        stop_text = self.stop_text(job)
        if stop_text is not None:
            found = next((i for i, token in enumerate(piece.tokens) if stop_text.ends_with(token)), None)
            if found is not None:
                count, reason = found + 1, "stop"
        for v, start in piece.versions if piece.versions is not None else [(version, 0)]:
            if start < count and (not job.versions or job.versions[-1][0] != v):
                job.versions.append((v, first + start))
        job.tokens += piece.tokens[:count]
        job.logps += piece.logps[:count]
        if piece.supports is not None:
            job.supports = (job.supports or []) + [torch.tensor(i, dtype=torch.int64) for i in piece.supports[:count]]
        return reason

    async def _abort_flights(self, handles: set[int]) -> None:
        """Ends flights; their results are then ready."""
        mine = [(r, [f for f in r.flights if f.job.handle in handles]) for r in self._live]
        for _, flights in mine:
            for flight in flights:
                flight.aborting = True
        await all_of([self._abort_on(replica, flights) for replica, flights in mine if flights])

    async def _abort_on(self, replica: Replica, flights: list[Flight]) -> None:
        for flight in flights:
            if not flight.out and flight.task is not None:
                flight.task.cancel()
        until = self._loop.time() + self.supervision.answer_timeout
        out = {f.task: f for f in flights if f.out and f.task is not None}
        while out and self._loop.time() < until:
            try:
                async with asyncio.timeout(self.supervision.answer_timeout):
                    await self._abort(replica, [flight.job for flight in out.values()])
            except (ReplicaLost, ReplicaFailed, TimeoutError) as error:
                self._lost(replica, why_lost(error, self.supervision.answer_timeout))
                break
            done, _ = await asyncio.wait(out, timeout=ABORT_AGAIN)
            out = {task: flight for task, flight in out.items() if task not in done}
        for flight in flights:
            if flight in replica.flights:  # never sent, or its replica is lost: there is no reply to wait for
                if flight.task is not None:
                    flight.task.cancel()
                self._ended(replica, flight, "abort")

    # --- in the loop's thread: replicas ---

    async def _first_start(self, replica: Replica) -> None:
        try:
            await self._start(replica)
        except ReplicaLost as error:
            raise UserError(f"{replica.name} {error}", fix=self._mend()) from error
        replica.up.set()
        replica.current.set()

    def _mend(self) -> str:
        """Says how to mend replicas that do not answer."""
        if not self.managed:
            return "start it, as docs/rollout.md says, or name another in rollout.servers"
        return "look at the engine's own output, and start with fewer or smaller replicas if memory ran out"

    async def _watch(self, replica: Replica) -> None:
        """Pings a replica that has been silent for half of the timeout; the other half is for its reply."""
        half = self.supervision.answer_timeout / 2
        while replica.flights and replica.current.is_set():
            replica.answered.clear()
            try:
                async with asyncio.timeout(half):
                    await replica.answered.wait()
                continue
            except TimeoutError:
                if not self._running.is_set() or not any(flight.out for flight in replica.flights):
                    continue
            try:
                async with asyncio.timeout(half):
                    await self._ping(replica)
            except (ReplicaLost, ReplicaFailed, TimeoutError) as error:
                if self._running.is_set():
                    self._lost(replica, why_lost(error, self.supervision.answer_timeout))

    def _lost(self, replica: Replica, why: str) -> None:
        """Begins to recover a replica, once."""
        if replica in self._live and (replica.recovery is None or replica.recovery.done()):
            replica.up.clear()
            replica.current.clear()
            replica.recovery = self._loop.create_task(self._recover(replica, why))

    async def _recover(self, replica: Replica, why: str) -> None:
        try:
            lost = [flight for flight in replica.flights if not flight.aborting]
            for flight in lost:
                assert flight.task is not None
                flight.task.cancel()
            replica.flights -= set(lost)
            self.note("rollout", f"{replica.name} {why}; {len(lost)} requests are sent again, from their beginning")
            jobs = [Job(flight.job.handle, flight.job.request) for flight in lost]
            if not self.managed:
                self._leave_out(replica, why)
                return self._deal(jobs)
            for flight in [Flight(job) for job in jobs]:
                self._fly(replica, flight)  # waits for the replica
            while True:
                await self._end(replica)
                if replica.restarts == self.supervision.restarts:
                    raise UserError(
                        f"{replica.name} {why}",
                        why=f"it was started again {self.supervision.restarts} times already (rollout.restarts)",
                        fix=self._mend(),
                    )
                replica.restarts += 1
                began = self._loop.time()
                try:
                    await self._start(replica)
                    break
                except ReplicaLost as error:
                    why = str(error)
                    self.note("rollout", f"{replica.name} {why}")
            self.note("rollout", f"{replica.name} was started again in {self._loop.time() - began:.1f} s")
            replica.up.set()
            if not self._published:
                return self._now_current(replica)
            with self._changed:
                self._stale = True
                self._changed.notify_all()
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            self._fail(error)

    def _leave_out(self, replica: Replica, why: str) -> None:
        """Evicts a replica that this run cannot start again."""
        if len(self._live) == 1:
            raise UserError(
                f"{replica.name} {why}",
                why="this run did not start it, so it cannot start it again, and no other replica is left",
                fix="start it again, then resume the run",
            )
        self._live = [other for other in self._live if other is not replica]
        self.note("rollout", f"the run continues without {replica.name}: {len(self._live)} are left")

    def _now_current(self, replica: Replica) -> None:
        replica.current.set()
        if replica.flights and (replica.watch is None or replica.watch.done()):
            replica.watch = self._loop.create_task(self._watch(replica))

    def _fail(self, error: BaseException) -> None:
        """Ends the engine: every waiting and later call raises the error."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()
        for replica in self._live:
            replica.up.set()

    async def _each(self, act: Callable[[Replica], Awaitable[None]]) -> None:
        """Calls a function for every replica; one that is lost meanwhile is recovered first."""

        async def one(replica: Replica) -> None:
            while replica in self._live:
                await replica.up.wait()
                if self._error is not None:
                    raise self._error
                try:
                    async with asyncio.timeout(self.supervision.answer_timeout):
                        return await act(replica)
                except (ReplicaLost, ReplicaFailed, TimeoutError) as error:
                    self._lost(replica, why_lost(error, self.supervision.answer_timeout))
                    await asyncio.sleep(0)  # an evicted replica is gone from here on

        await all_of([one(replica) for replica in list(self._live)])

    async def _hold(self) -> None:
        if self._running.is_set():
            self._running.clear()
            await self._each(self._pause)

    async def _release(self) -> None:
        if not self._running.is_set():
            await self._each(self._resume)
            self._running.set()

    async def _receive(self, address: str, version: int) -> list[Receipt]:
        for replica in list(self._live):
            await replica.up.wait()
        if self._error is not None:
            raise self._error
        hold = not self.paused and any(replica.flights for replica in self._live)
        if hold:
            await self._hold()
        first, calls = 0, []
        for replica in self._live:
            calls.append(self._receive_on(replica, address, first, version))
            first += len(self._hosts(replica))
        try:
            receipts = await all_of(calls)
        except BaseException:  # their weights are unknown now: nothing is sampled until weights are published
            for replica in self._live:
                replica.current.clear()
            self._published = self._stale = True
            raise
        self.version, self._published = version, True
        for replica in self._live:
            self._now_current(replica)
        self._stale = False
        if hold:
            await self._release()
        return [receipt for some in receipts for receipt in some]

    async def _receive_on(self, replica: Replica, address: str, first: int, version: int) -> list[Receipt]:
        try:
            async with asyncio.timeout(self.supervision.answer_timeout):
                return await self._take_weights(replica, address, first, version)
        except (ReplicaLost, ReplicaFailed, TimeoutError) as error:
            why = why_lost(error, self.supervision.answer_timeout)
            self._lost(replica, why)
            raise WeightSyncError(f"{replica.name} {why}, while it took weights of version {version}") from error

    async def _close(self) -> None:
        own = asyncio.current_task()
        tasks = [task for task in asyncio.all_tasks() if task is not own]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(self._end(replica) for replica in self._live), return_exceptions=True)
