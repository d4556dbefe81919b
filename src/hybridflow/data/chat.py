"""Chat messages to tokens, and which of them the assistant wrote."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hybridflow.errors import UserError

Messages = list[dict[str, Any]]


def as_messages(prompt: str | Messages) -> Messages:
    """A plain string is one message of the user."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def require_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises a UserError if the tokenizer has no chat template."""
    if not tokenizer.chat_template:
        raise UserError(
            "the tokenizer has no chat template",
            why="prompts are rendered with it, and the model must see in training what it sees in use",
            fix="set chat_template in its tokenizer_config.json, or save the tokenizer with one",
        )


def _apply(tokenizer: PreTrainedTokenizerBase, messages: Messages, *, add_generation_prompt: bool = False) -> str:
    try:
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except TemplateError as error:
        raise UserError(
            f"the chat template refuses the messages {str(messages)[:200]}: {error}",
            fix="give messages with the roles, the order and the keys that the model's template expects",
        ) from error
    return str(rendered)


def render_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str | Messages) -> tuple[str, list[int]]:
    """Text and token ids of a prompt with the template's opening of the assistant's turn."""
    text = _apply(tokenizer, as_messages(prompt), add_generation_prompt=True)
    return text, list(tokenizer(text, add_special_tokens=False).input_ids)


def render_conversations(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Messages]
) -> list[tuple[list[int], list[bool]]]:
    """Token ids of whole conversations, and a mask of the tokens that the assistant wrote.

    The boundaries come from rendering each conversation message by message: what precedes an assistant's turn, with
    the template's opening of that turn, must be a prefix of what follows it. Nothing is searched for in the text.
    The assistant's closing token counts as written by it; a template's own text after that token does not.

    Raises:
        UserError: the template rewrites earlier turns, so that no prefix of the conversation stays as it was, or a
            token straddles the start of an answer.
    """
    texts, spans = [], []
    for messages in conversations:
        text, written = _assistant_spans(tokenizer, messages)
        texts.append(text)
        spans.append(written)
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    rendered = []
    for ids, offsets, written in zip(encoded.input_ids, encoded.offset_mapping, spans):
        mask = [False] * len(ids)
        for start, end in written:
            inside = [i for i, (a, b) in enumerate(offsets) if a < end and b > start and b > a]
            if inside and offsets[inside[0]][0] < start:
                raise UserError(
                    "a token spans the border between a prompt and the answer",
                    why="generation starts at that border, so the model would be trained on tokens it never sees",
                    fix="end the template's generation prompt with a special token or a newline",
                )
            closing = next((i for i in inside if ids[i] == tokenizer.eos_token_id), None)
            for i in inside[: None if closing is None else inside.index(closing) + 1]:
                mask[i] = True
        rendered.append((list(ids), mask))
    return rendered


def _assistant_spans(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> tuple[str, list[tuple[int, int]]]:
    """The rendered conversation and the character ranges of the assistant's turns."""
    full = _apply(tokenizer, messages)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _apply(tokenizer, messages[:i], add_generation_prompt=True)
        last = i + 1 == len(messages)
        after = full if last else _apply(tokenizer, messages[: i + 1])
        if not (full.startswith(before) and full.startswith(after)):
            raise UserError(
                f"the chat template rewrites turns before message {i}",
                why="the conversation up to an answer must be rendered the same with and without that answer",
                fix="use a template that only appends (for thinking models: one that keeps earlier turns as they were)",
            )
        spans.append((len(before), len(after)))
    return full, spans
