"""The sections of reward models: preferences, training, evaluation."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from hybridflow.config.paths import FunctionName, ReadPath
from hybridflow.config.sections.base import Section
from hybridflow.config.sections.data import Sources
from hybridflow.config.sections.train import LengthSection


class PreferenceDataSection(Section):
    """Pairs of responses of which one was preferred."""

    train: Sources = Field(
        description="Training pairs: a file (.jsonl, .csv, .parquet, ...), file.py:function returning dicts, or a name "
        "on the Hugging Face hub; or a list of these, each a string or {source, weight}."
    )
    eval: Sources | None = Field(None, description="Held-out pairs, in the same forms without weights.")
    prompt_key: str | None = Field(
        "prompt",
        description="Column with the prompt: a string or chat messages. null: the responses are whole conversations.",
    )
    chosen_key: str = Field(
        "chosen",
        description="Column with the preferred response: a string, or chat messages, which follow the prompt unless "
        "they repeat it.",
    )
    rejected_key: str = Field("rejected", description="Column with the other response, in the same form.")
    margin_key: str | None = Field(
        None,
        description="Column with a number: the margin by which the preferred response should score higher (as in "
        "Llama 2).",
    )
    template: ReadPath | None = Field(
        None,
        description="Jinja file that renders messages to the text that the model reads; unset: the tokenizer's chat "
        "template. The trained model's tokenizer keeps it as its chat template.",
    )
    max_tokens: PositiveInt = Field(2048, description="Longest conversation allowed, in tokens.")
    over_long: Literal["refuse", "filter"] = Field(
        "refuse",
        description="What happens to pairs with a conversation over max_tokens. refuse: an error; filter: they are "
        "left out. `hybridflow check` counts them.",
    )
    order: FunctionName = Field(
        "shuffled",
        description="Order of each epoch: shuffled, sequential, or file.py:function, which takes any of rows, seed "
        "and epoch and returns the row numbers in the order to draw them.",
    )

    @model_validator(mode="after")
    def _check(self) -> PreferenceDataSection:
        if self.order not in ("shuffled", "sequential") and ".py:" not in self.order:
            raise ValueError(f"order is {self.order!r}; give shuffled, sequential or file.py:function")
        if any(entry.weight is not None for entry in self.eval or []):
            raise ValueError("eval sources have no weight: every pair is scored")
        return self


class RewardModelTrainSection(LengthSection):
    """How much to train on."""

    steps: PositiveInt | None = Field(None, description="Number of optimizer steps. Give this or train.epochs.")
    epochs: PositiveInt | None = Field(
        None,
        description="Passes over the pairs, instead of train.steps. Pairs left over at the end of an epoch begin the "
        "next epoch's first step.",
    )
    pairs_per_update: PositiveInt = Field(description="Number of pairs in one optimizer step.")
    tokens_per_microbatch: PositiveInt = Field(
        16_384,
        description="Most tokens in one forward pass (the micro-batch). A sequence is never cut, so it must hold the "
        "longest one.",
    )
    center_coef: float = Field(
        0.0, ge=0, description="Weight of the squared sum of a pair's rewards, which keeps rewards around 0."
    )


class RewardModelEvalSection(Section):
    """The held-out pairs (data.eval)."""

    every: int = Field(
        0, ge=0, description="Steps between two evaluations of the held-out pairs; 0: only before and after training."
    )
    max_rows: PositiveInt | None = Field(
        None, description="Use only this many of the first held-out pairs; unset: all."
    )
