"""The back end without processes: workers live in the controller's own, so that exceptions and breakpoints are where
they arise.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hybridflow.controller.messages import Lost, Place, WorkerCall, WorkerReply
from hybridflow.controller.worker import WorkerHost
from hybridflow.devices import pick_device


class InProcessBackend:
    """The back end of pools of one process each: all of them are this one.

    Args:
        device: ``run.device``.
    """

    passes_exceptions = True

    def __init__(self, device: str) -> None:
        self._device = pick_device(device)
        self._hosts: dict[Place, WorkerHost] = {}
        self._done: list[tuple[Place, WorkerReply | Lost]] = []

    def check(self, places: Sequence[Place]) -> Iterable[str]:
        """Yields no warning: this process is all that is needed."""
        assert all(place.size == 1 for place in places), "in_process is one process"
        return []

    def start(self, places: Sequence[Place]) -> None:
        """Makes the workers' hosts."""
        self._hosts = {place: WorkerHost(place, self._device, None) for place in places}

    def send(self, place: Place, request: WorkerCall) -> None:
        """Performs the request at once."""
        self._done.append((place, WorkerReply(request.id, "done", self._hosts[place].perform(request))))

    def receive(self, timeout: float) -> Sequence[tuple[Place, WorkerReply | Lost]]:
        """Returns what was performed."""
        done, self._done = self._done, []
        return done

    def box(self, place: Place) -> Mapping[str, Any]:
        """Returns what the worker does now."""
        return self._hosts[place].doing

    def kill(self) -> None:
        """Closes it, as `close` does."""
        self.close()

    def close(self) -> None:
        """Leaves the process group, where one was made."""
        for host in self._hosts.values():
            host.close()
