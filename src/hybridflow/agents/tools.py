"""Tools that are Python functions, and the environment that a set of tools is."""

from __future__ import annotations

import asyncio
import inspect
import json
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

import pydantic
from transformers.utils.chat_template_utils import DocstringParsingException, TypeHintParsingException, get_json_schema

from hybridflow.agents.world import Calls
from hybridflow.errors import UserError, nearest
from hybridflow.protocols.environments import Action, Messages, Observation, Tool, ToolCall, ToolResult

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])
_STATEFUL = "__hybridflow_stateful__"


def tool(*, stateful: bool = False) -> Callable[[FunctionT], FunctionT]:
    """Marks a function as a tool, or a method of a class of tools.

    Args:
        stateful: whether its answer depends on earlier calls of the same trajectory. Answers of other tools are kept:
            a call that was answered is not made again when a run resumes.
    """

    def mark(function: FunctionT) -> FunctionT:
        setattr(function, _STATEFUL, stateful)
        return function

    return mark


def tool_of(function: Callable[..., Any]) -> Tool:
    """Makes a tool of a function: its schema is read from signature and docstring.

    Raises:
        UserError: an argument has no annotation or no description.
    """
    name = getattr(function, "__name__", type(function).__name__)
    try:
        schema = get_json_schema(function)
    except (DocstringParsingException, TypeHintParsingException, ValueError) as error:
        raise UserError(
            f"the tool {name} cannot be described to the model: {error}",
            why="its schema is made of the annotations of its arguments and of its docstring",
            fix="annotate each argument, and describe it in a section `Args:` of the docstring",
        ) from error
    schema["function"].pop("return", None)
    fields: dict[str, Any] = {
        p.name: (p.annotation, ... if p.default is p.empty else p.default)
        for p in inspect.signature(function, eval_str=True).parameters.values()
    }
    model = pydantic.create_model(name, __config__=pydantic.ConfigDict(extra="forbid"), **fields)

    def cast(given: Mapping[str, Any]) -> dict[str, Any]:
        checked = model.model_validate(dict(given))
        return {field: getattr(checked, field) for field in given}

    def run(given: Mapping[str, Any]) -> ToolResult:
        return result_of(function(**cast(given)))

    async def run_async(given: Mapping[str, Any]) -> ToolResult:
        return result_of(await function(**cast(given)))

    chosen = run_async if inspect.iscoroutinefunction(function) else run
    return Tool(name, schema, chosen, getattr(function, _STATEFUL, False))


def result_of(value: Any) -> ToolResult:
    """Makes the answer of a tool of what its function returned: a text is shown as it is, anything else as JSON."""
    if isinstance(value, ToolResult):
        return value
    return ToolResult(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))


class ToolSet:
    """The environment that a set of tools is: it answers calls, and is done when a turn has none.

    Args:
        tools: the tools.
        calls: runs and keeps the calls of this trajectory.
    """

    def __init__(self, tools: Sequence[Tool], calls: Calls) -> None:
        self.tools = {tool.name: tool for tool in tools}
        self.calls = calls
        self._slots = asyncio.Semaphore(calls.section.parallel_calls)

    async def reset(self, row: dict[str, Any], seed: int) -> Observation:
        """See `Environment.reset`: the prompt is the row's."""
        return Observation(list(self.calls.prompt))

    async def step(self, action: Action) -> Observation:
        """See `Environment.step`: answers every call of the turn, in their order."""
        if not action.calls:
            return Observation([], done=True)
        found = await asyncio.gather(*(self._answer(i, call) for i, call in enumerate(action.calls)))
        rewards = [result.reward for result in found if result.reward is not None]
        messages: Messages = [
            {"role": "tool", "tool_call_id": call.id, "name": call.name, "content": result.text}
            for call, result in zip(action.calls, found)
        ]
        return Observation(messages, reward=sum(rewards) if rewards else None)

    async def close(self) -> None:
        """See `Environment.close`."""

    async def _answer(self, number: int, call: ToolCall) -> ToolResult:
        """Answers a call; one that was answered before the run was resumed gets that answer."""
        self.calls.counts[f"calls/{call.name if call.name in self.tools else 'unknown'}"] += 1
        found = self.tools.get(call.name)
        kept = self.calls.kept(number)
        if kept is not None and not (found is not None and found.stateful):
            return ToolResult(**kept)
        async with self._slots:
            result = await self._run(found, call)
        if kept is not None:  # the call was made again for its state; the model has seen the first answer
            return ToolResult(**kept)
        if result.error:
            self.calls.counts[f"errors/{result.error}"] += 1
        self.calls.keep(number, asdict(result))
        return result

    async def _run(self, found: Tool | None, call: ToolCall) -> ToolResult:
        """Runs a call; a mistake of the model, or of the tool, is an answer."""
        if call.error:
            return ToolResult(f"Error: {call.error}", error="format")
        if found is None:
            return ToolResult(
                f"Error: there is no tool {call.name!r}; {nearest(call.name, self.tools)}", error="unknown"
            )
        seconds = self.calls.section.call_timeout
        try:
            return result_of(await self.calls.run(found.run, call.arguments, seconds=seconds))
        except pydantic.ValidationError as error:
            told = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            return ToolResult(f"Error: the arguments of {call.name} are wrong: {told}", error="arguments")
        except TimeoutError:
            return ToolResult(f"Error: {call.name} took longer than {seconds:g} seconds", error="timeout")
        except Exception as error:
            detail = "".join(traceback.format_exception(error))
            return ToolResult(f"Error: {type(error).__name__}: {error}", error="raised", detail=detail)
