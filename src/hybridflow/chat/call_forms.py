"""How chat templates want the assistant's calls of tools: templates differ in it, messages here do not.

A message with calls has ``"tool_calls": [{"type": "function", "function": {"name": ..., "arguments": {...}}}]``.
Some templates want the arguments as JSON text, and some no content beside calls.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Literal

from hybridflow.chat.messages import Messages, arguments_of

CallForm = Literal["object", "text", "text without content"]
FORMS: tuple[CallForm, ...] = ("object", "text", "text without content")
_NAME, _ARGUMENT = "sentinelname", "sentinelvalue"


def in_form(messages: Messages, form: CallForm) -> Messages:
    """Returns messages with the assistant's calls in the form that a template wants; the others are the same objects.

    Args:
        messages: the conversation.
        form: "object": arguments are an object; "text": JSON text; "text without content": JSON text, and an empty
            content is None.
    """
    return [_message(message, form) if message.get("tool_calls") else message for message in messages]


def find_form(render: Callable[[Messages, CallForm], str]) -> CallForm | None:
    """Returns the first form in which a template shows name and arguments of a call; None where it shows no calls.

    Args:
        render: messages in a form to text; it may raise anything for messages that the template cannot render.
    """
    function = {"name": _NAME, "arguments": {"key": _ARGUMENT}}
    turn = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
    for form in FORMS:
        try:
            text = render(in_form([{"role": "user", "content": "question"}, turn], form), form)
        except Exception:  # templates are programs, and this asks only whether one renders such a message
            continue
        if _NAME in text and _ARGUMENT in text:
            return form
    return None


def _message(message: Mapping[str, Any], form: CallForm) -> dict[str, Any]:
    content = message.get("content")
    if form == "text without content" and not content:
        content = None
    calls = [_call(call, form) for call in message["tool_calls"]]
    return {**message, "content": content, "tool_calls": calls}


def _call(call: Mapping[str, Any], form: CallForm) -> dict[str, Any]:
    function = dict(call.get("function") or call)
    arguments = arguments_of(function)
    if form != "object" and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    rest = {key: value for key, value in call.items() if key not in ("function", "name", "arguments")}
    return {"type": "function", **rest, "function": {**function, "arguments": arguments}}
