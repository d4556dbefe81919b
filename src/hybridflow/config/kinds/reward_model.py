"""The configuration of `hybridflow reward-model`: training a model that scores responses. Importable without torch."""

from __future__ import annotations

from pydantic import model_validator

from hybridflow.config.checks.placement import PlacedModel, RolesOfRun, check_placement
from hybridflow.config.sections.base import Section
from hybridflow.config.sections.engine import EngineSection, LocalSection
from hybridflow.config.sections.model import ModelSection
from hybridflow.config.sections.optim import OptimSection
from hybridflow.config.sections.placement import PlacementSection
from hybridflow.config.sections.preference import PreferenceDataSection, RewardModelEvalSection, RewardModelTrainSection
from hybridflow.config.sections.run import CheckpointSection, RunSection, TrackSection


class RewardModelConfig(Section):
    """A run that trains a reward model on preferences: `hybridflow reward-model`."""

    run: RunSection
    model: ModelSection
    data: PreferenceDataSection
    train: RewardModelTrainSection
    optim: OptimSection = OptimSection()
    engine: EngineSection = LocalSection()
    placement: PlacementSection = PlacementSection()
    eval: RewardModelEvalSection = RewardModelEvalSection()
    checkpoint: CheckpointSection = CheckpointSection()
    track: TrackSection = TrackSection()

    @model_validator(mode="after")
    def _check(self) -> RewardModelConfig:
        t = self.train
        check_placement(self.placement, self.roles(), packing=self.model.packing)
        if self.model.lora is not None:
            raise ValueError("model.lora: a reward model is trained as a whole; leave it out")
        if self.model.liger:
            raise ValueError("model.liger is for models that predict tokens; leave it out")
        if self.eval.every and self.data.eval is None:
            raise ValueError("eval.every is set, but data.eval names no held-out pairs")
        if self.checkpoint.best is not None:
            raise ValueError("checkpoint.best is for `hybridflow train`; leave it out (checkpoint.keep keeps more)")
        if t.tokens_per_microbatch <= self.data.max_tokens:
            raise ValueError(
                f"train.tokens_per_microbatch is {t.tokens_per_microbatch}, but one conversation can have "
                f"data.max_tokens = {self.data.max_tokens}, and one more token where it is read; set it to "
                f"{self.data.max_tokens + 1} or more, or lower data.max_tokens"
            )
        return self

    def roles(self) -> RolesOfRun:
        """Returns one model, which is trained."""
        return RolesOfRun((PlacedModel("actor", self.engine),))
