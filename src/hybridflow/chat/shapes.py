"""The shape of a conversation: what of it decides how a chat template renders it. Templates are tried on stand-ins.

A template looks at roles, at whether there is text, a thought or calls, and at the order of these; the words do not
matter to it. So what it does with a conversation is found once for each shape.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from hybridflow.chat.messages import Messages

THOUGHT_BEGINS, THOUGHT_ENDS = "<think>", "</think>"
_TAGGED = re.compile(r"\A<\w+>.*</\w+>\Z", re.DOTALL)

# role, whether there is text, how it thinks ("", "tags", "end" without the opening tag, "key"), calls (0, 1, 2: more),
# the tag around its text
Shape: TypeAlias = tuple[str, bool, str, int, str]


def shape_of(message: Mapping[str, Any]) -> Shape:
    """Returns the shape of a message."""
    role, content = str(message["role"]), message.get("content") or ""
    if role != "assistant":
        return role, bool(content), "", 0, _tag(content)
    thinks, text = "", content
    if THOUGHT_ENDS in content:
        thinks = "tags" if THOUGHT_BEGINS in content else "end"
        text = content.rpartition(THOUGHT_ENDS)[2]
    elif message.get("reasoning_content"):
        thinks = "key"
    calls = min(len(message.get("tool_calls") or ()), 2)
    return role, bool(text.strip()) or not calls, thinks, calls, ""


def recent(shapes: Sequence[Shape]) -> tuple[Shape, ...]:
    """Returns the shapes of a conversation up to a turn, with each kind of round (a turn of the assistant, and what
    follows it) once, where it came last: so a long conversation has the shape of a short one.
    """
    starts = [i for i, shape in enumerate(shapes) if shape[0] == "assistant"]
    if not starts:
        return tuple(shapes)
    rounds = [tuple(shapes[a:b]) for a, b in zip(starts, [*starts[1:], len(shapes)])]
    last = dict.fromkeys(reversed(rounds))
    return (*shapes[: starts[0]], *(shape for turn in reversed(last) for shape in turn))


def stand_ins(shapes: Sequence[Shape]) -> Messages:
    """Returns messages of these shapes, each with words of its own."""
    messages: Messages = []
    names: list[str] = []  # of the calls that have no answer yet
    for i, shape in enumerate(shapes):
        message = _stand_in(shape, i)
        if message["role"] == "tool":
            name = names.pop(0) if names else call_id(i, 0)
            message |= {"tool_call_id": name, "name": "tool"}
        elif shape[3]:
            names = [call_id(i, number) for number in range(shape[3])]
        messages.append(message)
    return messages


def word(number: int) -> str:
    """Returns the word in the text of a stand-in."""
    return f"word{number}end"


def thought(number: int) -> str:
    """Returns the word in the thought of a stand-in."""
    return f"thought{number}end"


def call_id(number: int, call: int) -> str:
    """Returns the id of a stand-in's call: nine letters and digits, as some templates want."""
    return f"call{number % 1000:03d}{call:02d}"


def argument(number: int, call: int) -> str:
    """Returns the word in the arguments of a stand-in's call."""
    return f"argument{number}of{call}end"


def marked_calls(calls: Sequence[Mapping[str, Any]], number: int) -> list[dict[str, Any]]:
    """Returns calls with the same ids and names, and a word of a stand-in as the only argument of each."""
    marked = []
    for i, call in enumerate(calls):
        name = (call.get("function") or call).get("name", "tool")
        marked.append({**call, "function": {"name": name, "arguments": {"key": argument(number, i)}}})
    return marked


def renamed(tool: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Returns the schema of a tool under another name."""
    return {**tool, "function": {**tool.get("function", {}), "name": name}}


def behind_of(text: str, turn: Mapping[str, Any], number: int) -> str:
    """Returns what stands behind the last of a stand-in's words that the text has; "" where it has none."""
    calls = len(turn.get("tool_calls") or ())
    for last in (argument(number, calls - 1), word(number), thought(number)):
        if last in text:
            return text.partition(last)[2]
    return ""


def _stand_in(shape: Shape, i: int) -> dict[str, Any]:
    role, text, thinks, calls, tag = shape
    content = word(i) if text else ""
    if tag:
        content = f"<{tag}>{content}</{tag}>"
    if thinks in ("tags", "end"):
        opening = f"{THOUGHT_BEGINS}\n" if thinks == "tags" else ""
        content = f"{opening}{thought(i)}\n{THOUGHT_ENDS}\n\n{content}"
    message: dict[str, Any] = {"role": role, "content": content}
    if thinks == "key":
        message["reasoning_content"] = thought(i)
    if calls:
        made = ({"id": call_id(i, n), "type": "function", "function": {"name": "tool"}} for n in range(calls))
        message["tool_calls"] = marked_calls(list(made), i)
    return message


def _tag(content: object) -> str:
    if not isinstance(content, str) or not content.startswith("<") or not _TAGGED.match(content):
        return ""
    return content[1 : content.index(">")]
