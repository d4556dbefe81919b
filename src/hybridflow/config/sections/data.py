"""The sections that say where rows come from and how they become tokens. Importable without torch."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt, WithJsonSchema, model_validator

from hybridflow.config.paths import FunctionName, ReadPath
from hybridflow.config.sections.base import Section
from hybridflow.errors import near


class SourceSection(Section):
    """One source of rows."""

    source: ReadPath = Field(
        description="A file (.jsonl, .json, .csv, .tsv, .parquet), file.py:function returning dicts, or a name on the "
        "Hugging Face hub (org/name:config/split)."
    )
    weight: PositiveFloat | None = Field(
        None, description="Share of the draws, relative to the other sources' weights."
    )


ONE = ("source", "weight")


def _as_sources(value: object) -> object:
    """Returns one source, or a list in which a plain string is a source too."""
    entries = list(value) if isinstance(value, list | tuple) else [value]
    for entry in entries:
        rows = isinstance(entry, dict) and entry and not any(near(k, ONE) for k in map(str, entry))
        if rows or callable(entry) or (hasattr(entry, "__getitem__") and not isinstance(entry, str | dict)):
            raise ValueError(
                f"a configuration names where rows are, and this is a {type(entry).__name__} in memory: write the rows "
                "to a .jsonl or .parquet file, or name a function that returns them, as file.py:function; a program "
                "may give rows to hybridflow.train(data=rows)"
            )
    if isinstance(value, str | os.PathLike | dict | list | tuple):
        return [{"source": entry} if isinstance(entry, str | os.PathLike) else entry for entry in entries]
    return value


def _sources_schema() -> dict[str, Any]:
    """Returns the schema of what `_as_sources` takes, for editors."""
    one = [{"type": "string"}, SourceSection.model_json_schema()]
    return {"anyOf": [*one, {"type": "array", "items": {"anyOf": one}, "minItems": 1}]}


Sources = Annotated[
    list[SourceSection], BeforeValidator(_as_sources), Field(min_length=1), WithJsonSchema(_sources_schema())
]

_TRAIN = (
    "Training rows: a file (.jsonl, .json, .csv, .tsv, .parquet), file.py:function returning dicts, "
    "or a name on the Hugging Face hub; or a list of these, each a string or {source, weight}. "
    "Without weights all rows form one set; with weights (default 1) rows are drawn from each source "
    "in proportion to its weight, and each source has its own epochs."
)
_ORDER = (
    "Order of each epoch: shuffled, sequential, or file.py:function, which takes any of rows, seed "
    "and epoch and returns the row numbers in the order to draw them."
)
_SYSTEM = "System message to put before conversations that have none."
_THINKING = "The chat template's enable_thinking switch; unset leaves it to the template."


def _check_style(format: str, system_prompt: str | None, thinking: bool | None, order: str) -> None:
    if format == "text" and (system_prompt is not None or thinking is not None):
        raise ValueError("system_prompt and thinking belong to chat templates: leave them out with format text")
    if order not in ("shuffled", "sequential") and ".py:" not in order:
        raise ValueError(f"order is {order!r}; give shuffled, sequential or file.py:function")


class PromptDataSection(Section):
    """Rows with prompts, for reinforcement learning and evaluation."""

    train: Sources | None = Field(None, description=_TRAIN)
    eval: Sources | None = Field(
        None,
        description="Evaluation rows, in the same forms without weights. Each data_source among them has metrics of "
        "its own.",
    )
    prompt_key: str = Field("prompt", description="Column with the prompt: a string or a list of chat messages.")
    ground_truth_key: str | None = Field(
        "ground_truth",
        description="Column that the reward compares with; a dot goes inside a nested value. Rows without "
        "ground_truth may have it as reward_model.ground_truth (verl's rows). null: the rows have none, and the "
        "reward is given None.",
    )
    format: Literal["chat", "text"] = Field(
        "chat", description="chat: render prompts with the chat template; text: tokenise strings as they are."
    )
    system_prompt: str | None = Field(None, description=_SYSTEM)
    thinking: bool | None = Field(None, description=_THINKING)
    max_prompt_tokens: PositiveInt = Field(1024, description="Longest prompt allowed, in tokens after the template.")
    over_long: Literal["refuse", "filter", "truncate"] = Field(
        "refuse",
        description="What happens to prompts over max_prompt_tokens. refuse: an error; filter: they are left out; "
        "truncate: they are cut at their beginning. `hybridflow check` counts them.",
    )
    order: FunctionName = Field("shuffled", description=_ORDER)

    @model_validator(mode="after")
    def _check(self) -> PromptDataSection:
        _check_style(self.format, self.system_prompt, self.thinking, self.order)
        if any(entry.weight is not None for entry in self.eval or []):
            raise ValueError("eval sources have no weight: every row is used")
        return self


class SftDataSection(Section):
    """Conversations for supervised fine-tuning."""

    train: Sources = Field(description=_TRAIN)
    messages_key: str = Field("messages", description="Column with the conversation: a list of chat messages.")
    prompt_key: str | None = Field(
        None,
        description="Column with the prompt (a string, or chat messages), for rows that hold no whole conversation.",
    )
    response_key: str | None = Field(
        None, description="Column with the response to the prompt; a dot goes inside a nested value."
    )
    tools_key: str | None = Field(
        "tools",
        description="Column with the tools of a conversation, which the chat template lists: schemas in OpenAI's form, "
        "or JSON text of them. Rows without it have none; null: no column is read.",
    )
    text_key: str = Field("text", description="Column with the text, for format text without prompt_key.")
    format: Literal["chat", "text"] = Field(
        "chat",
        description="chat: render conversations with the chat template; text: tokenise strings as they are, and "
        "append the end-of-sequence token.",
    )
    system_prompt: str | None = Field(None, description=_SYSTEM)
    thinking: bool | None = Field(None, description=_THINKING)
    loss_on: Literal["all_assistant", "last_assistant"] = Field(
        "all_assistant",
        description="Which of the assistant's turns are trained on; a message with train: false never is.",
    )
    max_tokens: PositiveInt = Field(2048, description="Longest conversation allowed, in tokens.")
    over_long: Literal["refuse", "filter", "truncate"] = Field(
        "refuse",
        description="What happens to conversations over max_tokens. refuse: an error; filter: they are left out; "
        "truncate: they are cut at their end. `hybridflow check` counts them.",
    )
    order: FunctionName = Field("shuffled", description=_ORDER)

    @model_validator(mode="after")
    def _check(self) -> SftDataSection:
        _check_style(self.format, self.system_prompt, self.thinking, self.order)
        if (self.prompt_key is None) != (self.response_key is None):
            raise ValueError("prompt_key and response_key belong together: give both or neither")
        return self
