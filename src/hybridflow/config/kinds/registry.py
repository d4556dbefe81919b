"""The kinds of runs. An entry here gives a command, and is what all other commands know of the kind.

`hybridflow NAME`, `check`, `check --explain`, `init`, `schema`, completion and the page of keys read `KINDS`. Functions
are named, not imported: a configuration is read, and its mistakes are reported, before torch is imported.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from hybridflow.config.kinds import starters
from hybridflow.config.kinds.eval import EvalConfig
from hybridflow.config.kinds.reward_model import RewardModelConfig
from hybridflow.config.kinds.rl import RlConfig
from hybridflow.config.kinds.sft import SftConfig
from hybridflow.config.kinds.starters import Starter
from hybridflow.config.sections.base import Section
from hybridflow.errors import UserError

if TYPE_CHECKING:
    from hybridflow.config.checks.placement import RolesOfRun
    from hybridflow.config.sections.engine import EngineSection
    from hybridflow.config.sections.model import ModelSection
    from hybridflow.config.sections.placement import PlacementSection
    from hybridflow.config.sections.run import CheckpointSection, RunSection, TrackSection
    from hybridflow.config.sections.train import LengthSection


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of run.

    Args:
        name: of its command.
        config: the class of its configuration; of a kind that trains it has the sections of `TrainingConfig`.
        check: the function behind `hybridflow check`, as "package.module.function". It is given a configuration, gives
            lines, and raises a UserError for the first mistake.
        train: the function that runs a configuration to its end, or to where it is asked to stop; None for a kind that
            does not train, whose command has arguments of its own.
        what: the run, as a heading.
        does: what the command does, for the list of commands.
        example: arguments of the command.
        starter: what `hybridflow init` writes.
    """

    name: str
    config: type[Section]
    check: str
    train: str | None = None
    what: str
    does: str
    example: str
    starter: Starter = field(default_factory=Starter)

    def checked(self, config: Section, **objects: Any) -> Iterator[str]:
        """Checks a configuration of this kind; yields the findings line by line.

        Args:
            config: the configuration.
            objects: what a program gives beside it, as keyword arguments of the function `check`.

        Raises:
            UserError: the first mistake.
        """
        lines: Iterator[str] = _imported(self.check)(config, **objects)
        return lines

    def trained(self, config: TrainingConfig, **objects: Any) -> None:
        """Runs a configuration of this kind to its end, or until it is asked to stop.

        Args:
            config: the configuration.
            objects: what a program gives beside it, as keyword arguments of the function `train`.
        """
        assert self.train is not None
        _imported(self.train)(config, **objects)


class TrainingConfig(Protocol):
    """What the configurations of all kinds that train have."""

    @property
    def run(self) -> RunSection:
        """Its folder, and what makes it repeatable."""

    @property
    def model(self) -> ModelSection:
        """The model that is trained."""

    @property
    def train(self) -> LengthSection:
        """Where the run ends."""

    @property
    def engine(self) -> EngineSection:
        """How the model is sharded over its pool."""

    @property
    def placement(self) -> PlacementSection:
        """The pools of processes."""

    @property
    def checkpoint(self) -> CheckpointSection:
        """When it is saved."""

    @property
    def track(self) -> TrackSection:
        """Where its records go."""

    def roles(self) -> RolesOfRun:
        """Returns the models of the run."""

    def model_dump(self, *, mode: str = "python") -> dict[str, Any]:
        """Returns plain values, by section."""


def _imported(name: str) -> Any:
    module, _, function = name.rpartition(".")
    return getattr(importlib.import_module(module), function)


def kind_for(config: Any) -> Kind:
    """Returns the kind of run that a configuration describes.

    Raises:
        UserError: of none.
    """
    for kind in KINDS.values():
        if kind.config is type(config):
            return kind
    raise UserError(
        f"{type(config).__name__} is the configuration of no kind of run",
        why=f"there are {', '.join(kind.config.__name__ for kind in KINDS.values())}",
        fix="add a kind to KINDS (hybridflow.config.kinds.registry), or give one of these",
    )


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(
            name="train",
            config=RlConfig,
            check="hybridflow.commands.check.check_rl",
            train="hybridflow.trainers.rl.loop.train",
            what="Reinforcement learning",
            does="reinforcement learning: generate, score, update",
            example="recipes/carry/grpo.yaml optim.lr=5e-5",
            starter=starters.RL,
        ),
        Kind(
            name="sft",
            config=SftConfig,
            check="hybridflow.commands.check.check_sft",
            train="hybridflow.trainers.sft.train_sft",
            what="Supervised fine-tuning",
            does="supervised fine-tuning on conversations",
            example="recipes/carry/sft.yaml train.steps=300",
            starter=starters.SFT,
        ),
        Kind(
            name="reward-model",
            config=RewardModelConfig,
            check="hybridflow.commands.check_preferences.check_preferences",
            train="hybridflow.trainers.reward_model.train_reward_model",
            what="A reward model",
            does="train a model that scores responses, on preferences",
            example="recipes/rlhf/reward-model.yaml",
            starter=starters.REWARD_MODEL,
        ),
        Kind(
            name="eval",
            config=EvalConfig,
            check="hybridflow.commands.check.check_eval",
            what="An evaluation",
            does="score a model's responses, or compare two models with a paired test",
            example="recipes/carry/eval.yaml",
            starter=starters.EVALUATION,
        ),
    )
}
