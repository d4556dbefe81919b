"""The typed sections of a run's configuration. Importable without torch.

Sizes say their unit in their name and are never per device: `prompts_per_step` prompts are drawn for a step,
each is answered `samples_per_prompt` times, and one optimizer step takes `sequences_per_update` of those answers.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import (
    Field,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from hybridflow.config.paths import WrittenPath
from hybridflow.config.sections.base import Section


class RunSection(Section):
    """Where the run lives and how it is repeated."""

    folder: WrittenPath = Field(description="Folder of the run: metrics, rollouts, journal, checkpoints, report.")
    seed: int = Field(0, ge=0, description="Seed of everything random: noise, data order, fresh weights.")
    resume: Literal["auto", "never", "moved"] = Field(
        "auto",
        description="auto: go on where the folder's last checkpoint and journal end; never: refuse such a folder; "
        "moved: as auto, where files of the model and the data are elsewhere now and what is in them does not tell.",
    )
    threads: PositiveInt | None = Field(
        None, description="torch threads; unset leaves torch's own choice. Part of what makes a run repeat bit for bit."
    )
    max_minutes: PositiveFloat | None = Field(
        None, description="Wall-clock limit: when it is reached the run saves a checkpoint and says how to go on."
    )
    device: Literal["auto", "cpu", "cuda", "npu"] = Field(
        "auto", description="Where models run; auto takes an accelerator if any. cuda is AMD's ROCm too."
    )


class LengthSection(Section):
    """How long a run is: the section ``train`` of every kind of run that trains goes on from it."""

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


class CheckpointSection(Section):
    """When to save, and what to keep."""

    every: int = Field(0, ge=0, description="Save after every so many steps; 0: only at the end.")
    keep: PositiveInt = Field(2, description="Newest checkpoints kept; older ones are deleted.")
    best: str | None = Field(
        None,
        description="A held-out metric, such as val-core/SOURCE/reward/mean@1. The step that is best by it is saved, "
        "and kept besides the newest; checkpoints/best.json says which it is.",
    )
    best_mode: Literal["max", "min"] = Field("max", description="Whether a higher or a lower value is better.")
    asynchronous: bool = Field(
        False, description="Copy what is to be saved and write it while the next step runs; a full copy in host memory."
    )


class TrackSection(Section):
    """Where metrics go besides metrics.jsonl."""

    console: bool = Field(True, description="Live progress in the terminal.")
    tensorboard: bool = Field(False, description="TensorBoard event files in the run's folder.")
    wandb: bool = Field(False, description="Weights & Biases; WANDB_MODE=offline keeps it on this machine.")
    project: str = Field("hybridflow", description="Project name for trackers that have one.")
    rollouts_every: int = Field(1, ge=0, description="Write rollouts/step-*.parquet every so many steps; 0: never.")
