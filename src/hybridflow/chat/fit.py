"""Whether a tokenizer's chat template and a format of tool calls fit: found by rendering and parsing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hybridflow.chat.messages import Messages
from hybridflow.chat.shapes import renamed
from hybridflow.chat.template import Style, apply_template, call_form, require_template
from hybridflow.chat.tool_calls import FORMATS, CallFormat
from hybridflow.errors import UserError

_ASKED: Messages = [{"role": "user", "content": "question"}]
_SHOWN = 300  # characters of a rendered turn in a message
_OTHER = "use a model whose template has tools"


def require_fit(tokenizer: PreTrainedTokenizerBase, style: Style, format: str) -> None:
    """Checks that a chat template lists tools, and shows their calls and results, in a format that is read back.

    Args:
        tokenizer: with the template.
        style: how conversations become text, with the tools.
        format: a key of `FORMATS`.

    Raises:
        UserError: what does not fit.
    """
    require_template(tokenizer, style)
    if style.format == "text":
        raise UserError(
            "agent needs data.format=chat, and data.format is text",
            why="turns of the model and what it is answered are messages, which the chat template renders",
            fix="leave data.format at chat",
        )
    if not style.tools:
        return
    for tool in style.tools:
        _require_listed(tokenizer, style, tool)
    name = str(style.tools[0]["function"]["name"])
    arguments = _sample(style.tools[0])
    turn = _turn(name, arguments)
    if call_form(tokenizer, str(tokenizer.chat_template)) is None:
        raise UserError(
            "the chat template shows no calls of tools",
            why="after a call the model would not see what it called, in training or in use",
            fix=f"{_OTHER}, or have an environment answer in messages of the user",
        )
    opened = apply_template(tokenizer, _ASKED, style, add_generation_prompt=True)
    written = apply_template(tokenizer, [*_ASKED, turn], style)
    written = written[len(opened) if written.startswith(opened) else 0 :]
    if not _reads(FORMATS[format], written, name, arguments):
        fitting = [other for other, known in FORMATS.items() if _reads(known, written, name, arguments)]
        raise UserError(
            f"agent.format={format} does not fit the chat template",
            why=f"the template writes a call as {written[-_SHOWN:]!r}, which the format does not read",
            fix=f"set agent.format={fitting[0]}" if fitting else f"known formats: {', '.join(FORMATS)}; {_OTHER}",
        )
    _require_tokens(tokenizer, format, name, arguments)
    _require_result(tokenizer, style, turn)


def _require_listed(tokenizer: PreTrainedTokenizerBase, style: Style, tool: Mapping[str, Any]) -> None:
    name = tool["function"]["name"]
    try:
        text = apply_template(tokenizer, _ASKED, replace(style, tools=(renamed(tool, "toolnameend"),)))
    except (UserError, ValueError, LookupError, AttributeError) as error:
        raise UserError(
            f"the chat template cannot render the tool {name}: {error.__cause__ or error}",
            why=f"its schema is {str(tool['function'])[:_SHOWN]}",
            fix="give it the keys that the template reads: a description, and for each parameter a type and a "
            "description, as a rule",
        ) from error
    if "toolnameend" not in text:
        raise UserError(
            "the chat template does not list tools",
            why=f"the model would not know of {name}",
            fix=f"{_OTHER}, or give it one that renders `tools`",
        )


def _require_tokens(tokenizer: PreTrainedTokenizerBase, format: str, name: str, arguments: Mapping[str, Any]) -> None:
    """Checks that a call can be written in the tokens of the model."""
    text = FORMATS[format].render([(name, arguments)])
    read = str(tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids, skip_special_tokens=False))
    if not _reads(FORMATS[format], read, name, arguments):
        raise UserError(
            f"agent.format={format} does not fit the tokenizer",
            why=f"a call {text!r} becomes {read!r} when it is tokenised and read back",
            fix="use a tokenizer that has tokens for all characters of a call",
        )


def _require_result(tokenizer: PreTrainedTokenizerBase, style: Style, turn: Mapping[str, Any]) -> None:
    result = {"role": "tool", "tool_call_id": "abcdefghi", "name": turn["tool_calls"][0]["function"]["name"]}
    messages = [*_ASKED, dict(turn), {**result, "content": "resultend"}]
    try:
        shown = "resultend" in apply_template(tokenizer, messages, style, add_generation_prompt=True)
    except UserError as error:
        raise UserError(
            "the chat template cannot render the result of a call", why=str(error.__cause__), fix=_OTHER
        ) from error
    if not shown:
        raise UserError(
            "the chat template leaves out the results of calls", why="the model would not see them", fix=_OTHER
        )


def _reads(format: CallFormat, text: str, name: str, arguments: Mapping[str, Any]) -> bool:
    _, calls = format.parse(text)
    return [(call.name, call.arguments, call.error) for call in calls] == [(name, arguments, "")]


def _turn(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    call = {"id": "abcdefghi", "type": "function", "function": {"name": name, "arguments": dict(arguments)}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def _sample(tool: Mapping[str, Any]) -> dict[str, Any]:
    """Returns arguments for a trial: a word for each text, a number for each number; other kinds are left out."""
    words: dict[str, Any] = {"string": "a word", "integer": 2, "number": 1.5, "boolean": True}
    properties = (tool["function"].get("parameters") or {}).get("properties") or {}
    kinds = {key: schema.get("type") for key, schema in properties.items() if isinstance(schema, Mapping)}
    return {key: words[kind] for key, kind in kinds.items() if isinstance(kind, str) and kind in words}
