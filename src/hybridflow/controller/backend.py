"""The protocol of every back end: it starts processes and carries messages between them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from hybridflow.controller.messages import Lost, Place, WorkerCall, WorkerReply
from hybridflow.devices import CPU, count_devices, kind_of
from hybridflow.errors import UserError

Events = Callable[[str, str], None]


class Backend(Protocol):
    """Starts processes and carries messages; see the head of this file.

    Attributes:
        passes_exceptions: workers run inside of the call itself, and their exceptions reach the caller.
    """

    passes_exceptions: bool

    def check(self, places: Sequence[Place]) -> Iterable[str]:
        """Checks the host before anything starts; yields warnings.

        Raises:
            UserError: something is lacking; it names the pool and what it lacks.
        """
        ...

    def start(self, places: Sequence[Place]) -> None:
        """Starts all processes. They need not be ready when it returns."""
        ...

    def send(self, place: Place, request: WorkerCall) -> None:
        """Sends a request to a process; `receive` reports a process that is gone."""
        ...

    def receive(self, timeout: float) -> Sequence[tuple[Place, WorkerReply | Lost]]:
        """Waits until something has come, or for this many seconds."""
        ...

    def box(self, place: Place) -> Mapping[str, Any]:
        """Returns what a process did last (see `worker.BlackBox`), alive or dead; empty where that is not known."""
        ...

    def kill(self) -> None:
        """Ends all processes, within seconds, whatever they do."""
        ...

    def close(self) -> None:
        """Lets all processes finish and end."""
        ...


def places_of(pools: Mapping[str, int]) -> list[Place]:
    """Returns the processes of all pools, in order."""
    names = [(pool, rank, size) for pool, size in pools.items() for rank in range(size)]
    return [Place(index, pool, rank, size) for index, (pool, rank, size) in enumerate(names)]


def check_devices(places: Sequence[Place], device: str) -> Iterable[str]:
    """Compares the pools with the devices of one host: a warning for each core that is missing.

    Raises:
        UserError: there are fewer accelerators than processes.
    """
    kind = kind_of(device)
    there = count_devices(kind)
    if len(places) <= there:
        return
    pools = ", ".join(f"{pool} {sum(p.pool == pool for p in places)}" for pool in dict.fromkeys(p.pool for p in places))
    if kind is CPU:
        yield f"{len(places)} processes ({pools}) share {there} cores: each is slower than alone"
        return
    lacking = places[there]
    left = sum(p.pool == lacking.pool for p in places[:there])
    raise UserError(
        f"pool {lacking.pool!r} lacks {lacking.size - left} devices: it needs {lacking.size}, and {left} are left",
        why=f"this host has {there} ({kind.name}), and the pools need {len(places)} ({pools})",
        fix="make placement.pools smaller, put roles into one pool, or use several hosts (placement.backend=ray)",
    )


def to_stderr(kind: str, text: str) -> None:
    """Prints an event, where no other handler takes it."""
    if kind != "failure":  # that is raised as well
        print(f"{kind}: {text}", file=sys.stderr, flush=True)
