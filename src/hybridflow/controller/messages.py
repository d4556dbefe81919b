"""The messages between the controller and its processes."""

from __future__ import annotations

import functools
import pickle
from dataclasses import dataclass
from typing import Any, Literal

from hybridflow.controller.codec import Frame, Frames, decode, encode
from hybridflow.controller.dispatch import Call


@dataclass(frozen=True)
class Place:
    """One process among those of all pools.

    Args:
        index: its number over all pools, in their order.
        pool: name of its pool.
        rank: its number in the pool.
        size: processes of the pool.
    """

    index: int
    pool: str
    rank: int
    size: int

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.size} of pool {self.pool}"


@dataclass(frozen=True)
class Meeting:
    """The meeting point of a run's processes: a TCPStore, and settings that they agree on beforehand.

    Args:
        host: of the store.
        port: of the store.
        prefix: of the run's keys in the store, which several runs may share.
        timeout: seconds that a collective may take.
    """

    host: str
    port: int
    prefix: str
    timeout: float


@dataclass(frozen=True, eq=False)
class WorkerCall:
    """A request to a process. Equal requests to several processes are one object, and are encoded once.

    Args:
        id: number of the call; its replies carry it.
        kind: "create" a worker, "call" a method of one, or ask "where" the process stands, which gets its reply while a
            call runs.
        group: name of the worker.
        method: the method to call.
        step: step of the run.
        call: the arguments; of "create", those of the class.
        more: of "create", the class.
    """

    id: int
    kind: Literal["create", "call", "where"]
    group: str = ""
    method: str = ""
    step: int = 0
    call: Call = ((), {})
    more: Any = None

    @functools.cached_property
    def frames(self) -> list[Frame]:
        """The message. The head of the request comes first, so that it can be read without the arguments."""
        head = (self.id, self.kind, self.group, self.method, self.step)
        return [pickle.dumps(head), *encode((self.call, self.more))]

    @staticmethod
    def head(frames: Frames) -> WorkerCall:
        """Reads the request without its arguments."""
        number, kind, group, method, step = pickle.loads(frames[0])
        return WorkerCall(number, kind, group, method, step)

    @staticmethod
    def read(frames: Frames) -> WorkerCall:
        """Reads the whole request."""
        call, more = decode(frames[1:])
        number, kind, group, method, step = pickle.loads(frames[0])
        return WorkerCall(number, kind, group, method, step, call, more)


@dataclass(frozen=True, eq=False)
class WorkerReply:
    """The reply of a process to a request: its result, a `failure.Failed`, or a `failure.Standing`."""

    id: int
    kind: Literal["done", "failed", "where"]
    value: Any

    @functools.cached_property
    def frames(self) -> list[Frame]:
        """The message."""
        return [pickle.dumps((self.id, self.kind)), *encode(self.value)]

    @staticmethod
    def read(frames: Frames) -> WorkerReply:
        """Reads the reply of a message."""
        number, kind = pickle.loads(frames[0])
        return WorkerReply(number, kind, decode(frames[1:]))


@dataclass(frozen=True)
class Lost:
    """A process has ended without being asked to.

    Args:
        how: in words, such as "killed by signal 9 (SIGKILL)".
        signal: the signal that ended it, where that is known.
    """

    how: str
    signal: int | None = None
