"""Conversations or texts to packed training batches, with loss on what the model should write."""

from __future__ import annotations

from collections.abc import Sequence

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hybridflow.batch import Batch
from hybridflow.config.data import SftDataSection
from hybridflow.data.chat import (
    Messages,
    Style,
    as_messages,
    conversation_text,
    render_conversations,
    render_texts,
    require_template,
    tokenize,
)
from hybridflow.data.rows import column, require_one_schema
from hybridflow.data.sampler import Sampler
from hybridflow.data.sources import RowSet, read_sources
from hybridflow.errors import UserError

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

    def __len__(self) -> int:
        return len(self.data.rows)

    @property
    def fingerprint(self) -> str:
        """Changes with the rows that are drawn from; see `RowSet.fingerprint`."""
        return self.data.fingerprint()

    def sampler(self, *, seed: int) -> Sampler:
        """Draws from these conversations, as ``data.order`` and the weights of the sources say."""
        return self.data.sampler(self.config.order, seed=seed)

    def batch(self, indices: list[int]) -> Batch:
        """``input_ids_T``, ``loss_mask_T`` (bool) and ``trajectory_B`` of these rows.

        Raises:
            UserError: a row has no conversation, no answer in it, or is over the limit.
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
        """Tokens of each of the first conversations before any cut; tokenised in batches.

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
                texts = [conversation_text(self.tokenizer, self._conversation(i), self.style) for i in part]
                lengths += map(len, tokenize(self.tokenizer, texts, self.style))
        return lengths

    def fit(self) -> SftSet:
        """The set as ``data.over_long`` wants it: over-long conversations left out, or counted because they are cut."""
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
        """What was done about over-long conversations, in words."""
        if self.config.over_long == "refuse":
            return []
        long = f"conversations of more than {self.config.max_tokens} tokens"
        if self.config.over_long == "filter":
            return [f"{long}, left out: {self.over_long}"]
        lines = [f"{long}, cut at their end: {self.over_long - self.unlearnable}"]
        if self.unlearnable:
            lines.append(f"left out, because the cut would leave nothing to learn: {self.unlearnable}")
        return lines

    def _render(self, indices: Sequence[int]) -> list[tuple[list[int], list[bool]]]:
        if self.config.format == "text":
            return render_texts(self.tokenizer, [self._texts(i) for i in indices])
        conversations = [self._conversation(i) for i in indices]
        return render_conversations(self.tokenizer, conversations, self.style, loss_on=self.config.loss_on)

    def _texts(self, index: int) -> tuple[str, str]:
        """Prompt and text of a row, for format text."""
        c, (source, number) = self.config, self.data.place(index)
        keys = [c.text_key] if c.prompt_key is None or c.response_key is None else [c.prompt_key, c.response_key]
        values = [column(self.data.rows[index], key, source=source, index=number) for key in keys]
        for key, value in zip(keys, values):
            if not isinstance(value, str):
                raise UserError(f"{key} of row {number} of {source} is a {type(value).__name__}, not a string")
        return ("", values[0]) if len(values) == 1 else (values[0], values[1])

    def _conversation(self, index: int) -> Messages:
        """The messages of a row, at least one of them to be learned."""
        c, row, (source, number) = self.config, self.data.rows[index], self.data.place(index)
        if c.prompt_key is not None and c.response_key is not None:
            prompt = column(row, c.prompt_key, source=source, index=number)
            response = column(row, c.response_key, source=source, index=number)
            if not isinstance(prompt, str | list) or not isinstance(response, str):
                raise UserError(
                    f"row {number} of {source} is no prompt and answer: {c.prompt_key} is a {type(prompt).__name__}, "
                    f"{c.response_key} is a {type(response).__name__}",
                    fix="the prompt must be a string or chat messages, the answer a string",
                )
            return [*as_messages(prompt), {"role": "assistant", "content": response}]
        messages = column(row, c.messages_key, source=source, index=number)
        known = isinstance(messages, list) and all(isinstance(m, dict) for m in messages)
        learned = [m.get("train") is not False for m in messages if m.get("role") == "assistant"] if known else []
        if not any(learned[-1:] if c.loss_on == "last_assistant" else learned):
            lack = "no assistant message" + (" that is to be learned" if learned else "")
            raise UserError(
                f"{c.messages_key} of row {number} of {source} holds {lack}",
                why="there is nothing to learn from",
                fix="give a list of {role, content} objects with at least one role 'assistant'",
            )
        return list(messages)


def load_sft(config: SftDataSection, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> SftSet:
    """Reads the training conversations; with ``data.over_long`` filter or truncate every one is measured.

    Raises:
        UserError: a source cannot be read, its rows are of different kinds, or the tokenizer has no chat template.
    """
    data = read_sources(config.train, seed=seed)
    found = SftSet(data, config, tokenizer)
    require_template(tokenizer, found.style)
    if config.prompt_key is not None and config.response_key is not None:
        keys = {config.prompt_key: "data.prompt_key", config.response_key: "data.response_key"}
    elif config.format == "text":
        keys = {config.text_key: "data.text_key"}
    else:
        keys = {config.messages_key: "data.messages_key"}
    for part, source in zip(data.parts(), data.sources):
        require_one_schema(data.rows[part.start : part.stop], keys, source=source.source)
    return found if config.over_long == "refuse" else found.fit()
