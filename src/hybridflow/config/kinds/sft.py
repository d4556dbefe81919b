"""The configuration of supervised fine-tuning: `hybridflow sft`."""

from __future__ import annotations

from pydantic import model_validator

from hybridflow.config.checks.placement import PlacedModel, RolesOfRun, check_placement
from hybridflow.config.sections.base import Section
from hybridflow.config.sections.data import SftDataSection
from hybridflow.config.sections.engine import EngineSection, LocalSection
from hybridflow.config.sections.model import ModelSection
from hybridflow.config.sections.optim import OptimSection
from hybridflow.config.sections.placement import PlacementSection
from hybridflow.config.sections.run import CheckpointSection, RunSection, TrackSection
from hybridflow.config.sections.train import SftTrainSection


class SftConfig(Section):
    """A supervised fine-tuning run: `hybridflow sft`."""

    run: RunSection
    model: ModelSection
    data: SftDataSection
    train: SftTrainSection
    optim: OptimSection = OptimSection()
    engine: EngineSection = LocalSection()
    placement: PlacementSection = PlacementSection()
    checkpoint: CheckpointSection = CheckpointSection()
    track: TrackSection = TrackSection()

    @model_validator(mode="after")
    def _check_sizes(self) -> SftConfig:
        check_placement(self.placement, self.roles(), packing=self.model.packing)
        if self.checkpoint.best is not None:
            raise ValueError(
                f"checkpoint.best is {self.checkpoint.best}, but supervised fine-tuning measures nothing held out; "
                "leave it out"
            )
        if self.train.tokens_per_microbatch < self.data.max_tokens:
            raise ValueError(
                f"train.tokens_per_microbatch is {self.train.tokens_per_microbatch}, but one conversation can have "
                f"data.max_tokens = {self.data.max_tokens}; set it to {self.data.max_tokens} or more, or lower "
                "data.max_tokens"
            )
        return self

    def roles(self) -> RolesOfRun:
        """Returns one model, which is trained."""
        return RolesOfRun((PlacedModel("actor", self.engine),))
