"""Formats of tool calls: from the text of a turn to calls, and back. Pure functions on text.

The text of a turn is decoded with special tokens, because several formats write their markers as such.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from hybridflow.chat.shapes import THOUGHT_BEGINS, THOUGHT_ENDS


@dataclass(frozen=True, slots=True)
class WrittenCall:
    """A call as it stands in a text.

    Args:
        name: the tool's name; "" where none could be read.
        arguments: by name.
        error: why the call could not be read; "" where it could.
    """

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    error: str = ""


class CallFormat(Protocol):
    """A way in which models write calls of tools."""

    def parse(self, text: str) -> tuple[str, list[WrittenCall]]:
        """Returns the text without its calls, and the calls, in order."""
        ...

    def render(self, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
        """Returns how a model writes calls, each a (name, arguments) pair."""
        ...


class Hermes:
    """Writes calls as Qwen2.5, Qwen3 and Hermes do: ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``.

    A call whose tag is never closed counts, as vLLM's parser of the same name has it: a stop token may stand for it.
    """

    BEGIN, END = "<tool_call>", "</tool_call>"

    def parse(self, text: str) -> tuple[str, list[WrittenCall]]:
        """See `CallFormat.parse`. Text behind the first call belongs to no message, and is left out."""
        content, begin, rest = text.partition(self.BEGIN)
        calls = []
        while begin:
            call, rest = self._next(rest)
            calls.append(call)
            _, begin, rest = rest.partition(self.BEGIN)
        return content.rstrip() if calls else content, calls

    def render(self, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
        """See `CallFormat.render`."""
        bodies = (
            json.dumps({"name": name, "arguments": dict(arguments)}, ensure_ascii=False) for name, arguments in calls
        )
        return "\n".join(f"{self.BEGIN}\n{body}\n{self.END}" for body in bodies)

    def _next(self, text: str) -> tuple[WrittenCall, str]:
        """Returns the call behind an opening tag, and the text behind the call. The closing tag may stand in a text of
        the arguments.
        """
        try:
            value, end = _DECODER.raw_decode(text.lstrip())
            rest = text.lstrip()[end:].lstrip()
            if not rest or rest.startswith((self.BEGIN, self.END)):
                return _of_value(value), rest
        except (ValueError, RecursionError):
            pass
        body, _, rest = text.partition(self.END)
        return _of_json(body.strip()), rest


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse)


def _of_json(text: str) -> WrittenCall:
    try:
        return _of_value(_DECODER.decode(text))
    except (ValueError, RecursionError) as error:
        return WrittenCall("", error=f"the call is no valid JSON: {error or type(error).__name__}")


def _of_value(value: object) -> WrittenCall:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        return WrittenCall("", error='the call has no "name": write {"name": ..., "arguments": {...}}')
    arguments = value.get("arguments")
    if isinstance(arguments, str) and arguments.strip():  # JSON in JSON, as some models learned it
        try:
            arguments = _DECODER.decode(arguments)
        except (ValueError, RecursionError) as error:
            return WrittenCall(value["name"], error=f"the arguments are no valid JSON: {error}")
    if arguments is None or arguments == "":  # a tool without arguments
        arguments = {}
    if not isinstance(arguments, dict):
        return WrittenCall(value["name"], error='the "arguments" of a call are an object: {"name": value, ...}')
    return WrittenCall(value["name"], arguments)


def read_turn(text: str, format: CallFormat) -> tuple[str, list[WrittenCall]]:
    """Returns the text of a turn without its calls, and the calls. What stands in a thought is no call, and a thought
    that was cut has none behind it.

    Args:
        text: of the turn, with special tokens.
        format: how calls are written.
    """
    thought, closing, said = text.rpartition(THOUGHT_ENDS)
    if THOUGHT_BEGINS in said:  # a thought that was cut
        return text, []
    content, calls = format.parse(said)
    return thought + closing + (
        content if content.strip() or not calls else said[: len(said) - len(said.lstrip())]
    ), calls


def message_of(text: str, format: CallFormat, ids: Sequence[str]) -> dict[str, Any]:
    """Returns a turn as a message of the assistant, in OpenAI's form.

    Where a call cannot be read, the message has the text as it was written: a template could not show the call.

    Args:
        text: of the turn, with special tokens but for the one that ends it.
        format: how calls are written.
        ids: of the calls.
    """
    content, calls = read_turn(text, format)
    if not calls or any(call.error for call in calls):
        return {"role": "assistant", "content": text}
    functions = ({"name": call.name, "arguments": call.arguments} for call in calls)
    made = [{"id": id, "type": "function", "function": f} for id, f in zip(ids, functions, strict=True)]
    return {"role": "assistant", "content": content, "tool_calls": made}


FORMATS: dict[str, CallFormat] = {"hermes": Hermes()}
