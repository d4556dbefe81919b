"""Formats of tool calls: from the text of a turn to calls, and back. Pure functions on text.

The text of a turn is decoded with special tokens, because several formats write their markers as such.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


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

    _CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)

    def parse(self, text: str) -> tuple[str, list[WrittenCall]]:
        """See `CallFormat.parse`. Text behind the first call belongs to no message, and is left out."""
        found = list(self._CALL.finditer(text))
        content = text[: found[0].start()] if found else text
        return content.rstrip() if found else content, [_of_json(match[1].strip()) for match in found]

    def render(self, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
        """See `CallFormat.render`."""
        bodies = (
            json.dumps({"name": name, "arguments": dict(arguments)}, ensure_ascii=False) for name, arguments in calls
        )
        return "\n".join(f"<tool_call>\n{body}\n</tool_call>" for body in bodies)


def _of_json(text: str) -> WrittenCall:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        return WrittenCall("", error=f"the call is no valid JSON: {error}")
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return WrittenCall("", error='the call has no "name": write {"name": ..., "arguments": {...}}')
    arguments = value.get("arguments", {})
    if isinstance(arguments, str):  # JSON in JSON, as some models learned it
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            return WrittenCall(value["name"], error=f"the arguments are no valid JSON: {error}")
    if not isinstance(arguments, dict):
        return WrittenCall(value["name"], error='the "arguments" of a call are an object, {"name": value, ...}')
    return WrittenCall(value["name"], arguments)


FORMATS: dict[str, CallFormat] = {"hermes": Hermes()}
