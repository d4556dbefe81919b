"""The configuration of an evaluation: `hybridflow eval`."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator, model_validator

from hybridflow.config.sections.agent import AgentSection
from hybridflow.config.sections.base import Section
from hybridflow.config.sections.data import PromptDataSection
from hybridflow.config.sections.eval import EvalSection
from hybridflow.config.sections.model import ModelSection
from hybridflow.config.sections.rewards import RewardSection
from hybridflow.config.sections.rollout import InlineSection
from hybridflow.config.sections.run import RunSection


class EvalConfig(Section):
    """An evaluation: `hybridflow eval`."""

    run: RunSection
    model: ModelSection
    data: PromptDataSection
    reward: RewardSection
    rollout: InlineSection = InlineSection()
    agent: AgentSection | None = Field(None, description="As in training.")
    eval: EvalSection = EvalSection()

    @field_validator("rollout", mode="before")
    @classmethod
    def _check_engine(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("engine", "inline") != "inline":
            raise ValueError("hybridflow eval generates with the inline engine: leave rollout.engine out")
        return given

    @model_validator(mode="after")
    def _check_data(self) -> EvalConfig:
        if self.data.eval is None and (self.agent is None or self.agent.eval_tasks is None):
            raise ValueError("data.eval is missing: there is nothing to evaluate on")
        if self.model.lora is not None:
            raise ValueError(
                "model.lora is for training; to evaluate adapters, write them into a model with `hybridflow export RUN "
                "FOLDER` and give that folder as model.path"
            )
        return self
