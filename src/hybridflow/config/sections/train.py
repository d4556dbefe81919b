"""The sections that say how much is generated and trained on.

Sizes say their unit in their name and are never per device: `prompts_per_step` prompts are drawn for a step, the
policy generates `samples_per_prompt` responses to each, and one optimizer step takes `sequences_per_update` of those
responses.
"""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import Field, PositiveInt, model_validator

from hybridflow.config.sections.base import Section


class LengthSection(Section):
    """How long a run is: the base of the section ``train`` of every kind of run that trains."""

    ends: ClassVar[tuple[str, ...]] = ("steps", "epochs")  # the keys that decide where the run ends

    steps: PositiveInt | None = Field(None, description="Steps of the run. Give this or train.epochs.")
    epochs: PositiveInt | None = Field(None, description="Passes over the training rows, instead of train.steps.")

    @property
    def longer(self) -> str:
        """What makes the run longer, as an advice."""
        return "raise train.steps (or train.epochs)"

    @model_validator(mode="after")
    def _steps_or_epochs(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            given = "both are" if self.steps else "neither is"
            raise ValueError(f"give train.steps or train.epochs, one of them; {given} given")
        return self


class RlTrainSection(LengthSection):
    """How much is generated and trained on."""

    steps: PositiveInt | None = Field(
        None,
        description="Number of steps; each generates, scores, updates and publishes weights. Give this or "
        "train.epochs.",
    )
    epochs: PositiveInt | None = Field(
        None,
        description="Passes over the training rows, instead of train.steps. Rows left over at the end of an epoch "
        "begin the next epoch's first step.",
    )
    prompts_per_step: PositiveInt = Field(description="Number of prompts in one step.")
    samples_per_prompt: PositiveInt = Field(description="Number of responses to each prompt (the group size).")
    sequences_per_update: PositiveInt | None = Field(
        None,
        description="Number of responses in one optimizer step (the mini-batch); unset: all responses of the step, in "
        "one on-policy update.",
    )
    epochs_per_step: PositiveInt = Field(1, description="Passes over a step's responses.")
    tokens_per_microbatch: PositiveInt = Field(
        16_384,
        description="Most tokens in one forward pass (the micro-batch). A sequence is never cut, so it must hold the "
        "longest one.",
    )
    skip_zero_advantage: bool = Field(
        True,
        description="Skip the forward pass of responses whose loss is always zero (usually groups of equal reward). "
        "They still count in denominators, so the gradient is the same.",
    )

    @property
    def answers_per_step(self) -> int:
        """Responses that one step generates."""
        return self.prompts_per_step * self.samples_per_prompt

    @property
    def answers_per_update(self) -> int:
        """Responses in one optimizer step: as configured, else all of a step's."""
        return self.sequences_per_update or self.answers_per_step

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps that one step makes."""
        return self.updates_in(self.epochs_per_step)

    def updates_in(self, passes: int) -> int:
        """Counts the optimizer steps in this many passes over a step's responses."""
        return passes * (self.answers_per_step // self.answers_per_update)


class SftTrainSection(LengthSection):
    """How much to train on."""

    ends: ClassVar[tuple[str, ...]] = (*LengthSection.ends, "stop_below_loss")

    steps: PositiveInt | None = Field(
        None, description="Number of optimizer steps (at most, if stop_below_loss is set). Give this or train.epochs."
    )
    epochs: PositiveInt | None = Field(
        None,
        description="Passes over the rows, instead of train.steps. Rows left over at the end of an epoch begin the "
        "next epoch's first step.",
    )
    sequences_per_update: PositiveInt = Field(64, description="Number of conversations in one optimizer step.")
    tokens_per_microbatch: PositiveInt = Field(
        16_384,
        description="Most tokens in one forward pass (the micro-batch). A sequence is never cut, so it must hold the "
        "longest one.",
    )
    stop_below_loss: float | None = Field(
        None, gt=0, description="End early once the mean loss of the last 20 steps is below this."
    )

    @property
    def longer(self) -> str:
        """What makes the run longer, as an advice."""
        return super().longer + " or lower train.stop_below_loss" * (self.stop_below_loss is not None)
