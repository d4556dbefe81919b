"""Rows to prompts, for reinforcement learning and evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hybridflow.config.sections import PromptDataSection
from hybridflow.data.chat import Messages, as_messages, render_prompt, require_template
from hybridflow.data.rows import Row, column, fingerprint_rows, read_rows
from hybridflow.errors import UserError


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question ready to be answered.

    Args:
        token_ids: the rendered prompt, the template's opening of the answer included.
        text: the rendered prompt, as the model sees it.
        messages: the prompt as chat messages.
        ground_truth: what the reward compares with.
        row: the whole row, for the reward.
    """

    token_ids: tuple[int, ...]
    text: str
    messages: Messages
    ground_truth: Any
    row: Row

    @property
    def data_source(self) -> str:
        """Name of the data set, for metrics: the row's own, else "data"."""
        return str(self.row.get("data_source", "data"))


@dataclass(slots=True)
class PromptSet:
    """All prompts of a data source, rendered when they are asked for."""

    rows: list[Row]
    source: str
    config: PromptDataSection
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Prompt:
        """The prompt of a row.

        Raises:
            UserError: a column is missing, or the prompt is over the limit.
        """
        row, key = self.rows[index], self.config.prompt_key
        value = column(row, key, source=self.source, index=index)
        if not (isinstance(value, str) or (isinstance(value, list) and value and isinstance(value[0], dict))):
            raise UserError(
                f"{key} of row {index} of {self.source} is a {type(value).__name__}, not a string or chat messages"
            )
        truth = column(row, self.config.ground_truth_key, source=self.source, index=index)
        text, ids = render_prompt(self.tokenizer, value)
        if len(ids) > self.config.max_prompt_tokens:
            raise UserError(
                f"the prompt of row {index} of {self.source} has {len(ids)} tokens, "
                f"data.max_prompt_tokens is {self.config.max_prompt_tokens}",
                fix="raise the limit or leave the row out",
            )
        return Prompt(tuple(ids), text, as_messages(value), truth, row)


def load_prompts(source: str, config: PromptDataSection, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> PromptSet:
    """Reads a data source for prompts; `check_all` of the set goes through every row.

    Raises:
        UserError: the source cannot be read, or the tokenizer has no chat template.
    """
    require_template(tokenizer)
    rows = read_rows(source, seed=seed)
    return PromptSet(rows, source, config, tokenizer, fingerprint_rows(rows))
