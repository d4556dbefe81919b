"""The sections that say where a run lives, what it keeps, and where its records go."""

from __future__ import annotations

from typing import Literal

from pydantic import (
    Field,
    PositiveFloat,
    PositiveInt,
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
