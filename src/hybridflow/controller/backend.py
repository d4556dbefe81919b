"""What starts processes and carries messages between them: the protocol of every backend."""

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
        passes_exceptions: workers run in this very call, and what they raise goes through to the caller.
    """

    passes_exceptions: bool

    def check(self, places: Sequence[Place]) -> Iterable[str]:
        """Before anything starts: warnings.

        Raises:
            UserError: something is lacking; says which pool lacks what.
        """
        ...

    def start(self, places: Sequence[Place]) -> None:
        """Starts all processes. They need not be ready when it returns."""
        ...

    def send(self, place: Place, request: WorkerCall) -> None:
        """Hands a request to a process; one that is gone is told by `receive`."""
        ...

    def receive(self, timeout: float) -> Sequence[tuple[Place, WorkerReply | Lost]]:
        """Waits until something has come, or for so many seconds."""
        ...

    def box(self, place: Place) -> Mapping[str, Any]:
        """What a process was doing last (see `worker.BlackBox`), alive or dead; empty where that is not known."""
        ...

    def kill(self) -> None:
        """Ends all processes, within seconds, whatever they do."""
        ...

    def close(self) -> None:
        """Ends all processes in order."""
        ...


def places_of(pools: Mapping[str, int]) -> list[Place]:
    """The processes of all pools, in order."""
    names = [(pool, rank, size) for pool, size in pools.items() for rank in range(size)]
    return [Place(index, pool, rank, size) for index, (pool, rank, size) in enumerate(names)]


def check_devices(places: Sequence[Place], device: str) -> Iterable[str]:
    """Holds the pools against the devices of one host: a warning for each core that is missing.

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
    """Prints an event, where nobody else takes it."""
    if kind != "failure":  # that is raised as well
        print(f"{kind}: {text}", file=sys.stderr, flush=True)
