"""Preferences: rows with two responses of which one was preferred, to conversations that a reward model reads.

A value is read from the state before the token that is masked in (`models.forward`), so every conversation gets one
more token, which nothing before it sees, and the token after each one that is read is masked in.

Shapes: N pairs, B conversations (two of each pair), T tokens of all conversations.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hybridflow.batch import Batch
from hybridflow.chat.messages import Messages, RefusedValue, answer_in, check_text, kind_of
from hybridflow.chat.template import CHAT, conversation_text, require_template, tokenize
from hybridflow.config.sections.preference import PreferenceDataSection
from hybridflow.data.reader import ConversationReader, joined, reading, require_rows, words
from hybridflow.data.rows import Row, column, require_one_schema
from hybridflow.data.sampler import Sampler
from hybridflow.data.sources import RowSet, Sources, read_sources
from hybridflow.errors import UserError

_CHUNK = 500  # pairs tokenised together


def readings(conversations: Sequence[Sequence[int]], read: Sequence[Sequence[int]]) -> Batch:
    """Returns ``input_ids_T`` and ``loss_mask_T``: scoring "value" gives the values of the states after the tokens
    `read`.

    Args:
        conversations: token ids.
        read: of each, the places of the tokens to read at, ascending.
    """
    masks = []
    for ids, places in zip(conversations, read):
        mask = torch.zeros(len(ids) + 1, dtype=torch.bool)
        mask[torch.tensor(places, dtype=torch.int64) + 1] = True
        masks.append(mask)
    ids_T = [torch.tensor([*ids, ids[-1]]) for ids in conversations]
    return Batch.from_rows({"input_ids_T": ids_T, "loss_mask_T": masks})


def last_read(token_ids: Sequence[int], padding: int | None) -> int:
    """Returns the place of the token that transformers reads a conversation at: the last one that is not the padding
    token.

    >>> last_read([5, 6, 7], None), last_read([5, 6, 0], 0)
    (2, 1)
    """
    return next((i for i in reversed(range(len(token_ids))) if token_ids[i] != padding), len(token_ids) - 1)


def use_template(tokenizer: PreTrainedTokenizerBase, file: str | None, *, key: str) -> None:
    """Gives a tokenizer the template in a file, and checks that it has one.

    Raises:
        UserError: there is no such file, or no template.
    """
    if file is None:
        require_template(tokenizer)
    elif not Path(file).is_file():
        raise UserError(f"{key}: no file {file}", fix="give a Jinja file that writes `messages` as text")
    else:
        tokenizer.chat_template = Path(file).read_text(encoding="utf-8")


class PreferenceSet:
    """Pairs of conversations; batches are rendered when they are asked for.

    Args:
        data: the rows.
        config: which columns, which limit.
        tokenizer: renders and tokenises.
        padding: the padding token in the model's configuration, which transformers does not read at.
        alike: how many rows were left out because both responses are the same.
        over_long: how many were over the limit and left out.
    """

    def __init__(
        self,
        data: RowSet,
        config: PreferenceDataSection,
        tokenizer: PreTrainedTokenizerBase,
        *,
        padding: int | None = None,
        alike: int = 0,
        over_long: int = 0,
    ) -> None:
        self.data, self.config, self.tokenizer, self.padding = data, config, tokenizer, padding
        self.alike, self.over_long = alike, over_long
        self.reader = ConversationReader(tokenizer)
        self.source = data.name

    def __len__(self) -> int:
        return len(self.data.rows)

    @property
    def fingerprint(self) -> str:
        """Changes with the rows that are drawn from; see `RowSet.fingerprint`."""
        return self.data.fingerprint()

    def sampler(self, *, seed: int) -> Sampler:
        """Draws from these pairs, in the order of ``data.order`` and by the weights of the sources."""
        return self.data.sampler(self.config.order, seed=seed)

    def batch(self, indices: Sequence[int]) -> Batch:
        """Returns the conversations of these rows, the preferred one of each first: `readings`, and the columns of
        their loss.

        Columns: ``chosen_T`` (bool), ``margin_T``, ``pair_weight_T`` (all pairs count the same and add up to 1), and
        ``trajectory_B``, the row.

        Raises:
            UserError: a row is no pair, or over the limit.
        """
        conversations = self.tokens(indices)
        for place, ids in enumerate(conversations):
            if len(ids) > self.config.max_tokens:
                source, number = self.data.place(indices[place // 2])
                raise UserError(
                    f"row {number} of {source} has a conversation of {len(ids)} tokens, data.max_tokens is "
                    f"{self.config.max_tokens}",
                    fix="raise the limit or leave the row out (data.over_long=filter does)",
                )
        batch = readings(conversations, [[last_read(ids, self.padding)] for ids in conversations])
        sequence_T = batch.sequence_of()
        margin_N = torch.tensor([self._margin(i) for i in indices])
        batch["chosen_T"] = sequence_T % 2 == 0
        batch["margin_T"] = margin_N[sequence_T // 2]
        batch["pair_weight_T"] = torch.full((batch.total(),), 1 / len(indices))
        batch["trajectory_B"] = torch.tensor([i for i in indices for _ in range(2)])
        return batch

    def tokens(self, indices: Sequence[int]) -> list[list[int]]:
        """Returns the token ids of the conversations of these rows: preferred, other, preferred, other, ...

        Raises:
            UserError: a row is no pair.
        """
        pairs = [self.pair(i) for i in indices]
        texts = [conversation_text(self.tokenizer, messages) for pair in pairs for messages in pair]
        return tokenize(self.tokenizer, texts, CHAT)

    def longest(self) -> list[int]:
        """Counts the tokens of the longer conversation of every row."""
        lengths: list[int] = []
        for first in range(0, len(self), _CHUNK):
            ids = self.tokens(range(first, min(first + _CHUNK, len(self))))
            lengths += [max(len(a), len(b)) for a, b in zip(ids[::2], ids[1::2])]
        return lengths

    def fit(self) -> PreferenceSet:
        """Returns the set without pairs of two equal responses, and without over-long ones where ``data.over_long`` is
        filter.

        Raises:
            UserError: nothing is left.
        """
        c = self.config
        pairs = (self.pair(i) for i in range(len(self)))
        differ = [i for i, (a, b) in enumerate(pairs) if list(map(words, a)) != list(map(words, b))]
        alike = len(self) - len(differ)
        if not differ:
            raise UserError(
                f"in every row of {self.source} {c.chosen_key} and {c.rejected_key} are the same",
                why="there is nothing to tell apart",
            )
        kept = PreferenceSet(self.data.keep(differ), c, self.tokenizer, padding=self.padding, alike=alike)
        if c.over_long == "refuse":
            return kept
        fitting = [i for i, length in enumerate(kept.longest()) if length <= c.max_tokens]
        return PreferenceSet(
            kept.data.keep(fitting), c, self.tokenizer, padding=self.padding, alike=alike,
            over_long=len(kept) - len(fitting),
        )  # fmt: skip

    def notes(self) -> list[str]:
        """Returns notes on the rows, as sentences."""
        lines = [f"pairs of two equal responses, left out: {self.alike}"] if self.alike else []
        if self.config.over_long == "filter":
            lines.append(
                f"pairs with a conversation of more than {self.config.max_tokens} tokens, left out: {self.over_long}"
            )
        empty = sum(not str(pair[-1].get("content")).strip() for i in range(len(self)) for pair in self.pair(i))
        if empty:
            lines.append(f"advice: {empty} of {2 * len(self)} responses are empty")
        return lines

    def pair(self, index: int) -> tuple[Messages, Messages]:
        """Reads the preferred conversation of a row, and the other.

        Raises:
            UserError: a column is missing.
            RowError: the columns hold no pair of responses to one prompt.
        """
        c, row, (source, number) = self.config, self.data.rows[index], self.data.place(index)
        key, prompt = _prompt_column(row, c), Messages()
        if key is not None:
            given = column(row, key, source=source, index=number, setting="data.prompt_key")
            with reading(self.data, index, key):
                prompt = self.reader.question(given)
        pair = []
        for key, chosen in ((c.chosen_key, True), (c.rejected_key, False)):
            value = self._value(index, row, chosen)
            with reading(self.data, index, key):
                pair.append(self.reader.whole(self._conversation(value, prompt)))
                if _asked(pair[0]) != _asked(pair[-1]):
                    raise RefusedValue(
                        f"responds to another prompt than {c.chosen_key}",
                        why="responses to different prompts cannot be compared",
                        fix="give two responses to one prompt in each row",
                    )
        return pair[0], pair[1]

    def _conversation(self, answer: object, prompt: Messages) -> Messages:
        """Returns the whole conversation of a response, which may be a text, a last turn, or all turns with the
        prompt's.
        """
        answer = answer_in(answer)
        if isinstance(answer, str) and prompt:
            return [*prompt, {"role": "assistant", "content": check_text(answer, self.reader.markers)}]
        if not isinstance(answer, list) or not answer:
            what = "a string without a prompt" if isinstance(answer, str) else kind_of(answer)
            raise RefusedValue(
                f"is no response: it is {what}",
                fix="give a string and a prompt column (data.prompt_key), or a list of chat messages",
            )
        turns = self.reader.read(answer, empty_answers=True)
        if turns[-1]["role"] in ("user", "system", "developer"):
            raise RefusedValue(
                f"ends in a turn of {turns[-1]['role']!r}",
                why="the response is what is scored, and it comes last",
                fix="end the conversation with the response",
            )
        return joined(prompt, turns)

    def _value(self, index: int, row: dict[str, Any], chosen: bool) -> Any:
        source, number = self.data.place(index)
        key = self.config.chosen_key if chosen else self.config.rejected_key
        setting = "data.chosen_key" if chosen else "data.rejected_key"
        return column(row, key, source=source, index=number, setting=setting)

    def _margin(self, index: int) -> float:
        key = self.config.margin_key
        if key is None:
            return 0.0
        source, number = self.data.place(index)
        value = column(self.data.rows[index], key, source=source, index=number, setting="data.margin_key")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{key} of row {number} of {source} is {value!r}, not a number")
        return float(value)


def _prompt_column(row: Row, config: PreferenceDataSection) -> str | None:
    """Returns the column of the prompt; None where the responses are whole conversations, as in TRL's implicit rows."""
    key = config.prompt_key
    implicit = key == "prompt" and key not in row and isinstance(row.get(config.chosen_key), list)
    return None if implicit else key


def _asked(conversation: Messages) -> tuple[str, str] | None:
    """Returns the first turn that is not a system message; both sides of a pair share it."""
    return next((words(m) for m in conversation if m["role"] not in ("system", "developer")), None)


def load_preferences(
    sources: Sources,
    config: PreferenceDataSection,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    padding: int | None = None,
) -> PreferenceSet:
    """Reads pairs; leaves out pairs of two equal responses, and over-long ones where ``data.over_long`` is filter.

    Args:
        sources: training or held-out rows.
        config: which columns.
        tokenizer: with a template: see `use_template`.
        seed: for sources that are functions.
        padding: see `PreferenceSet`.

    Raises:
        UserError: a source cannot be read, a row is of another kind, or nothing is left.
    """
    data = read_sources(sources, seed=seed)
    keys = {config.chosen_key: "data.chosen_key", config.rejected_key: "data.rejected_key"}
    for part, source in zip(data.parts(), data.sources):
        rows = data.rows[part.start : part.stop]
        prompt = _prompt_column(rows[0], config)
        require_one_schema(rows, keys if prompt is None else keys | {prompt: "data.prompt_key"}, source=source.source)
    found = PreferenceSet(data, config, tokenizer, padding=padding)
    require_rows(data, found.pair)
    return found.fit()
