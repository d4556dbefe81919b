"""The program of a process that scores responses: see `pool`.

It is started with the number of a socket, and reads and writes frames there, so that nothing that a reward prints,
reads or forks touches them. Every frame is a length in four bytes, and a pickled tuple of that length:

    to it    ("load", functions, check, memory_mb, timeout, folders)  once; folders: of users' files
             ("score", number, function, answers, indices)       answers: pickled; an index: see `RewardFunction.calls`
             ("forget", (number, index) or None)                 what has not begun, but for this call
    from it  ("ready", {function: (whole group, async)})         once, or
             ("broken", what, why, fix)                          a UserError
             (number, index, scores)                             for every call, as it ends

One process has plain functions or ``async def`` functions, never both at once.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import pickle
import resource
import signal
import socket
import struct
import sys
import traceback
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import astuple
from typing import Any

from hybridflow.config.imports import know
from hybridflow.errors import UserError, raised
from hybridflow.protocols.rewards import Answers, Failure, Score
from hybridflow.rewards.graders.function import RewardFunction, check_builtins, failures, load_all

PR_SET_PDEATHSIG = 1  # of Linux's prctl: this signal when the parent dies
_LENGTH = struct.Struct(">I")
PlainFailure = tuple[str, str, str]
Parts = tuple[tuple[int, float], ...]
Plain = tuple[float, dict[str, float], Parts, Parts, PlainFailure | None, bool]  # a Score, faster to pickle


def frame(message: tuple[Any, ...]) -> bytes:
    """Returns a message as it is sent."""
    data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    return _LENGTH.pack(len(data)) + data


class Frames:
    """Puts messages together from whatever pieces arrive."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> Iterator[Any]:
        """Yields the messages that these bytes complete."""
        self._data += data
        begin = 0
        while len(self._data) >= begin + _LENGTH.size:
            end = begin + _LENGTH.size + _LENGTH.unpack_from(self._data, begin)[0]
            if len(self._data) < end:
                break
            yield pickle.loads(memoryview(self._data)[begin + _LENGTH.size : end])
            begin = end
        del self._data[:begin]


class WorkerSocket:
    """The worker's end of the socket."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._frames = Frames()
        self._process = os.getpid()

    def send(self, message: tuple[Any, ...]) -> None:
        """Sends; ends the process instead if it is a copy that a reward has forked."""
        if os.getpid() != self._process:
            os._exit(0)
        self.connection.sendall(frame(message))

    def receive(self, *, wait: bool) -> list[Any]:
        """Returns messages that have arrived; with `wait`, blocks for at least a piece of one.

        Raises:
            EOFError: the parent has closed its end.
        """
        try:
            data = self.connection.recv(1 << 18, 0 if wait else socket.MSG_DONTWAIT)
        except BlockingIOError:
            return []
        if not data:
            raise EOFError
        return list(self._frames.feed(data))


def main(descriptor: int, parent: int) -> None:
    """Runs until the parent closes its end of the socket, or dies.

    Args:
        descriptor: of the socket.
        parent: process id.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent died before that
        return
    os.set_inheritable(descriptor, False)
    channel = WorkerSocket(socket.socket(fileno=descriptor))
    try:
        loaded, timeout, messages = _load(channel)
        while not messages:
            messages = channel.receive(wait=True)
        asynchronous = next((loaded[m[2]].is_async for m in messages if m[0] == "score"), False)
        if asynchronous:
            asyncio.run(_serve_async(channel, loaded, timeout, messages))
        else:
            _serve(channel, loaded, messages)
    except (EOFError, ConnectionError):
        return


def _load(channel: WorkerSocket) -> tuple[dict[str, RewardFunction], float, list[Any]]:
    messages: list[Any] = []
    while not messages:
        messages = channel.receive(wait=True)
    _, functions, check, memory_mb, timeout, folders = messages.pop(0)
    know(folders)
    _limit_memory(memory_mb << 20)
    try:
        loaded = load_all(functions)
        if check:
            check_builtins(functions)
    except UserError as error:
        channel.send(("broken", error.what, error.why, error.fix))
        raise EOFError from error
    except (Exception, SystemExit) as error:
        names = ", ".join(spec.reference for spec in functions.values())
        what = f"a reward process cannot load {names}: {raised(error)}"
        channel.send(("broken", what, traceback.format_exc(limit=-3), ""))
        raise EOFError from error
    channel.send(("ready", {name: (f.whole_group, f.is_async) for name, f in loaded.items()}))
    return loaded, timeout, messages


def _answers(channel: WorkerSocket, data: bytes) -> Answers:
    """Unpickles the responses.

    Raises:
        EOFError: it cannot be read here; the parent has the reason.
    """
    try:
        answers: Answers = pickle.loads(data)
        return answers
    except Exception as error:
        what = f"a reward process cannot read the row that it is to score against: {raised(error)}"
        why = "the row holds an object whose class this process cannot import"
        fix = "put plain data into rows, and make the rest of it in the reward; or reward.pool.processes=0"
        channel.send(("broken", what, why, fix))
        raise EOFError from error


def _limit_memory(size: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard != resource.RLIM_INFINITY:
        size = min(size, hard)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (size, hard))
    except (ValueError, OSError):  # macOS does not know this limit
        if sys.platform == "linux":
            raise


def _serve(channel: WorkerSocket, loaded: Mapping[str, RewardFunction], messages: list[Any]) -> None:
    tasks: deque[tuple[int, RewardFunction, Answers, deque[int | None]]] = deque()
    while True:
        for message in messages:
            if message[0] == "forget":
                kept = message[1]  # the parent waits for it, although this process may not have started it yet
                pending = [t for t in tasks if kept is not None and t[0] == kept[0] and kept[1] in t[3]]
                tasks = deque((number, function, answers, deque([kept[1]])) for number, function, answers, _ in pending)
                continue
            _, number, name, answers, indices = message
            tasks.append((number, loaded[name], _answers(channel, answers), deque(indices)))
        if tasks:
            number, function, answers, indices = tasks[0]
            index = indices.popleft()
            if not indices:
                tasks.popleft()
            channel.send((number, index, _plain(function.score(answers, index))))
        messages = channel.receive(wait=not tasks)


async def _serve_async(
    channel: WorkerSocket, loaded: Mapping[str, RewardFunction], timeout: float, messages: list[Any]
) -> None:
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    running: set[asyncio.Task[None]] = set()

    def take(messages: list[Any]) -> None:
        for message in messages:
            if message[0] == "forget":
                for task in running:
                    task.cancel()
                continue
            _, number, name, data, indices = message
            answers = _answers(channel, data)
            for index in indices:
                task = loop.create_task(_score_async(channel, loaded[name], timeout, number, answers, index))
                running.add(task)
                task.add_done_callback(running.discard)

    def readable() -> None:
        try:
            take(channel.receive(wait=False))
        except (EOFError, ConnectionError):
            ended.set()

    take(messages)
    loop.add_reader(channel.connection, readable)
    await ended.wait()
    for task in running:
        task.cancel()


async def _score_async(
    channel: WorkerSocket, function: RewardFunction, timeout: float, number: int, answers: Answers, index: int | None
) -> None:
    call = asyncio.ensure_future(function.score_async(answers, index))
    try:
        await asyncio.wait({call}, timeout=timeout)
    finally:  # it has ended, or is out of time, or was withdrawn
        call.cancel()
    if call.done() and not call.cancelled():
        scores = call.result()
    elif call.done():
        scores = failures(function.name, "raised", "raised CancelledError", answers, index)
    else:
        scores = failures(function.name, "timeout", too_long(timeout), answers, index)
    with suppress(ConnectionError):  # the parent has ended: the reading side sees it too
        channel.send((number, index, _plain(scores)))


def too_long(timeout: float) -> str:
    """Describes what a call did that ran out of time."""
    return f"took longer than {timeout:g} s"


def _plain(scores: list[Score]) -> list[Plain]:
    return [
        (s.value, s.components, s.steps, s.turns, None if s.failure is None else astuple(s.failure), s.applies)
        for s in scores
    ]


def score_of(plain: Plain) -> Score:
    """Returns the score that a worker has sent."""
    value, components, steps, turns, failure, applies = plain
    return Score(value, components, steps, turns, None if failure is None else Failure(*failure), applies)
