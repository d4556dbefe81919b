"""Conversations or texts to packed training batches, with loss on what the model should write.

Shapes: B sequences, T tokens of all sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hybridflow.batch import Batch
from hybridflow.chat.messages import Messages, RefusedValue, answer_in
from hybridflow.chat.schemas import read_tools
from hybridflow.chat.template import (
    LossOn,
    Style,
    as_messages,
    conversation_text,
    render_conversations,
    render_texts,
    require_template,
    tokenize,
)
from hybridflow.config.sections.data import SftDataSection
from hybridflow.data.reader import ConversationReader, joined, reading, require_rows
from hybridflow.data.rows import Row, column, has_column, require_one_schema
from hybridflow.data.sampler import Sampler
from hybridflow.data.sources import RowSet, read_sources
from hybridflow.errors import UserError

SHAREGPT = "conversations"  # the column of messages in ShareGPT's files
_CHUNK = 1000  # rows tokenised together


class SftSet:
    """Conversations of one or several sources; batches are rendered when they are asked for.

    Args:
        data: the rows.
        config: which columns, which limit.
        tokenizer: renders and tokenises.
        over_long: number of conversations that were over the limit and are left out or cut.
        unlearnable: of these, how many had to be left out because nothing to learn was left after the cut.
    """

    def __init__(
        self,
        data: RowSet,
        config: SftDataSection,
        tokenizer: PreTrainedTokenizerBase,
        *,
        over_long: int = 0,
        unlearnable: int = 0,
    ) -> None:
        self.data, self.config, self.tokenizer = data, config, tokenizer
        self.over_long, self.unlearnable = over_long, unlearnable
        self.source = data.name
        self.style = Style(config.format, config.system_prompt, config.thinking)
        self.reader = ConversationReader(tokenizer, self.style)

    def __len__(self) -> int:
        return len(self.data.rows)

    @property
    def fingerprint(self) -> str:
        """Changes with the rows that are drawn from; see `RowSet.fingerprint`."""
        return self.data.fingerprint()

    def sampler(self, *, seed: int) -> Sampler:
        """Draws from these conversations, in the order of ``data.order`` and by the weights of the sources."""
        return self.data.sampler(self.config.order, seed=seed)

    def batch(self, indices: list[int]) -> Batch:
        """Returns ``input_ids_T``, ``loss_mask_T`` (bool) and ``trajectory_B`` of these rows.

        Raises:
            UserError: a row has no conversation, no response in it, or is over the limit.
        """
        rendered, limit = self._render(indices), self.config.max_tokens
        if self.config.over_long == "truncate":
            rendered = [(ids[:limit], mask[:limit]) for ids, mask in rendered]
        for i, (ids, _) in zip(indices, rendered):
            if len(ids) > limit:
                source, number = self.data.place(i)
                raise UserError(
                    f"row {number} of {source} has {len(ids)} tokens, data.max_tokens is {limit}",
                    fix="raise the limit or leave the row out (data.over_long=filter does)",
                )
        return Batch.from_rows(
            {
                "input_ids_T": [ids for ids, _ in rendered],
                "loss_mask_T": [mask for _, mask in rendered],
                "trajectory_B": indices,
            }
        )

    def lengths(self, count: int | None = None) -> list[int]:
        """Counts the tokens of each of the first conversations before any cut; tokenises in batches.

        Raises:
            UserError: see `batch`, without the limit.
        """
        lengths: list[int] = []
        count = len(self) if count is None else min(count, len(self))
        for first in range(0, count, _CHUNK):
            part = range(first, min(first + _CHUNK, count))
            if self.config.format == "text":
                lengths += [len(ids) for ids, _ in self._render(part)]
            else:
                texts = [conversation_text(self.tokenizer, self._conversation(i), self._style(i)) for i in part]
                lengths += map(len, tokenize(self.tokenizer, texts, self.style))
        return lengths

    def fit(self) -> SftSet:
        """Returns the set as ``data.over_long`` asks: without over-long conversations, or with a count of those that
        are cut.
        """
        limit = self.config.max_tokens
        over = {i for i, n in enumerate(self.lengths()) if n > limit}
        if self.config.over_long == "truncate":
            left = {i for i in over if not any(self._render([i])[0][1][:limit])}
        else:
            left = over
        kept = self.data.keep([i for i in range(len(self)) if i not in left])
        unlearnable = len(left) if self.config.over_long == "truncate" else 0
        return SftSet(kept, self.config, self.tokenizer, over_long=len(over), unlearnable=unlearnable)

    def notes(self) -> list[str]:
        """Describes what was done about over-long conversations."""
        if self.config.over_long == "refuse":
            return []
        long = f"conversations of more than {self.config.max_tokens} tokens"
        if self.config.over_long == "filter":
            return [f"{long}, left out: {self.over_long}"]
        lines = [f"{long}, cut at their end: {self.over_long - self.unlearnable}"]
        if self.unlearnable:
            lines.append(f"left out, because the cut would leave nothing to learn: {self.unlearnable}")
        return lines

    def read(self, index: int) -> object:
        """Reads a row, as `batch` will render it.

        Raises:
            UserError: a column is missing.
            RowError: it holds no conversation or text to learn from.
        """
        return self._texts(index) if self.config.format == "text" else self._conversation(index)

    def _render(self, indices: Sequence[int]) -> list[tuple[list[int], list[bool]]]:
        if self.config.format == "text":
            return render_texts(self.tokenizer, [self._texts(i) for i in indices])
        conversations, styles = [self._conversation(i) for i in indices], [self._style(i) for i in indices]
        return render_conversations(self.tokenizer, conversations, styles, loss_on=self.config.loss_on)

    def _style(self, index: int) -> Style:
        """Returns how a row becomes text: with the tools that it has."""
        row, key = self.data.rows[index], self.config.tools_key
        if key is None or not has_column(row, key):
            return self.style
        with reading(self.data, index, key):
            return replace(self.style, tools=read_tools(column(row, key, source="", index=index)))

    def _value(self, index: int, key: str, setting: str) -> Any:
        source, number = self.data.place(index)
        return column(self.data.rows[index], key, source=source, index=number, setting=setting)

    def _texts(self, index: int) -> tuple[str, str]:
        """Returns prompt and text of a row, for format text; the prompt is empty where the whole text is learned."""
        texts = []
        for key, setting in columns(self.data.rows[index], self.config).items():
            value = self._value(index, key, setting)
            with reading(self.data, index, key):
                texts.append(self.reader.text(value))
                if setting != "data.prompt_key" and not texts[-1].strip():
                    raise RefusedValue("is empty", why="there is nothing to learn from", fix="leave the row out")
        return ("", texts[0]) if len(texts) == 1 else (texts[0], texts[1])

    def _conversation(self, index: int) -> Messages:
        """Returns the messages of a row; at least one of them is to be learned."""
        c, messages = self.config, Messages()
        for key, setting in columns(self.data.rows[index], c).items():
            value = self._value(index, key, setting)
            with reading(self.data, index, key):
                if setting == "data.response_key":
                    value = answer_in(value)
                answer = isinstance(value, str) and setting == "data.response_key"
                if setting == "data.prompt_key":
                    messages += self.reader.question(value)
                else:
                    read = self.reader.read([{"role": "assistant", "content": value}] if answer else value)
                    messages = joined(messages, read)
                    self._require_asked(messages)
                    _require_learned(self.reader.whole(messages, self._style(index)), c.loss_on)
        return messages

    def _require_asked(self, messages: Messages) -> None:
        """Refuses a conversation whose first turn is learned: no turn is before it that it responds to."""
        last, first = self.config.loss_on == "last_assistant", as_messages(messages, self.style)[0]
        alone = sum(m["role"] == "assistant" for m in messages) == 1
        if first["role"] == "assistant" and first.get("train") is not False and (alone or not last):
            raise RefusedValue(
                "begins with an assistant's turn",
                why="nothing is before it that the model would respond to, so it cannot be learned as a response",
                fix='leave the turn out, give it "train": false, or put a turn of the user or a system before it',
            )


def columns(row: Row, config: SftDataSection) -> dict[str, str]:
    """Returns the columns that are read of a row, each with the key that names it."""
    if config.prompt_key is not None and config.response_key is not None:
        return {config.prompt_key: "data.prompt_key", config.response_key: "data.response_key"}
    if config.format == "text":
        return {config.text_key: "data.text_key"}
    key = config.messages_key
    sharegpt = key == "messages" and key not in row and has_column(row, SHAREGPT)
    return {SHAREGPT if sharegpt else key: "data.messages_key"}


def _require_learned(messages: Messages, loss_on: LossOn) -> None:
    learned = [m.get("train") is not False for m in messages if m["role"] == "assistant"]
    if not any(learned[-1:] if loss_on == "last_assistant" else learned):
        raise RefusedValue(
            "holds no assistant message" + (" that is to be learned" if learned else ""),
            why="there is nothing to learn from",
            fix="give a list of {role, content} objects with at least one role 'assistant'",
        )


def load_sft(config: SftDataSection, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> SftSet:
    """Reads the training conversations; with ``data.over_long`` filter or truncate every one is measured.

    Raises:
        UserError: a source cannot be read, its rows are of different kinds, or the tokenizer has no chat template.
    """
    data = read_sources(config.train, seed=seed)
    found = SftSet(data, config, tokenizer)
    require_template(tokenizer, found.style)
    for part, source in zip(data.parts(), data.sources):
        rows = data.rows[part.start : part.stop]
        require_one_schema(rows, columns(rows[0], config), source=source.source)
    require_rows(data, found.read)
    return found if config.over_long == "refuse" else found.fit()
