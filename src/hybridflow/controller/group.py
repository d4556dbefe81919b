"""A worker group: calls on it reach its workers, in whichever processes they live."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from hybridflow.controller.dispatch import Call, Dispatch, Mesh, dispatch_of
from hybridflow.errors import nearest


class CallSender(Protocol):
    """The interface that brings calls to workers, and their results back (`controller.cluster.Cluster`)."""

    def send(
        self, group: WorkerGroup, method: str, calls: Sequence[Call | None], join: Callable[[list[Any]], Any]
    ) -> Future:
        """Sends each worker of a group its part of a call, where it has one.

        Args:
            group: the group of the workers.
            method: of the workers.
            calls: the arguments for each rank; None for a rank that is not called.
            join: makes one result of theirs.
        """
        ...

    def pump(self, seconds: float) -> None:
        """Takes the results that have arrived; waits at most this many seconds for one."""
        ...


class Future:
    """The result of a call that may still run."""

    def __init__(self, cluster: CallSender, ranks: Sequence[int], size: int, join: Callable[[list[Any]], Any]) -> None:
        self._cluster, self._join = cluster, join
        self._missing = set(ranks)
        self._results: list[Any] = [None] * size
        self._joined: list[Any] = []

    def done(self) -> bool:
        """Returns whether `result` would return at once.

        Raises:
            UserError: a worker has failed meanwhile.
        """
        if self._missing:
            self._cluster.pump(0)
        return not self._missing

    def result(self) -> Any:
        """Waits for all workers; returns what the dispatch joins their results to.

        Raises:
            WorkerFailure: a worker has failed, of this group or another; the cluster has ended.
            UserError: a worker raised it.
        """
        while self._missing:
            self._cluster.pump(1.0)
        if not self._joined:
            self._joined = [self._join(self._results)]
            self._results = []
        return self._joined[0]

    def set(self, rank: int, value: Any) -> bool:
        """Takes the result of a rank; returns whether it was the last one."""
        self._results[rank] = value
        self._missing.discard(rank)
        return not self._missing


class RemoteMethod:
    """A method of all workers of a group: a call waits for the result, `later` returns at once."""

    def __init__(self, group: WorkerGroup, name: str, dispatch: Dispatch) -> None:
        self._group, self._name, self._dispatch = group, name, dispatch

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls it on all workers and returns the joined result."""
        return self.later(*args, **kwargs).result()

    def later(self, *args: Any, **kwargs: Any) -> Future:
        """Sends the call and returns at once. Calls on one process run in the order in which they were sent."""
        return self._group.send(self._name, self._dispatch, (args, kwargs))


class WorkerGroup:
    """The workers of one class in all processes of a pool. Methods marked with `remote` can be called on it.

    Made by `Cluster.group`.
    """

    def __init__(self, cluster: CallSender, name: str, cls: type, pool: str, mesh: Mesh) -> None:
        self.name, self.cls, self.pool, self.mesh = name, cls, pool, mesh
        self._cluster = cluster

    @property
    def world_size(self) -> int:
        """The number of workers."""
        return self.mesh.size

    def send(self, method: str, dispatch: Dispatch, call: Call) -> Future:
        """Splits a call, and sends each worker its part."""
        calls = dispatch.split(self.mesh, call)
        return self._cluster.send(self, method, calls, lambda results: dispatch.join(self.mesh, results))

    def __getattr__(self, name: str) -> RemoteMethod:
        if name.startswith("_"):
            raise AttributeError(name)
        dispatch = dispatch_of(self.cls, name)
        if dispatch is None:
            marked = [m for m in dir(self.cls) if dispatch_of(self.cls, m) is not None]
            if hasattr(self.cls, name):
                hint = "it is not marked with @remote(...), which says how its arguments reach the workers"
            else:
                hint = nearest(name, marked)
            raise AttributeError(f"the group {self.name!r} cannot call {self.cls.__name__}.{name}: {hint}")
        return RemoteMethod(self, name, dispatch)
