"""The protocol of environments and tools, and the records of what passes between them and a model.

An environment is everything between two turns of a model: it makes the prompt, takes what the model did, and answers.
A set of tools is one. Implementations live in `agents/`, or in a user's file; this module imports none of them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, TypeVar, overload

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])
Messages: TypeAlias = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool that the model wrote.

    Args:
        id: a name of the call, unique in its trajectory and the same when the trajectory is repeated.
        name: the tool's name, as the model wrote it.
        arguments: by name, as the model wrote them.
        error: why the text of the call could not be read; "" where it could.
    """

    id: str
    name: str
    arguments: dict[str, Any]
    error: str = ""


@dataclass(frozen=True, slots=True)
class Action:
    """What the model did in a turn.

    Args:
        text: all that it wrote, without special tokens.
        calls: the calls in it, in order.
        message: the turn as a message of the assistant, in the form of OpenAI's chat completions.
        finish_reason: see `Turn.finish_reason`.
    """

    text: str
    calls: tuple[ToolCall, ...]
    message: dict[str, Any]
    finish_reason: str


@dataclass(slots=True)
class Observation:
    """What an environment answers.

    Args:
        messages: the messages that the model is shown next; after `reset`, the prompt.
        reward: for the turn before; None: it gives none.
        done: whether the episode has ended.
        anchor: the state, a value that is equal for equal states (GiGPO compares turns that began in one); None:
            unknown.
        info: numbers that the run's metrics show, by name.
    """

    messages: Messages
    reward: float | None = None
    done: bool = False
    anchor: str | int | None = None
    info: dict[str, float] = field(default_factory=dict)


Observed: TypeAlias = Observation | str | Messages  # a text is a message of the user


class Environment(Protocol):
    """A world that a model acts in, for one trajectory. Each method may also be ``async``."""

    def reset(self, row: dict[str, Any], seed: int) -> Observed | Awaitable[Observed]:
        """Begins an episode; the same row and seed begin the same one.

        Args:
            row: the row of the data, or of the environment's own tasks.
            seed: of all its random choices; the same for all samples of a prompt.
        """
        ...

    def step(self, action: Action) -> Observed | Awaitable[Observed]:
        """Takes a turn of the model."""
        ...

    def close(self) -> Awaitable[None] | None:
        """Frees what the episode holds; called once, whatever happened."""
        ...


@dataclass(frozen=True, slots=True)
class ToolResult:
    """The answer of a tool, where it is more than a text.

    Args:
        text: what the model is shown.
        reward: added to the turn's reward; None: it gives none.
        error: the kind of failure, where the call failed ("arguments", "unknown", "raised", "timeout", ...); the text
            then says what the model can do about it. "" where it did not.
        detail: for people (a traceback); the model never sees it.
    """

    text: str
    reward: float | None = None
    error: str = ""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that a model may call.

    Args:
        name: what the model writes to call it.
        schema: its description and parameters, in the form of OpenAI's chat completions
            (``{"type": "function", "function": {...}}``).
        run: takes the arguments as the model wrote them and returns the answer. It raises nothing for a mistake of the
            model.
        stateful: whether an answer depends on earlier calls of the same trajectory. Answers of stateless tools are
            kept, and such calls are never made twice.
    """

    name: str
    schema: Mapping[str, Any]
    run: Callable[[Mapping[str, Any]], ToolResult | Awaitable[ToolResult]]
    stateful: bool = False


TOOL_MARK = "__hybridflow_tool__"


@dataclass(frozen=True, slots=True)
class ToolMark:
    """What `tool` says of a function.

    Args:
        stateful: see `tool`; None where it does not say.
    """

    stateful: bool | None = None


@overload
def tool(function: FunctionT, /) -> FunctionT: ...


@overload
def tool(*, stateful: bool | None = None) -> Callable[[FunctionT], FunctionT]: ...


def tool(function: Any = None, /, *, stateful: bool | None = None) -> Any:
    """Marks a method as a tool of its class, or says of a function that its answers depend on earlier calls.

    Args:
        function: what ``@tool`` stands above; None where it is written with arguments.
        stateful: whether an answer depends on earlier calls of the same trajectory. Answers of stateless tools are
            kept: when a run resumes, a call that was answered is not made again. Unset: methods are stateful, functions
            are not.
    """

    def mark(marked: FunctionT) -> FunctionT:
        setattr(marked, TOOL_MARK, ToolMark(stateful))
        return marked

    return mark if function is None else mark(function)


def mark_of(function: Callable[..., Any]) -> ToolMark | None:
    """Returns what `tool` said of a function; None where it is not marked."""
    found: ToolMark | None = getattr(function, TOOL_MARK, None)
    return found
