"""What `served/engine.py` and the code for each engine share: a replica, its requests, its replies."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from hybridflow.protocols.generation import Request
from hybridflow.protocols.weights import Receipt
from hybridflow.rollout.job import Job

T = TypeVar("T")


class ReplicaLost(Exception):
    """A replica cannot answer any more; the message gives the reason, as in "replica 0 has ...": "died ..."."""


class ReplicaFailed(Exception):
    """A replica reported an error of its own."""


@dataclass(slots=True)
class Piece:
    """An engine's reply to one call.

    Args:
        tokens: new tokens.
        logps: their log-probabilities, see `Result.logps`.
        reason: "abort" where the engine was asked to stop.
        versions: (weight version, index in `tokens` of the first one sampled under it), in order; None: all under the
            version that the engine had when it was asked.
        supports: for each token the ids that could have been sampled, empty for all of them; None where nothing was
            cut, or the engine does not report it.
    """

    tokens: list[int]
    logps: list[float]
    reason: Literal["stop", "length", "abort"]
    versions: list[tuple[int, int]] | None = None
    supports: list[list[int]] | None = None


@dataclass(eq=False, slots=True)
class Flight:
    """A job in flight.

    Args:
        job: the job.
        task: sends it and takes its replies.
        out: whether it is with the engine now.
        aborting: whether its end was asked for.
    """

    job: Job
    task: asyncio.Task[None] | None = None
    out: bool = False
    aborting: bool = False


@dataclass(eq=False, slots=True)
class Replica:
    """One engine that generates.

    Args:
        name: how messages call it.
        state: what the subclass keeps: its process, its address.
        restarts: how often it was started again.
        flights: its jobs in flight.
        up: whether it answers.
        current: whether it has the current weights.
        answered: set by every reply.
        said: its last error: it is reported once, not for every request.
        watch: the task that checks whether it is silent.
        recovery: the task that starts it again.
    """

    name: str
    state: Any = None
    restarts: int = 0
    flights: set[Flight] = field(default_factory=set)
    up: asyncio.Event = field(default_factory=asyncio.Event)
    current: asyncio.Event = field(default_factory=asyncio.Event)
    answered: asyncio.Event = field(default_factory=asyncio.Event)
    said: str = ""
    watch: asyncio.Task[None] | None = None
    recovery: asyncio.Task[None] | None = None

    def load(self) -> int:
        """Returns an upper bound of the tokens that it has still to read or to generate."""
        return sum(flight.job.limit() - len(flight.job.tokens) for flight in self.flights)


class Hooks(ABC):
    """The calls to one kind of engine, for `engine.AsyncEngine`.

    All but `_check` and `_hosts` run in the thread of its loop, and must not block it. They raise `ReplicaLost` when
    the replica cannot answer any more, `ReplicaFailed` when it reported an error of its own (the request is sent again,
    a few times), and UserError for what the user must mend.
    """

    @abstractmethod
    def _check(self, request: Request) -> None:
        """Raises the UserError of a request that can never run. In the caller's thread."""

    @abstractmethod
    async def _start(self, replica: Replica) -> None:
        """Returns when the replica can answer. Checks a replica that this run did not start."""

    @abstractmethod
    async def _end(self, replica: Replica) -> None:
        """Ends it by force, whatever its state."""

    @abstractmethod
    async def _generate(self, replica: Replica, job: Job) -> Piece:
        """Sends a job from its current token (`Job.context`, `Job.left`, `Job.seed`); returns the engine's reply.

        A piece with reason "abort" that was not asked for is kept, and the job continues after it as soon as the engine
        may generate: an engine that can only pause by aborting needs nothing more.
        """

    @abstractmethod
    async def _abort(self, replica: Replica, jobs: list[Job]) -> None:
        """Makes the engine end jobs; their `_generate` then returns the part done."""

    @abstractmethod
    async def _pause(self, replica: Replica) -> None:
        """Stops generating: calls of `_generate` that are out stay out, or return with "abort"."""

    @abstractmethod
    async def _resume(self, replica: Replica) -> None:
        """Resumes generation."""

    @abstractmethod
    async def _take_weights(self, replica: Replica, address: str, first: int, version: int) -> list[Receipt]:
        """Makes the replica's processes take the stream that is sent at an address, and drop state of older weights.

        The replica is paused if something is in flight. From its end on it samples from the new version.

        Args:
            replica: which.
            address: of the sender.
            first: which receiver the first of its processes is; the others follow.
            version: of the weights.
        """

    @abstractmethod
    async def _ping(self, replica: Replica) -> None:
        """Returns as soon as the engine itself, not just the process in front of it, has answered."""

    @abstractmethod
    async def _sleep(self, replica: Replica) -> None:
        """Frees memory; nothing is in flight."""

    @abstractmethod
    async def _wake(self, replica: Replica) -> None:
        """Takes memory again."""

    @abstractmethod
    def _hosts(self, replica: Replica) -> list[str]:
        """Returns the host of each of its processes that take weights, in order."""


def cost_of(jobs: list[Job]) -> int:
    """Returns how many tokens jobs with one prompt read and generate at most: the prompt once."""
    return len(jobs[0].request.prompt_ids) + sum(job.room for job in jobs)


def why_lost(error: Exception, timeout: float) -> str:
    """Returns the reason that a replica is lost, from an error."""
    return f"was silent for {timeout:g} s" if isinstance(error, TimeoutError) else str(error)


async def all_of(work: list[Coroutine[Any, Any, T]]) -> list[T]:
    """Returns the results of all; when one fails, raises its error after the others have ended."""
    results = await asyncio.gather(*work, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results  # type: ignore[return-value]
