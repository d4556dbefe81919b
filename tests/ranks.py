"""Real processes for tests: gloo groups that live as long as the test session, so that a test does not wait for them.

The functions that it runs stand in `tests/on_ranks/`, because a process finds them by their module's name.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

GRACE = 5.0  # seconds that other ranks have to answer once one has failed: they may wait for it in a collective


class Ranks:
    """`size` processes in one gloo process group; `run` calls a function on all of them.

    A run that fails, or is cut short, ends them all: what they hold is unknown then, and an answer may still be under
    way. `shared_ranks` makes new ones for the next test.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.closed = False
        self._folder = tempfile.TemporaryDirectory()
        context = server_of_forks()
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, self._folder.name, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """What the function returns on every rank; an exception on a rank fails the test with its traceback."""
        try:
            for pipe in self._pipes:
                pipe.send((function, args, kwargs))
            answers = self._answers()
            failed = [f"rank {rank}:\n{text}" for rank, (ok, text) in sorted(answers.items()) if not ok]
            assert not failed, "\n".join(failed)
        except BaseException:  # the limit on a test's time is one too
            self.close(0)
            raise
        return [answers[rank][1] for rank in range(self.size)]

    def close(self, patience: float = 5) -> None:
        self.closed = True
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(patience)
            process.kill()
            process.join()
        self._folder.cleanup()

    def _answers(self) -> dict[int, tuple[bool, Any]]:
        """(whether it went well, what it returned or its traceback) by rank, in the order in which they came."""
        answers: dict[int, tuple[bool, Any]] = {}
        failed = False
        while len(answers) < self.size:
            waited_for = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in answers}
            ready = wait(waited_for, GRACE if failed else None)
            for pipe in ready or waited_for:
                rank = waited_for[pipe]
                answers[rank] = self._answer(rank) if ready else (False, "it did not answer: does it wait?")
            failed = not all(ok for ok, _ in answers.values())
        return answers

    def _answer(self, rank: int) -> tuple[bool, Any]:
        try:
            answer: tuple[bool, Any] = self._pipes[rank].recv()
        except (EOFError, OSError):
            self._processes[rank].join(GRACE)
            crash = _crash_file(self._folder.name, rank)
            stacks = crash.read_text() if crash.exists() else ""  # it may end before it has made the file
            return False, f"its process ended, exit status {self._processes[rank].exitcode}\n{stacks}"
        return answer


def server_of_forks() -> ForkServerContext:
    """Has ranks forked from a process that has imported what they run: each would take seconds for it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["on_ranks.engines", "on_ranks.ulysses", "on_ranks.weights"])
    own = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), own])  # it has no other way to find them
    try:
        forkserver.ensure_running()
    finally:
        os.environ["PYTHONPATH"] = own
    return context


def _crash_file(folder: str, rank: int) -> Path:
    """Where Python writes the stacks of all threads of a rank that ends by a crash of native code."""
    return Path(folder) / f"crash-{rank}.txt"


_SHARED: dict[tuple[str, int], Ranks] = {}


def shared_ranks(size: int, pool: str = "") -> Ranks:
    """The group of this size, the same for all tests of the session until a test breaks it.

    Args:
        size: how many processes.
        pool: a name, for a group beside the first of this size.
    """
    if (pool, size) not in _SHARED or _SHARED[pool, size].closed:
        _SHARED[pool, size] = Ranks(size)
    return _SHARED[pool, size]


def _serve(rank: int, size: int, folder: str, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    # A server of forks that a pool has started holds this signal back, and the end of the tests would wait for us.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    faulthandler.enable(_crash_file(folder, rank).open("w"))
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    while True:
        try:
            function, args, kwargs = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, function(*args, **kwargs)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
