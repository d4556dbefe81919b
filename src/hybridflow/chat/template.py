"""Prompts and conversations to tokens, and the mask of those that the assistant wrote."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

from jinja2 import TemplateError
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from hybridflow.chat.call_forms import CallForm, find_form, in_form
from hybridflow.chat.messages import Messages
from hybridflow.chat.shapes import argument, behind_of, marked_calls, renamed, word
from hybridflow.errors import UserError

LossOn = Literal["all_assistant", "last_assistant"]


@dataclass(frozen=True, slots=True)
class Style:
    """The settings with which rows become text: the keys of the same names in ``data``.

    Args:
        format: chat or text.
        system_prompt: put before conversations that have none.
        thinking: the template's switch.
        tools: schemas of the tools that prompts list, in OpenAI's form.
    """

    format: Literal["chat", "text"] = "chat"
    system_prompt: str | None = None
    thinking: bool | None = None
    tools: tuple[Mapping[str, Any], ...] = ()


CHAT = Style()


def as_messages(prompt: str | Messages, style: Style = CHAT) -> Messages:
    """Makes messages of a prompt: a plain string is one message of the user; the style's system prompt comes first,
    unless there is one.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if style.system_prompt is not None and (not messages or messages[0].get("role") not in ("system", "developer")):
        return [{"role": "system", "content": style.system_prompt}, *messages]
    return messages


def require_template(tokenizer: PreTrainedTokenizerBase, style: Style = CHAT) -> None:
    """Raises a UserError if the tokenizer's chat template cannot render what the style asks for."""
    if style.format == "text":
        return
    if not tokenizer.chat_template:
        raise UserError(
            "the tokenizer has no chat template",
            why="prompts are rendered with it, and the model must see in training what it sees in use",
            fix="set chat_template in its tokenizer_config.json, save the tokenizer with one, or set data.format=text",
        )
    if style.thinking is not None and "enable_thinking" not in str(tokenizer.chat_template):
        raise UserError(
            f"data.thinking is {str(style.thinking).lower()}, but the chat template has no such switch",
            why="it does not mention enable_thinking, so the key would change nothing",
            fix="leave data.thinking unset, or use a model whose template has the switch",
        )


def turn_markers(tokenizer: PreTrainedTokenizerBase, style: Style = CHAT) -> tuple[str, ...]:
    """Returns the texts that the chat template writes around turns and no text may hold, and the end of sequence.

    These are special tokens and, for tokenizers that lack them, names in the form of special tokens. Tags of thinking
    and tools are not among them: rows may hold those on purpose.
    """
    if style.format == "text" or not tokenizer.chat_template:
        return ()
    text = ""
    for roles in (("system", "user", "assistant"), ("user", "assistant")):
        with suppress(UserError):  # a template for other conversations gets its own message where a row is rendered
            text += apply_template(tokenizer, _probe(roles), style)
    special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special} | set(_MARKER.findall(text))
    inside = (t for t in special if t in text and not re.search("think|tool|call|reason|answer", t))
    return tuple(sorted({*inside, tokenizer.eos_token or ""} - {""}))


_MARKER = re.compile(r"<\|[^|<>\s]+\|>|<(?:start|end)_of_turn>|\[/INST\]")
SHOWN = {
    "tool_calls",
    "function_call",
    "reasoning_content",
}  # keys of messages that hold text which the model should see


def lost_turn(tokenizer: PreTrainedTokenizerBase, messages: Messages, style: Style = CHAT) -> str | None:
    """Returns what of such messages the chat template leaves out silently; None where it has all.

    It renders the messages with one word in each, and looks for the words. A template may leave out any earlier
    thoughts. A template that refuses such turns is reported where a row is rendered.
    """
    probe = [
        {**message, "content": f"word{i}end" if message["content"].strip() else ""}
        for i, message in enumerate(messages)
    ]
    answered = probe[-1]["role"] == "assistant"
    if answered and "reasoning_content" in probe[-1]:
        probe[-1]["reasoning_content"] = "thoughtend"
    for i, message in enumerate(probe):
        if message.get("tool_calls"):
            message["tool_calls"] = marked_calls(message["tool_calls"], i)
    tools = tuple(renamed(tool, f"tool{i}end") for i, tool in enumerate(style.tools))
    try:
        text = apply_template(tokenizer, probe, replace(style, tools=tools), add_generation_prompt=not answered)
    except UserError:
        return None
    if any(f"tool{i}end" not in text for i, _ in enumerate(tools)):
        return "a list of tools"
    for i, message in enumerate(probe):
        if message["content"] not in text:
            return f"a turn of {message['role']!r}"
        if any(argument(i, number) not in text for number, _ in enumerate(message.get("tool_calls") or ())):
            return "tool calls"
        if message.get("function_call") and "function_call" not in str(tokenizer.chat_template):
            return "tool calls"
    return "a thought (reasoning_content)" if probe[-1].get("reasoning_content", "") not in text else None


def _probe(roles: Sequence[str]) -> Messages:
    return [{"role": role, "content": f"word{i}end"} for i, role in enumerate(roles)]


def apply_template(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, style: Style, *, add_generation_prompt: bool = False
) -> str:
    """Renders messages with the tokenizer's chat template.

    Args:
        tokenizer: its template.
        messages: the conversation; calls of tools are given to the template in the form that it wants.
        style: its switch for thinking, and the tools.
        add_generation_prompt: whether the opening of the assistant's next turn comes last.

    Raises:
        UserError: the template refuses them.
    """
    form: CallForm = "object"
    if any(message.get("tool_calls") for message in messages):
        form = call_form(tokenizer, str(tokenizer.chat_template)) or "object"
        messages = in_form(messages, form)
    try:
        return _rendered(tokenizer, messages, style, form, add_generation_prompt)
    except (TemplateError, TypeError) as error:
        raise UserError(
            f"the chat template refuses the messages {str(messages)[:200]}: {error}",
            fix="give messages with the roles, the order and the keys that the model's template expects",
        ) from error


@lru_cache(maxsize=16)
def call_form(tokenizer: PreTrainedTokenizerBase, template: str) -> CallForm | None:
    """Returns the form in which a tokenizer's template takes calls of tools; None where it shows none.

    Args:
        tokenizer: its template.
        template: the template's text, for which the result is kept.
    """
    return find_form(lambda messages, form: _rendered(tokenizer, messages, CHAT, form, False))


def _rendered(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, style: Style, form: CallForm, add_generation_prompt: bool
) -> str:
    switch = {} if style.thinking is None else {"enable_thinking": style.thinking}
    tools = [dict(tool) for tool in style.tools] or None
    if form == "text without content":  # apply_chat_template leaves out keys whose value is None
        given = {**tokenizer.special_tokens_map, **switch}
        template = tokenizer.get_chat_template(tools=tools)
        texts, _ = render_jinja_template(
            [messages], tools, chat_template=template, add_generation_prompt=add_generation_prompt, **given
        )
        return str(texts[0])
    text = tokenizer.apply_chat_template(
        messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt, **switch
    )
    return str(text)


def prompt_text(tokenizer: PreTrainedTokenizerBase, prompt: str | Messages, style: Style = CHAT) -> str:
    """Returns the prompt as the model sees it, with the template's opening of the assistant's turn."""
    if style.format == "text":
        assert isinstance(prompt, str)
        return prompt
    return apply_template(tokenizer, as_messages(prompt, style), style, add_generation_prompt=True)


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], style: Style = CHAT) -> list[list[int]]:
    """Tokenizes rendered texts. A template writes its own special tokens; plain text gets the tokenizer's."""
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=style.format == "text").input_ids
    return ids


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str | Messages, style: Style = CHAT
) -> tuple[str, list[int]]:
    """Renders the text and token ids of a prompt."""
    text = prompt_text(tokenizer, prompt, style)
    return text, tokenize(tokenizer, [text], style)[0]


def conversation_text(tokenizer: PreTrainedTokenizerBase, messages: Messages, style: Style = CHAT) -> str:
    """Returns a whole conversation as the model sees it."""
    return apply_template(tokenizer, as_messages(messages, style), style)


def render_conversations(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Messages],
    style: Style | Sequence[Style] = CHAT,
    *,
    loss_on: LossOn = "all_assistant",
) -> list[tuple[list[int], list[bool]]]:
    """Returns token ids of whole conversations, and a mask of the tokens to learn: those that the assistant wrote.

    The boundaries come from rendering each conversation message by message: the text before an assistant's turn, with
    the template's opening of that turn, must be a prefix of the whole; what follows the turn is found by rendering the
    conversation with another word in its place. No text is searched. Calls of tools are the assistant's; its closing
    token counts as written by it, a template's own text after that token does not. With `loss_on` "last_assistant" only
    the last turn counts; a message with ``train: false`` never does.

    Args:
        tokenizer: its template.
        conversations: each a list of messages.
        style: how they become text; or one for each, where each has tools of its own.
        loss_on: which turns are learned.

    Raises:
        UserError: the template rewrites earlier turns, so that no prefix of the conversation stays as it was, or a
            token straddles the start of a response.
    """
    texts, spans = [], []
    styles = [style] * len(conversations) if isinstance(style, Style) else style
    for messages, own in zip(conversations, styles, strict=True):
        text, written = _assistant_spans(tokenizer, as_messages(messages, own), own, loss_on)
        texts.append(text)
        spans.append(written)
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    rendered = []
    for text, ids, offsets, written in zip(texts, encoded.input_ids, encoded.offset_mapping, spans):
        mask = [False] * len(ids)
        for start, end in written:
            inside = _tokens_between(tokenizer, text, ids, offsets, start, end)
            closing = next((i for i in inside if ids[i] == tokenizer.eos_token_id), None)
            for i in inside[: None if closing is None else inside.index(closing) + 1]:
                mask[i] = True
        rendered.append((list(ids), mask))
    return rendered


def render_texts(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]
) -> list[tuple[list[int], list[bool]]]:
    """Returns token ids of plain texts, and a mask of the tokens to learn: what follows the prompt, and the end of
    sequence.

    Args:
        tokenizer: its own special tokens are put around the text; the end of sequence is added if it is not among them.
        pairs: (prompt, text after it); the prompt may be empty, then all tokens but the first are learned.

    Raises:
        UserError: a token straddles the end of a prompt.
    """
    encoded = tokenizer([a + b for a, b in pairs], return_offsets_mapping=True)
    rendered = []
    for ids, offsets, (prompt, text) in zip(encoded.input_ids, encoded.offset_mapping, pairs):
        mask = [False] * len(ids)
        whole = len(prompt) + len(text)
        for i in _tokens_between(tokenizer, prompt + text, ids, offsets, len(prompt), whole, special=True):
            mask[i] = i > 0
        if ids[-1] == tokenizer.eos_token_id:
            rendered.append((list(ids), [*mask[:-1], True]))
        else:
            rendered.append(([*ids, int(tokenizer.eos_token_id)], [*mask, True]))
    return rendered


def _tokens_between(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    ids: Sequence[int],
    offsets: Sequence[tuple[int, int]],
    start: int,
    end: int,
    *,
    special: bool = False,
) -> range:
    """Returns the tokens of these characters of a text; those before them must be the same tokens when the text before
    stands alone.

    Offsets decide where they are exact. Those of some tokenizers leave out spaces (``trim_offsets``), and then a token
    that holds a space of the prompt and the beginning of the response seems to begin with the response.
    """
    first = next((i for i, (a, b) in enumerate(offsets) if b > start and b > a), len(ids))
    stop = next((i for i in reversed(range(len(ids))) if offsets[i][0] < end and offsets[i][1] > offsets[i][0]), -1) + 1
    begins = first < len(ids) and offsets[first][0] == start
    if not start or (begins and first and offsets[first - 1][1] == start):
        return range(first, stop)
    before = tokenizer(text[:start], add_special_tokens=special).input_ids
    if special and before and before[-1] == tokenizer.eos_token_id:
        before = before[:-1]
    if list(ids[: len(before)]) != list(before):
        raise UserError(
            "a token spans the border between a prompt and the response",
            why="generation starts at that border, so the model would be trained on tokens it never sees",
            fix="end the prompt (or the template's generation prompt) with a special token or a newline, not with a "
            "space",
        )
    return range(len(before), stop)


def _assistant_spans(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, style: Style, loss_on: LossOn
) -> tuple[str, list[tuple[int, int]]]:
    """Returns the rendered conversation and the character ranges of the assistant's turns that are learned."""
    full = apply_template(tokenizer, messages, style)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    spans = []
    for i in turns[-1:] if loss_on == "last_assistant" else turns:
        if messages[i].get("train") is False:
            continue
        before = apply_template(tokenizer, messages[:i], style, add_generation_prompt=True)
        end = len(full) if i + 1 == len(messages) else _end_of_turn(tokenizer, messages, i, style, full, len(before))
        if end is None or not full.startswith(before):
            raise UserError(
                f"the chat template rewrites turns before message {i}",
                why="the conversation up to a response must be rendered the same with and without that response",
                fix="use a template that only appends (for thinking models: one that keeps earlier turns as they "
                "were), or set data.loss_on=last_assistant",
            )
        spans.append((len(before), end))
    return full, spans


def _end_of_turn(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, i: int, style: Style, full: str, start: int
) -> int | None:
    """Returns where a turn that begins at `start` ends in the whole conversation; None if the template rewrote it
    because of what follows.
    """
    after = apply_template(tokenizer, messages[: i + 1], style)
    if full.startswith(after):
        return len(after)
    turn = messages[i] | {"content": word(_APART) if messages[i]["content"].strip() else ""}
    if turn.get("tool_calls"):
        turn["tool_calls"] = marked_calls(turn["tool_calls"], _APART)
    marked = [*messages[:i], turn, *messages[i + 1 :]]
    alone = behind_of(apply_template(tokenizer, marked[: i + 1], style), turn, _APART)
    behind = behind_of(apply_template(tokenizer, marked, style), turn, _APART)
    shown = [messages[i]["content"], messages[i].get("reasoning_content") or ""]
    if not alone or not behind.startswith(alone) or not full.endswith(behind):
        return None
    end = len(full) - len(behind) + len(alone)
    return end if all("".join(text.split()) in "".join(full[start:end].split()) for text in shown) else None


_APART = 10**6  # a number of no other stand-in
