"""Watches the processes of vLLM: ends all when one has died or hangs, and leaves none behind."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import connection
from multiprocessing.process import BaseProcess


class WorkerWatch:
    """Ends all worker processes of an engine when one of them has died, or none has answered for a while.

    vLLM notices a dead worker, but gives the others, which wait for it in a collective, many seconds; it never ends a
    worker that hangs.

    Args:
        processes: the workers.
        timeout: seconds within which they must answer a call.
    """

    def __init__(self, processes: Sequence[BaseProcess], timeout: float) -> None:
        self.processes, self._timeout = list(processes), timeout
        self._since: float | None = None  # when the call began that is being waited for
        self._end, self._ended = multiprocessing.Pipe(duplex=False)
        threading.Thread(target=self._look, name="vllm-workers", daemon=True).start()

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Holds the workers to an answer within the timeout while the block runs."""
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._since = None

    def broken(self) -> bool:
        """Returns whether a worker has ended."""
        return not all(process.is_alive() for process in self.processes)

    def kill(self) -> None:
        """Sends SIGKILL to all workers."""
        for process in self.processes:
            process.kill()

    def close(self) -> None:
        """Stops watching."""
        self._ended.close()

    def _look(self) -> None:
        while True:
            since = self._since
            left = self._timeout if since is None else since + self._timeout - time.monotonic()
            ready = connection.wait([self._end, *(p.sentinel for p in self.processes)], max(0.0, left))
            if self._end in ready:
                self._end.close()
                return
            if ready or (since is not None and since == self._since and left <= 0):
                self.kill()
                return


def kill_children_since(before: set[BaseProcess]) -> None:
    """Kills the children of this process that have come since."""
    for process in set(multiprocessing.active_children()) - before:
        process.kill()
