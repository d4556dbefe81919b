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
    eval: Sources | None = Field(None, description="Held-out pairs, same forms without weights.")
    prompt_key: str | None = Field(
        "prompt",
        description="Column with the prompt: a string or chat messages. null: the answers are whole conversations.",
    )
    chosen_key: str = Field(
        "chosen",
        description="Column with the preferred answer: a string, or chat messages; these go on after the prompt, "
        "unless they begin with it.",
    )
    rejected_key: str = Field("rejected", description="Column with the other answer, in the same form.")
    margin_key: str | None = Field(
        None, description="Column with a number: by how much the preferred answer should be ahead (as Llama 2 does)."
    )
    template: ReadPath | None = Field(
        None,
        description="Jinja file from messages to the text that is read; unset: the tokenizer's chat template. The "
        "trained model's tokenizer has it as its chat template.",
    )
    max_tokens: PositiveInt = Field(2048, description="Longest conversation allowed, in tokens.")
    over_long: Literal["refuse", "filter"] = Field(
        "refuse",
        description="What happens to pairs with a conversation over max_tokens: an error, or left out. `hybridflow "
        "check` says how many there are.",
    )
    order: FunctionName = Field(
        "shuffled",
        description="Order of each epoch: shuffled, sequential, or file.py:function, which takes any of rows, seed and "
        "epoch and returns the positions of the rows in the order to draw them.",
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

    steps: PositiveInt | None = Field(None, description="Optimizer steps. Give this or train.epochs.")
    epochs: PositiveInt | None = Field(
        None, description="Passes over the pairs, instead of train.steps; rows left over open the next epoch's first."
    )
    pairs_per_update: PositiveInt = Field(description="Pairs in one optimizer step.")
    tokens_per_microbatch: PositiveInt = Field(16_384, description="Most tokens in one forward pass.")
    center_coef: float = Field(
        0.0, ge=0, description="Weight of the squared sum of a pair's rewards, which holds rewards around 0."
    )


class RewardModelEvalSection(Section):
    """The held-out pairs (data.eval)."""

    every: int = Field(0, ge=0, description="Score them after every so many steps; 0: before and after training only.")
    max_rows: PositiveInt | None = Field(None, description="Use only the first of them.")
