"""The processes of a run: how they start, how calls reach them, and how an attempt ends when one of them fails.

    with open_cluster(placement, device="cpu") as cluster:
        actor = cluster.group("actor", Actor, "train", "path/of/model", mesh={"dp": 2})
        update = actor.update(parts, loss)  # a method of Actor that is marked with `remote`

**Back ends.** A `Backend` starts one process for each `Place` and carries messages; everything else is here. It needs
seven methods: `check` (what the host lacks), `start`, `send` a request to a place, `receive` messages from all of them,
`box` (what a dead process did last), `kill`, `close`. In a process runs a `worker.Host`, by `worker.serve` over a wire
or, where messages come in another way, by `Host.perform`, `Host.answer` and `Host.standing`:

- Requests to one place are performed in the order in which they were sent, one at a time. "where" gets its reply at
  once, from another thread, while a call runs.
- `send` must not wait for the place to be free, nor for the controller to receive. `Request.frames` is the encoded
  message; one request object may go to many places, and is encoded once.
- `receive` returns (place, reply) or, once for each place, (place, Lost) when a process has ended without being asked.
- After `kill`, or `close`, no process is left, also where the controller's own process is killed.

No thread runs here: results are received while a caller waits for one.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal

from hybridflow.config.sections.placement import PlacementSection
from hybridflow.controller.backend import Backend, Events, places_of, to_stderr
from hybridflow.controller.codec import count_bytes
from hybridflow.controller.dispatch import Call, Mesh
from hybridflow.controller.failure import Evidence, first_cause
from hybridflow.controller.group import Future, WorkerGroup
from hybridflow.controller.messages import Lost, Place, WorkerCall, WorkerReply
from hybridflow.errors import UserError, nearest

GRACE_SECONDS = 1.0  # for what fails together with a failure, or because of it
SEARCH_SECONDS = 5.0  # for the cause of a failure that is a consequence, and for processes to report where they stand


class Cluster:
    """The processes of all pools, seen from the controller. Made by `open_cluster`; use it as a context.

    Args:
        placement: the pools.
        backend: starts the processes.
        events: called with ("failure", report) and ("warning", text).

    Attributes:
        step: step of the run, which workers and reports get too.
        bytes: of the tensors that went through the controller: "scalar" (one entry per sequence), "token", "other".
    """

    def __init__(self, placement: PlacementSection, backend: Backend, events: Events | None = None) -> None:
        self.step = 0
        self.bytes: Counter[str] = Counter()
        self._backend, self._events = backend, events or to_stderr
        self._timeout = placement.timeout
        self._places = {
            pool: [place for place in places_of(placement.pools) if place.pool == pool] for pool in placement.pools
        }
        self._groups: dict[str, WorkerGroup] = {}
        self._calls: dict[int, Future] = {}
        self._owed: Counter[Place] = Counter()  # replies that are due
        self._waiting: dict[Place, float] = {}  # places that owe a reply, and since when they are quiet
        self._ids = 0
        self._ended: UserError | None = None
        everyone = [place for places in self._places.values() for place in places]
        try:
            for warning in backend.check(everyone):
                self._events("warning", warning)
            backend.start(everyone)
        except BaseException:
            backend.kill()
            raise

    def group(
        self, name: str, cls: type, pool: str, *args: Any, mesh: Mapping[str, int] | None = None, **kwargs: Any
    ) -> WorkerGroup:
        """Makes ``cls(context, *args, **kwargs)`` in every process of a pool; returns when all are made.

        Args:
            name: of the group; unique.
            cls: the workers' class; other processes find it by its module's name.
            pool: the pool whose processes get a worker.
            args: for the class.
            mesh: sizes of named dimensions; {"dp": size of the pool} if left out.
            kwargs: for the class.

        Raises:
            UserError: no such pool, or the mesh is of another size; or a worker raised it.
            WorkerFailure: a worker failed.
        """
        if pool not in self._places:
            raise UserError(f"the group {name!r} is to live in pool {pool!r}, which does not exist",
                            fix=nearest(pool, self._places))  # fmt: skip
        size = len(self._places[pool])
        dims = Mesh({"dp": size} if mesh is None else mesh)
        if dims.size != size:
            text = " x ".join(f"{n} {dim}" for dim, n in dims.dims.items())
            raise UserError(
                f"the group {name!r} wants {text} = {dims.size} workers, and pool {pool!r} has {size} processes",
                fix=f"set placement.pools.{pool}={dims.size}, or other degrees",
            )
        assert name not in self._groups, f"there is a group {name!r} already"
        group = self._groups[name] = WorkerGroup(self, name, cls, pool, dims)
        self.send(group, "", [(args, kwargs)] * size, list).result()
        return group

    def send(
        self, group: WorkerGroup, method: str, calls: Sequence[Call | None], join: Callable[[list[Any]], Any]
    ) -> Future:
        """Sends the calls of a group to its ranks; without a method it makes the workers."""
        self._check_alive()
        self._ids += 1
        places = [place for place, call in zip(self._places[group.pool], calls, strict=True) if call is not None]
        future = Future(self, [p.rank for p in places], len(calls), join)
        requests: dict[Any, WorkerCall] = {}
        mail: list[tuple[Place, WorkerCall]] = []
        for place in places:
            call = calls[place.rank]
            assert call is not None
            same = (tuple(id(a) for a in call[0]), tuple((name, id(a)) for name, a in call[1].items()))
            if same not in requests:
                kind: Literal["call", "create"] = "call" if method else "create"
                more = None if method else group.cls
                requests[same] = WorkerCall(self._ids, kind, group.name, method, self.step, call, more)
            mail.append((place, requests[same]))
        if self._backend.passes_exceptions:
            return self._perform(future, mail)
        for _, request in mail:
            self._count(request.call)
            assert request.frames  # a value that cannot be sent is refused before any rank has got its part
        self._calls[self._ids] = future
        for place, request in mail:
            self._owed[place] += 1
            self._waiting.setdefault(place, time.monotonic())
            self._backend.send(place, request)
        return future

    def pump(self, seconds: float) -> None:
        """Takes in what has come from the processes; waits at most this many seconds.

        Raises:
            WorkerFailure: a worker has failed, and all processes have been ended.
            UserError: a worker raised it.
        """
        self._check_alive()
        evidence = Evidence()
        for place, answer in self._backend.receive(seconds):
            self._add(evidence, place, answer)
        if evidence.count():
            raise self._end(evidence)
        if any(time.monotonic() - since > self._timeout for since in self._waiting.values()):
            self._look_for_a_hang()

    def close(self) -> None:
        """Lets all processes finish and end; after a failure there is none left."""
        if self._ended is None:
            self._ended = UserError("the cluster is closed")
            self._backend.close()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self._ended is None:
            self._ended = UserError("the cluster has ended")
            self._backend.kill()  # workers may be in the middle of a call: they are not asked to end
        self.close()

    def _perform(self, future: Future, mail: Sequence[tuple[Place, WorkerCall]]) -> Future:
        """Runs a call inside of this call: its exceptions reach the caller."""
        for place, request in mail:
            self._backend.send(place, request)
            for _, answer in self._backend.receive(0):
                assert isinstance(answer, WorkerReply)
                future.set(place.rank, answer.value)
        return future

    def _take(self, place: Place, answer: WorkerReply) -> None:
        if answer.kind == "where":
            return  # reported too late to matter
        self._count(answer.value)
        if self._calls[answer.id].set(place.rank, answer.value):
            del self._calls[answer.id]
        self._owed[place] -= 1
        if self._owed[place]:
            self._waiting[place] = time.monotonic()
        else:
            del self._waiting[place]

    def _count(self, value: Any) -> None:
        for kind, size in count_bytes(value).items():
            self.bytes[kind] += size

    def _end(self, evidence: Evidence) -> UserError:
        """Ends the attempt after a failure: finds the first cause, ends all processes, and returns the report."""
        self._gather(evidence, GRACE_SECONDS, lambda: evidence.count() == sum(map(len, self._places.values())))
        if not evidence.primary():
            self._ask_where(evidence)
            self._gather(evidence, SEARCH_SECONDS, lambda: evidence.primary() or bool(evidence.apart(self._timeout)))
        return self._report(evidence)

    def _look_for_a_hang(self) -> None:
        """Ends the attempt if a process is quiet for too long and no process of its pool makes progress."""
        evidence = Evidence()
        self._ask_where(evidence)
        for place in list(self._waiting):
            if place in evidence.standing:
                self._waiting[place] = time.monotonic() - evidence.standing[place].idle
        latest: dict[str, float] = {}
        for place, since in self._waiting.items():
            latest[place.pool] = max(since, latest.get(place.pool, since))
        if evidence.count() or any(time.monotonic() - since > self._timeout for since in latest.values()):
            self._gather(evidence, GRACE_SECONDS, evidence.primary)  # collectives run out of time just now, too
            raise self._report(evidence)

    def _ask_where(self, evidence: Evidence) -> None:
        """Asks every process that owes a reply where it stands."""
        for place in self._waiting:
            self._backend.send(place, WorkerCall(0, "where"))

        def silent() -> list[Place]:
            told = evidence.standing.keys() | evidence.failed.keys() | evidence.lost.keys()
            return [place for place in self._waiting if place not in told]

        self._gather(evidence, SEARCH_SECONDS, lambda: not silent())
        failed = {place.pool for place in evidence.failed}
        late = time.monotonic() - self._timeout
        evidence.silent = [p for p in silent() if p.pool in failed or self._waiting[p] < late]

    def _gather(self, evidence: Evidence, seconds: float, enough: Callable[[], bool]) -> None:
        """Takes in what comes, for this many seconds or until it is enough."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and not enough():
            for place, answer in self._backend.receive(0.1):
                self._add(evidence, place, answer)

    def _add(self, evidence: Evidence, place: Place, answer: WorkerReply | Lost) -> None:
        if isinstance(answer, Lost):
            if place not in evidence.failed:
                evidence.lost[place] = answer
                evidence.boxes[place] = self._backend.box(place)
        elif answer.kind == "failed":
            evidence.failed.setdefault(place, answer.value)
        elif answer.kind == "where":
            evidence.standing[place] = answer.value
        else:
            self._take(place, answer)

    def _report(self, evidence: Evidence) -> UserError:
        for place in evidence.silent:
            evidence.boxes[place] = self._backend.box(place)
        report = first_cause(evidence, self._timeout)
        self._ended = report
        self._backend.kill()
        self._events("failure", str(report))
        return report

    def _check_alive(self) -> None:
        if self._ended is not None:
            raise self._ended
