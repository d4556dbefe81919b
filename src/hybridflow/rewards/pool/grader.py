"""Rewards in processes of their own, during generation, with limits of time and memory.

A thread deals calls of the functions to processes and takes their scores. It sleeps until something has arrived, or a
call is out of time. It guarantees:

- A call that takes longer than ``reward.pool.timeout`` ends with its process, and has no score. Calls behind it move to
  other processes long before: a process that runs one call for over a second, and ten times as long as usual, gets no
  further calls, and a spare process takes its place meanwhile (there are up to `SPARES`).
- A process that dies loses nothing. Its current call is made again in another one; if that dies too, the call has no
  score. Of several ``async def`` calls in one process it is not known which one ended it, or blocks its loop: each is
  made again alone.
- No score is handed out twice, and the processes end with this one, however it ends.

Functions that are ``async def`` share one process, with up to ``reward.pool.concurrency`` calls in flight.
"""

from __future__ import annotations

import itertools
import os
import pickle
import selectors
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from hybridflow.config.imports import user_folders
from hybridflow.errors import UserError
from hybridflow.protocols.rewards import Answers, Score
from hybridflow.protocols.waiting import SECONDS_BETWEEN_LOOKS, never
from hybridflow.rewards.graders.function import CUT, FunctionSpec, failures
from hybridflow.rewards.pool.calls import Call, GroupCalls
from hybridflow.rewards.pool.process import GRACE, START, PoolProcess, start_process
from hybridflow.rewards.pool.worker import score_of, too_long

if TYPE_CHECKING:
    from hybridflow.config.sections.rewards import RewardPoolSection

SPARES = 4  # further processes, while others are busy with one long call
PASSED_OVER = 1.0  # seconds with one call, and
TIMES_USUAL = 10  # times the usual time of a call, after which a process is passed over
AHEAD = 0.02  # seconds of work that a process gets at once, so that it need not wait for more
MOST_AHEAD = 128  # calls
LATE = 1.0  # seconds that a process has to report that an asynchronous call ran out of time
STARTS = 2  # processes in a row that may die before they are ready


class ProcessGrader:
    """A `protocols.rewards.Grader` with processes; see the head of this file. Processes start with the first `submit`.

    Args:
        functions: by the names that `submit` is given.
        pool: ``reward.pool``.
    """

    def __init__(self, functions: Mapping[str, FunctionSpec], pool: RewardPoolSection) -> None:
        self._functions, self._pool = dict(functions), pool
        self._names = ", ".join(spec.reference for spec in functions.values())
        self._folder, self._path = os.getcwd(), [p for p in sys.path if isinstance(p, str)]
        # What follows is shared with the thread, under the lock.
        self._lock = threading.Condition()
        self.should_return: Callable[[], bool] = never
        self._open: dict[int, GroupCalls] = {}
        self._done: list[tuple[int, list[Score]]] = []
        self._error: BaseException | None = None
        self._check_wanted = self._checked = self._closing = False
        self._kinds: dict[str, tuple[bool, bool]] = {}  # of functions: for a whole group? asynchronous?
        self._new: deque[GroupCalls] = deque()  # before kinds are known
        self._queue: deque[Call] = deque()
        self._queue_async: deque[Call] = deque()
        self._alone: deque[Call] = deque()  # asynchronous calls that must be alone in their process
        self._processes: list[PoolProcess] = []
        self._died_starting = 0
        self._tasks = 0
        self._usual = 0.0  # seconds of a call
        self._selector = selectors.DefaultSelector()
        self._wake_end, self._woken = socket.socketpair()
        self._woken.setblocking(False)
        self._wake_end.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="hybridflow-rewards", daemon=True)
        self._thread.start()

    # --- for the one who owns it ---

    def submit(self, key: int, answers: Answers, function: str | None = None) -> None:
        """See `protocols.rewards.Grader.submit`.

        Args:
            key: comes back with the scores.
            answers: to one prompt.
            function: which one of several scores them.

        Raises:
            UserError: the row holds what cannot be sent to a process.
        """
        name = next(iter(self._functions)) if function is None else function
        assert name in self._functions and (function is not None or len(self._functions) == 1), name
        size = len(answers.responses)
        group = GroupCalls(key, name, answers, _pickled(answers), [None] * size, size)
        with self._lock:
            assert key not in self._open, f"{key} is being scored"
            self._open[key] = group
            if size == 0:
                self._finish(group)
            else:
                self._new.append(group)
        self._wake()

    def ready(self) -> list[tuple[int, list[Score]]]:
        """See `protocols.rewards.Grader.ready`.

        Raises:
            UserError: a process cannot load the functions.
        """
        with self._lock:
            return self._take()

    def wait(self) -> list[tuple[int, list[Score]]]:
        """See `protocols.rewards.Grader.wait`.

        Raises:
            UserError: a process cannot load the functions.
        """
        with self._lock:
            while not (self._done or not self._open or self._error or self.should_return()):
                self._lock.wait(SECONDS_BETWEEN_LOOKS)
            return self._take()

    def cancel(self) -> None:
        """See `protocols.rewards.Grader.cancel`. Calls that have begun may continue; their results are dropped."""
        with self._lock:
            for group in self._open.values():
                group.forgotten = True
            for waiting in (self._open, self._done, self._new, self._queue, self._queue_async, self._alone):
                waiting.clear()
            for process in self._processes:
                process.forget = True
        self._wake()

    def check(self) -> None:
        """Loads every function in a process, and checks that built-in ones have what they need.

        Raises:
            UserError: a function cannot be loaded, or lacks something.
        """
        with self._lock:
            self._check_wanted = True
            self._wake()
            self._lock.wait_for(lambda: self._checked or self._error)
            if self._error is not None:
                raise self._error

    def close(self) -> None:
        """See `protocols.rewards.Grader.close`. May be called again."""
        with self._lock:
            self._closing = True
        self._wake()
        self._thread.join()

    def _take(self) -> list[tuple[int, list[Score]]]:
        if self._error is not None:
            raise self._error
        done, self._done = self._done, []
        for key, _ in done:
            self._open.pop(key, None)
        return done

    def _wake(self) -> None:
        with suppress(OSError):  # it is awake (full), or closed
            self._wake_end.send(b"!")

    # --- the thread ---

    def _run(self) -> None:
        try:
            while True:
                with self._lock:
                    if self._closing:
                        break
                    if self._error is None:
                        self._deal(time.monotonic())
                    until = min((d for p in self._processes for d in self._deadlines(p)), default=None)
                events = self._selector.select(None if until is None else max(0.0, until - time.monotonic()))
                with self._lock:
                    self._handle(events, time.monotonic())
        except BaseException as error:  # the caller that waits must get the error
            with self._lock:
                self._error = error
        finally:
            with self._lock:
                self._stop()

    def _stop(self) -> None:
        for process in self._processes:
            process.wire.connection.close()  # all of them exit at once, not one after the other
        for process in self._processes:
            process.end(0.0 if process.calls or not process.ready else GRACE)
        self._processes.clear()
        self._selector.close()
        self._woken.close()
        self._wake_end.close()
        self._lock.notify_all()

    def _handle(self, events: list[tuple[selectors.SelectorKey, int]], now: float) -> None:
        touched = {id(p): p for p in self._processes if any(d <= now for d in self._deadlines(p))}
        exited = set()
        for key, mask in events:
            process: PoolProcess | None = key.data
            if process is None:
                with suppress(BlockingIOError):
                    self._woken.recv(4096)
                continue
            if mask & selectors.EVENT_WRITE:
                process.wire.flush()
                self._watch(process)
            if key.fd == process.exited:
                exited.add(id(process))
            touched[id(process)] = process
        for process in touched.values():
            if process not in self._processes:  # all were ended
                continue
            # What it sent before it exited or ran out of time is read first: it counts.
            messages, ended = process.wire.receive()
            for message in messages:
                self._hear(process, message, now)
            if self._error is not None:
                continue
            if ended or id(process) in exited:
                self._bury(process)
            else:
                self._look_at(process, now)

    def _deadlines(self, process: PoolProcess) -> Iterator[float]:
        """Yields the times at which a process must be checked, if it has sent nothing."""
        if not process.ready:
            yield process.until
        elif process.calls and process.asynchronous:
            yield next(iter(process.calls.values())).begun + self._pool.timeout + LATE
        elif process.calls:
            yield process.since + self._pool.timeout
            if not process.passed_over:
                yield process.since + max(PASSED_OVER, TIMES_USUAL * self._usual)

    def _hear(self, process: PoolProcess, message: tuple[Any, ...], now: float) -> None:
        if message[0] == "ready":
            self._kinds, process.ready, self._died_starting = message[1], True, 0
            if process.asynchronous is None:
                process.asynchronous = all(is_async for _, is_async in self._kinds.values())
            if process.checks:
                self._checked = True
                self._lock.notify_all()
        elif message[0] == "broken":
            self._give_up(UserError(message[1], why=message[2], fix=message[3]))
        else:
            number, index, scores = message
            call = process.calls.pop((number, index), None)
            if not process.asynchronous:
                self._usual += 0.1 * (now - process.since - self._usual)
                process.since, process.passed_over = now, False
            if call is not None:  # no other process has taken it over
                self._settle(call, [score_of(plain) for plain in scores])

    def _look_at(self, process: PoolProcess, now: float) -> None:
        """Acts on a process that has sent nothing for so long."""
        if not process.ready:
            if now >= process.until:
                self._give_up(
                    UserError(
                        f"a reward process had not loaded {self._names} after {START:g} s",
                        why="it imports the file, and whatever that imports",
                        fix="do in the function what takes long, once, or reward.pool.processes=0",
                    )
                )
        elif process.calls and now >= min(self._deadlines(process)):
            late = process.asynchronous or now >= process.since + self._pool.timeout
            first, *others = process.calls.values()
            if not late:
                process.passed_over = process.forget = True
                process.calls = dict([next(iter(process.calls.items()))])
                self._again(others)
                return
            self._remove(process)
            if process.asynchronous and others:
                self._again([first, *others], alone=True)  # one of them blocks the loop
                return
            self._again(others)
            self._fail(first, "timeout", too_long(self._pool.timeout))

    def _bury(self, process: PoolProcess) -> None:
        how = self._remove(process, GRACE)  # its socket closes a little before it ends
        calls = list(process.calls.values())
        if not process.ready:
            self._died_starting += 1
            if self._died_starting == STARTS:
                self._give_up(
                    UserError(
                        f"a reward process {how} while it loaded {self._names}",
                        why="its output is above",
                        fix="import the file alone; reward.pool.memory_mb limits its memory",
                    )
                )
            return
        suspects = calls if process.asynchronous else calls[:1]
        for call in suspects:
            call.deaths += 1
            if call.deaths == 2 and len(suspects) == 1:
                self._fail(call, "died", f"lost its process, which {how}")
                calls.remove(call)
        self._again(calls, alone=bool(process.asynchronous))

    def _again(self, calls: list[Call], alone: bool = False) -> None:
        """Queues calls again, before all others."""
        calls = [c for c in calls if not c.group.forgotten]
        (self._alone if alone else self._queue).extendleft(reversed(calls))

    def _remove(self, process: PoolProcess, grace: float = 0.0) -> str:
        """Ends a process and says how it ended; see `PoolProcess.end`."""
        self._processes.remove(process)
        self._selector.unregister(process.wire.connection)
        if process.exited is not None:
            self._selector.unregister(process.exited)
        return process.end(grace)

    def _give_up(self, error: UserError) -> None:
        self._error = error
        for process in list(self._processes):
            self._remove(process)
        self._lock.notify_all()

    def _fail(self, call: Call, kind: str, what: str) -> None:
        group = call.group
        name = self._functions[group.function].reference
        self._settle(call, failures(name, kind, what, group.answers, call.index))

    def _settle(self, call: Call, scores: list[Score]) -> None:
        group = call.group
        if group.forgotten:
            return
        begin = call.index or 0
        group.scores[begin : begin + len(scores)] = scores
        group.left -= len(scores)
        if group.left == 0:
            self._finish(group)

    def _finish(self, group: GroupCalls) -> None:
        self._done.append((group.key, [s for s in group.scores if s is not None]))
        self._lock.notify_all()

    # --- dealing ---

    def _deal(self, now: float) -> None:
        """Gives calls to processes that have room, and starts processes that are missing."""
        for process in self._processes:
            if process.forget and process.ready:
                if process.asynchronous:
                    process.calls.clear()
                else:
                    process.calls = dict(list(process.calls.items())[:1])
                process.wire.send(("forget", next(iter(process.calls), None)))
                self._watch(process)
            process.forget = False
        while self._kinds and self._new:
            group = self._new.popleft()
            whole_group, is_async = self._kinds[group.function]
            calls = [Call(group, i) for i in ([None] if whole_group else range(group.left))]
            (self._queue_async if is_async else self._queue).extend(calls)
        if self._check_wanted and not self._checked and not any(p.checks for p in self._processes):
            self._start(None, checks=True)
        elif self._new and not self._processes:
            self._start(None)  # it says which functions are asynchronous
        self._deal_plain(now)
        self._deal_async(now)

    def _deal_plain(self, now: float) -> None:
        plain = [p for p in self._processes if not p.asynchronous]
        active = [p for p in plain if not p.passed_over]
        wanted = max(1, self._pool.processes)
        for process in active[wanted:]:  # the others take over again
            if process.ready and not process.calls:
                self._remove(process)
        room = min(MOST_AHEAD, max(1, int(AHEAD / self._usual))) if self._usual else 1
        for process in active[:wanted]:
            if process.ready and len(process.calls) <= room // 2:
                if not process.calls:
                    process.since = now
                self._give(process, self._queue, room - len(process.calls), now)
        if self._queue and len(active) < wanted and len(plain) < wanted + SPARES:
            self._start(False)

    def _deal_async(self, now: float) -> None:
        if not (self._queue_async or self._alone):
            return
        process = next((p for p in self._processes if p.asynchronous), None)
        if process is None:
            self._start(True)
        elif process.ready and not self._alone:
            self._give(process, self._queue_async, self._pool.concurrency - len(process.calls), now)
        elif process.ready and not process.calls:
            self._give(process, self._alone, 1, now)

    def _give(self, process: PoolProcess, waiting: deque[Call], most: int, now: float) -> None:
        calls = [waiting.popleft() for _ in range(min(most, len(waiting)))]
        for _, of_group in itertools.groupby(calls, key=lambda c: id(c.group)):
            given = list(of_group)
            self._tasks += 1
            for call in given:
                call.begun = now
                process.calls[self._tasks, call.index] = call
            group = given[0].group
            process.wire.send(("score", self._tasks, group.function, group.data, [call.index for call in given]))
        self._watch(process)

    def _start(self, asynchronous: bool | None, checks: bool = False) -> None:
        process = start_process(self._folder, self._path, checks)
        process.asynchronous = asynchronous
        self._processes.append(process)
        self._selector.register(process.wire.connection, selectors.EVENT_READ, process)
        if process.exited is not None:
            self._selector.register(process.exited, selectors.EVENT_READ, process)
        process.wire.send(("load", self._functions, checks, self._pool.memory_mb, self._pool.timeout, user_folders()))
        self._watch(process)

    def _watch(self, process: PoolProcess) -> None:
        """Makes the thread wake when the process can take more, if there is more for it."""
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if process.wire.unsent else 0)
        if self._selector.get_key(process.wire.connection).events != wanted:
            self._selector.modify(process.wire.connection, wanted, process)


def _pickled(answers: Answers) -> bytes:
    """Pickles responses as they are sent to a process.

    Raises:
        UserError: something in them has no form that another process can read: a function of a function, an open file.
    """
    try:
        return pickle.dumps(answers, pickle.HIGHEST_PROTOCOL)
    except Exception as error:  # whatever the objects' own methods raise
        parts = {"the prompt": answers.prompt, "the ground truth": answers.ground_truth}
        parts |= {f"row[{name!r}]": value for name, value in answers.row.items()}
        place = next((name for name, value in parts.items() if not _can_be_sent(value)), "the row")
        raise UserError(
            f"{place} cannot be sent to a reward process: {type(error).__name__}: {str(error)[:CUT]}",
            why="a process gets the whole row, its prompt and its ground truth",
            fix="put plain data into rows, and make the rest of it in the reward; or reward.pool.processes=0, which "
            "scores in this process, without limits",
        ) from error


def _can_be_sent(value: Any) -> bool:
    try:
        pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
    except Exception:
        return False
    return True
