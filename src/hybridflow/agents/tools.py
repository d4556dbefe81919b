"""Tools that are Python functions or methods, and the environment that a set of tools is."""

from __future__ import annotations

import asyncio
import functools
import inspect
import json
import math
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pydantic_core import to_jsonable_python

from hybridflow.agents.processes import CallRaised, HostPool, ProcessDied, RemoteObject
from hybridflow.agents.schemas import Described, WrongArguments, described
from hybridflow.agents.world import Calls, CallTimeout
from hybridflow.config.locate import load_function
from hybridflow.errors import UserError, nearest
from hybridflow.protocols.environments import (
    Action,
    Messages,
    Observation,
    Tool,
    ToolCall,
    ToolResult,
    mark_of,
)

_OFFERED = ("row", "seed")  # what a class of tools may ask for when it is made


@dataclass(frozen=True, slots=True)
class ToolClass:
    """A class whose methods are tools; each trajectory has an object of its own.

    Args:
        kind: the class.
        methods: the tools, by the names of the methods.
        wants: which of row and seed it is made with.
    """

    kind: type
    methods: Mapping[str, Described]
    wants: tuple[str, ...]

    def make(self, row: dict[str, Any], seed: int) -> Any:
        """Makes the object of a trajectory."""
        return self.kind(**self.given(row, seed))

    def given(self, row: dict[str, Any], seed: int) -> dict[str, Any]:
        """Returns what an object is made with."""
        offered = {"row": row, "seed": seed}
        return {name: offered[name] for name in self.wants}

    def tools(self, made: Any) -> list[Tool]:
        """Returns the tools of an object."""
        return [_tool(getattr(made, name), found, self.stateful(name)) for name, found in self.methods.items()]

    def stateful(self, name: str) -> bool:
        """Returns whether a method depends on earlier calls: yes, unless its mark says otherwise."""
        return _stateful(getattr(self.kind, name), default=True)


@dataclass(frozen=True, slots=True)
class Toolbox:
    """All tools of a run, in the order in which prompts list them.

    Args:
        parts: tools that are functions, and classes of tools.
    """

    parts: tuple[Tool | ToolClass, ...]

    @property
    def schemas(self) -> list[Mapping[str, Any]]:
        """What the model is shown of the tools."""
        return [schema for part in self.parts for schema in _schemas(part)]


def toolbox(sources: Sequence[tuple[str, Any]]) -> Toolbox:
    """Puts tools together.

    Args:
        sources: (where it is from, function or class).

    Raises:
        UserError: one cannot be described to the model, or two have one name.
    """
    parts: list[Tool | ToolClass] = []
    places: dict[str, str] = {}
    for place, source in sources:
        part = tool_class(source) if inspect.isclass(source) else tool_of(source)
        for schema in _schemas(part):
            name = schema["function"]["name"]
            if name in places:
                raise UserError(
                    f"two tools are called {name}: one of {places[name]}, one of {place}",
                    why="a model calls a tool by its name",
                    fix="rename one of the functions",
                )
            places[name] = place
        parts.append(part)
    return Toolbox(tuple(parts))


def _schemas(part: Tool | ToolClass) -> list[Mapping[str, Any]]:
    return [found.schema for found in part.methods.values()] if isinstance(part, ToolClass) else [part.schema]


def tool_of(function: Callable[..., Any]) -> Tool:
    """Makes a tool of a function: its schema is read from signature and docstring.

    Raises:
        UserError: it cannot be described to a model.
    """
    if not callable(function):
        raise UserError(
            f"a tool is a {type(function).__name__}, and not a function",
            fix="give functions, or a class whose methods are marked with @hf.tool",
        )
    inner = function
    while isinstance(inner, functools.partial):
        inner = inner.func
    name = str(getattr(inner, "__name__", type(inner).__name__))
    return _tool(function, described(function, name), _stateful(function, default=False))


def remote_tool(function: Callable[..., Any], reference: str, pool: HostPool) -> Tool:
    """Makes a tool of a function that runs in a process.

    Args:
        function: as it is here: its schema is read, and its arguments are checked.
        reference: ``file.py:function``.
        pool: of the processes.
    """

    async def run(**arguments: Any) -> Any:
        return await pool.function(reference, arguments)

    local = tool_of(function)
    return _tool(run, described(function, local.name), local.stateful)


@dataclass(frozen=True, slots=True)
class RemoteToolClass(ToolClass):
    """A class of tools whose objects are in processes.

    Args:
        reference: ``file.py:Class``.
        pool: of the processes.
    """

    reference: str = ""
    pool: HostPool | None = None

    def make(self, row: dict[str, Any], seed: int) -> RemoteObject:
        """See `ToolClass.make`."""
        assert self.pool is not None
        return self.pool.object(self.reference, self.given(row, seed))

    def tools(self, made: RemoteObject) -> list[Tool]:
        """See `ToolClass.tools`."""

        def method(name: str) -> Callable[..., Any]:
            async def run(**arguments: Any) -> Any:
                return await made.call(name, **arguments)

            return run

        return [_tool(method(name), found, self.stateful(name)) for name, found in self.methods.items()]


def in_processes(box: Toolbox, references: Sequence[str], pool: HostPool) -> Toolbox:
    """Returns the same tools, run in processes.

    Args:
        box: the tools as they are here.
        references: of each part.
        pool: of the processes.
    """
    parts: list[Tool | ToolClass] = []
    for part, reference in zip(box.parts, references):
        if isinstance(part, ToolClass):
            parts.append(RemoteToolClass(part.kind, part.methods, part.wants, reference, pool))
        else:
            parts.append(remote_tool(load_function(reference), reference, pool))
    return Toolbox(tuple(parts))


def _stateful(function: Any, *, default: bool) -> bool:
    mark = mark_of(function)
    return default if mark is None or mark.stateful is None else mark.stateful


def tool_class(kind: type) -> ToolClass:
    """Describes the tools of a class: its methods that `tool` marks.

    Raises:
        UserError: it has none, one cannot be described, or nothing can make it.
    """
    methods: dict[str, Described] = {}
    for owner in reversed(kind.__mro__):
        for name, value in vars(owner).items():
            if mark_of(value) is not None and getattr(kind, name) is not None:
                methods[name] = described(getattr(kind, name), name, method=inspect.isfunction(value))
    if not methods:
        raise UserError(
            f"the class {kind.__name__} has no tools",
            why="of a class those methods are tools that are marked",
            fix="write @hf.tool above each method that the model may call (import hybridflow as hf)",
        )
    parameters = inspect.signature(kind).parameters
    named = [p for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    asked = [p.name for p in named if p.default is p.empty and p.name not in _OFFERED]
    if asked:
        raise UserError(
            f"the class of tools {kind.__name__} is made with {', '.join(asked)}, which nothing gives",
            why="an object of it is made for each trajectory",
            fix="take nothing, or any of `row` (of the data) and `seed`, or give the arguments defaults",
        )
    return ToolClass(kind, methods, tuple(p.name for p in named if p.name in _OFFERED))


def _tool(function: Callable[..., Any], found: Described, stateful: bool) -> Tool:
    def run(given: Mapping[str, Any]) -> Any:
        try:
            arguments = found.cast(given)
        except WrongArguments as error:
            return ToolResult(f"Error: wrong arguments: {error}", error="arguments")
        return function(**arguments)

    async def run_async(given: Mapping[str, Any]) -> Any:
        answer = run(given)
        return await answer if inspect.isawaitable(answer) else answer

    called = function if inspect.isroutine(function) or isinstance(function, functools.partial) else function.__call__  # type: ignore[operator]
    return Tool(found.name, found.schema, run_async if inspect.iscoroutinefunction(called) else run, stateful)


def result_of(value: Any, name: str = "tool") -> ToolResult:
    """Makes the answer of a tool of what its function returned: a text is shown as it is, anything else as JSON.

    Args:
        value: what it returned.
        name: of the tool.

    Raises:
        UserError: its reward is no number, or its text no text.
    """
    if not isinstance(value, ToolResult):
        plain = value if isinstance(value, str) else to_jsonable_python(value, fallback=str, bytes_mode="base64")
        return ToolResult(plain if isinstance(plain, str) else json.dumps(plain, ensure_ascii=False))
    if not isinstance(value.text, str):
        raise UserError(f"the tool {name} returned a ToolResult whose text is {value.text!r}", fix="give it a text")
    reward = value.reward
    if reward is not None and not (isinstance(reward, int | float) and math.isfinite(reward)):
        raise UserError(
            f"the tool {name} returned the reward {reward!r}",
            why="a reward is a finite number, or None where there is none",
            fix="return ToolResult(text, reward=number)",
        )
    return value


class ToolSet:
    """The environment that a set of tools is: it answers calls, and is done when a turn has none.

    Args:
        box: the tools.
        calls: runs and keeps the calls of this trajectory.
    """

    def __init__(self, box: Toolbox, calls: Calls) -> None:
        self.box, self.calls = box, calls
        self.tools: dict[str, Tool] = {}
        self._made: list[Any] = []
        self._slots = asyncio.Semaphore(calls.section.parallel_calls)

    async def reset(self, row: dict[str, Any], seed: int) -> Observation:
        """See `Environment.reset`: the prompt is the row's. Objects of classes of tools are made."""
        for part in self.box.parts:
            tools = [part] if isinstance(part, Tool) else await self._object(part, row, seed)
            self.tools |= {found.name: found for found in tools}
        return Observation(list(self.calls.prompt))

    async def _object(self, part: ToolClass, row: dict[str, Any], seed: int) -> list[Tool]:
        made = await self.calls.run(part.make, row, seed, seconds=self.calls.seconds)
        self._made.append(made)
        return part.tools(made)

    async def step(self, action: Action) -> Observation:
        """See `Environment.step`: answers every call of the turn, in their order.

        Calls of stateless tools run at the same time. Those of stateful tools run one after the other, so that their
        state does not depend on which of them is faster.
        """
        if not action.calls:
            return Observation([], done=True)
        ordered, alone = list[int](), list[int]()
        for i, call in enumerate(action.calls):
            found = self.tools.get(call.name)
            (ordered if found is not None and found.stateful else alone).append(i)
        results: dict[int, ToolResult] = {}

        async def answer(numbers: Sequence[int]) -> None:
            for i in numbers:
                results[i] = await self._answer(i, action.calls[i])

        await asyncio.gather(answer(ordered), *(answer([i]) for i in alone))
        found_all = [results[i] for i in range(len(action.calls))]
        rewards = [result.reward for result in found_all if result.reward is not None]
        messages: Messages = [
            {"role": "tool", "tool_call_id": call.id, "name": call.name, "content": result.text}
            for call, result in zip(action.calls, found_all)
        ]
        return Observation(messages, reward=sum(rewards) if rewards else None)

    async def close(self) -> None:
        """See `Environment.close`: closes the objects that have a method `close`."""
        for closing in _closing(self._made):
            await self.calls.run(closing, seconds=self.calls.seconds)

    async def _answer(self, number: int, call: ToolCall) -> ToolResult:
        """Answers a call; one that was answered before the run was resumed gets that answer."""
        self.calls.counts[f"calls/{call.name if call.name in self.tools else 'unknown'}"] += 1
        found = self.tools.get(call.name)
        kept = self.calls.kept(number)
        if kept is None or (found is not None and found.stateful):
            async with self._slots:
                result = await self._run(found, call)
        if kept is not None:  # where the call was made again, for its state, the model has seen the first answer
            result = ToolResult(**kept)
        else:
            self.calls.keep(number, asdict(result))
            if result.detail:
                shown = f"the tool {call.name} raised; the model was shown {result.text[:200]!r}"
                self.calls.tell(f"tool {call.name}", f"{shown}:\n{result.detail.rstrip()}")
        if result.error:
            self.calls.counts[f"errors/{result.error}"] += 1
        return result

    async def _run(self, found: Tool | None, call: ToolCall) -> ToolResult:
        """Runs a call; a mistake of the model, or of the tool, is an answer."""
        if call.error:
            return ToolResult(f"Error: {call.error}", error="format")
        if found is None:
            hint = nearest(call.name, self.tools)
            return ToolResult(f"Error: there is no tool {call.name!r}; {hint}", error="unknown")
        try:
            value = await self.calls.run(found.run, call.arguments, seconds=self.calls.seconds)
        except CallTimeout:
            seconds = self.calls.section.call_timeout
            return ToolResult(f"Error: {call.name} took longer than {seconds:g} seconds", error="timeout")
        except ProcessDied:
            raise
        except Exception as error:
            return _raised(error)
        return result_of(value, call.name)


def _raised(error: Exception) -> ToolResult:
    """Returns the answer to a call whose tool raised: the model sees the error, and people its traceback."""
    said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if isinstance(error, CallRaised):
        said = str(error)
    return ToolResult(f"Error: {said}", error="raised", detail="".join(traceback.format_exception(error)))


def _closing(made: Sequence[Any]) -> Iterator[Callable[[], Any]]:
    for one in made:
        closing = getattr(one, "close", None)
        if callable(closing):
            yield closing
