"""The sections that say where a run is stored, what it keeps, and where its records go."""

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
    """Where the run is stored, and what makes it repeatable."""

    folder: WrittenPath = Field(description="Folder of the run: metrics, rollouts, journal, checkpoints, report.")
    seed: int = Field(0, ge=0, description="Seed of everything random: noise, data order, fresh weights.")
    resume: Literal["auto", "never", "moved"] = Field(
        "auto",
        description="auto: resume from the folder's last checkpoint and journal; never: refuse a folder that holds a "
        "run; moved: as auto, and accept new paths of model and data files whose contents do not show "
        "that they are the same.",
    )
    threads: PositiveInt | None = Field(
        None,
        description="Number of torch threads; unset: torch chooses. A run repeats bit for bit only with the same "
        "number.",
    )
    max_minutes: PositiveFloat | None = Field(
        None,
        description="Wall-clock limit, in minutes: when it is reached, the run saves a checkpoint, prints the command "
        "that resumes it, and ends.",
    )
    device: Literal["auto", "cpu", "cuda", "npu"] = Field(
        "auto",
        description="Device that models run on. auto: an accelerator if there is one, else the CPU; cuda: NVIDIA, and "
        "AMD's ROCm.",
    )


class CheckpointSection(Section):
    """When to save, and what to keep."""

    every: int = Field(0, ge=0, description="Steps between two checkpoints; 0: only at the end.")
    keep: PositiveInt = Field(2, description="Number of newest checkpoints to keep; older ones are deleted.")
    best: str | None = Field(
        None,
        description="A held-out metric, such as val-core/SOURCE/reward/mean@1. The best step by it is saved, and kept "
        "besides the newest checkpoints; checkpoints/best.json names it. unset: no best step is kept.",
    )
    best_mode: Literal["max", "min"] = Field("max", description="Whether a higher or a lower value is better.")
    asynchronous: bool = Field(
        False,
        description="Copy the state to host memory and write it while the next step runs; the copy needs memory for "
        "the whole state.",
    )


class TrackSection(Section):
    """Where metrics go besides metrics.jsonl."""

    console: bool = Field(True, description="Live progress in the terminal.")
    tensorboard: bool = Field(False, description="TensorBoard event files in the run's folder.")
    wandb: bool = Field(False, description="Weights & Biases; WANDB_MODE=offline keeps it on this machine.")
    project: str = Field("hybridflow", description="Project name for trackers that have one.")
    rollouts_every: int = Field(1, ge=0, description="Steps between two files rollouts/step-*.parquet; 0: none.")
