"""An environment as an episode meets it: awaited, limited in time, normalised, and with its answers kept."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import json
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any, TypeAlias

from hybridflow.agents.observations import observation_of
from hybridflow.agents.threads import in_thread
from hybridflow.config.sections.agent import AgentSection
from hybridflow.noise import NoiseKey
from hybridflow.protocols.calls import CallPlace, CallStore
from hybridflow.protocols.environments import Action, Environment, Messages, Observation

WorldMaker: TypeAlias = Callable[["Calls"], Environment | Awaitable[Environment]]


class CallTimeout(TimeoutError):
    """A call took longer than it may."""


class Calls:
    """The calls of one trajectory: runs them within their time, and keeps what they answered.

    Args:
        section: limits.
        key: of the trajectory.
        prompt: the messages of its row; empty where an environment makes them.
        store: keeps answers; None keeps none.
        tell: takes the kind of a failure that people should know of, and its traceback.
        world: the stream of the environment's seed.
    """

    def __init__(
        self,
        section: AgentSection,
        key: NoiseKey,
        prompt: Messages,
        store: CallStore | None,
        tell: Callable[[str, str], None] = lambda kind, text: None,
        world: str = "environment",
    ) -> None:
        self.section, self.key, self.prompt, self.store, self.tell = section, key, prompt, store, tell
        self._stream = f"{world}/{key.stream}"
        self._asked = ""
        # In processes a call has its time from when it begins there, and waits for its turn before.
        self.seconds = None if section.processes else section.call_timeout
        self.turn = 0
        self.counts: defaultdict[str, float] = defaultdict(float)

    def given(self, *what: Any) -> None:
        """Takes what the environment is given next; only answers to exactly this are found."""
        text = json.dumps([self._asked, *what], default=str, skipkeys=True)
        self._asked = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()

    def place(self, number: int) -> CallPlace:
        """Returns the place of a call of the current turn."""
        return CallPlace(self._stream, self.key.draw, self.key.sample, self.turn, number, self._asked)

    def kept(self, number: int) -> dict[str, Any] | None:
        """Returns the answer that was kept for a call of the current turn."""
        return None if self.store is None else self.store.find(self.place(number))

    def keep(self, number: int, answer: dict[str, Any]) -> None:
        """Keeps an answer, unless one is kept already."""
        if self.store is not None and self.store.find(self.place(number)) is None:
            self.store.add(self.place(number), answer)

    async def run(self, function: Callable[..., Any], *args: Any, seconds: float | None, counted: bool = True) -> Any:
        """Runs a function, plain or async, or a plain one that returns an awaitable.

        Args:
            function: what to run.
            args: its arguments.
            seconds: that it may take; None: no limit.
            counted: whether its seconds are those of tools; what calls tools by itself counts each of them.

        Raises:
            CallTimeout: it took longer; a plain function then runs on in its thread, and nobody waits for it.
        """
        began = time.perf_counter()
        try:
            async with asyncio.timeout(seconds) as limit:
                is_async = inspect.iscoroutinefunction(function)
                value = await (function(*args) if is_async else in_thread(function, *args))
                return await value if inspect.isawaitable(value) else value
        except (SystemExit, KeyboardInterrupt) as error:  # of async code: either would end the event loop
            raise RuntimeError(f"it raised {type(error).__name__} {error}".rstrip()) from error
        except TimeoutError as error:
            if not limit.expired():  # the function's own
                raise
            name = getattr(function, "__qualname__", type(function).__name__)
            raise CallTimeout(f"{name} took longer than {seconds:g} seconds (agent.call_timeout)") from error
        finally:
            self.counts["seconds/tool_calls"] += counted * (time.perf_counter() - began)


class JournaledWorld:
    """A `World` over a user's environment.

    Args:
        make: makes the environment.
        calls: of the trajectory.
    """

    def __init__(self, make: WorldMaker, calls: Calls) -> None:
        self.make, self.calls = make, calls
        # A set of tools limits each of its calls by itself.
        self.seconds = None if calls.section.tools else calls.seconds
        self.counted = not calls.section.tools
        self.environment: Environment | None = None

    @property
    def counts(self) -> dict[str, float]:
        """What was counted: see `Trajectory.counts`."""
        return self.calls.counts

    async def reset(self, row: dict[str, Any], seed: int) -> Observation:
        """See `Environment.reset`."""
        self.environment = await self.calls.run(self.make, self.calls, seconds=self.calls.seconds)
        assert self.environment is not None
        self.calls.given(row, seed)
        return await self._answer(self.environment.reset, row, seed)

    async def step(self, action: Action) -> Observation:
        """See `Environment.step`."""
        assert self.environment is not None, "a loop calls reset first"
        self.calls.turn += 1
        self.calls.given(action.text, [(call.name, call.arguments) for call in action.calls])
        return await self._answer(self.environment.step, action)

    async def _answer(self, method: Callable[..., Any], *args: Any) -> Observation:
        """Calls the environment, and returns the answer that was kept, where there is one: the model has seen it."""
        turn = f" after turn {self.calls.turn}" if self.calls.turn else ""
        where = f"{type(self.environment).__name__}.{method.__name__}{turn}"
        found = observation_of(await self.calls.run(method, *args, seconds=self.seconds, counted=self.counted), where)
        kept = self.calls.kept(-1)
        if kept is not None:
            return Observation(**kept)
        self.calls.keep(-1, asdict(found))
        return found

    async def close(self) -> None:
        """See `Environment.close`."""
        if self.environment is not None:
            environment, self.environment = self.environment, None
            await self.calls.run(environment.close, seconds=self.calls.seconds)
