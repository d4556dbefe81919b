"""The roles of a run's models: enough for any process to build each one.

A role travels to the processes of its pool, which build the model there; without pools it is built in this process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hybridflow.config.kinds.eval import EvalConfig
from hybridflow.config.kinds.reward_model import RewardModelConfig
from hybridflow.config.kinds.rl import RlConfig
from hybridflow.config.kinds.sft import SftConfig
from hybridflow.config.sections.engine import EngineSection, LocalSection
from hybridflow.config.sections.model import ModelSection
from hybridflow.config.sections.optim import OptimSection


@dataclass(frozen=True, kw_only=True)
class Role:
    """One model of a run.

    Args:
        name: actor, critic, reference or reward.
        model: the model that it begins with.
        engine: how it is cut over processes.
        optim: how it is trained; None: never.
        value_head: whether it values states.
        classifier: whether it is a sequence classifier, which values them too.
        total_steps: optimizer steps of the whole run.
        tokens_per_microbatch: most tokens in one forward pass.
        longest: tokens of the longest sequence that it can meet, where that is known beforehand.
        seed: of fresh weights.
        publish: how adapters are sent to an engine that has weights of its own.
        turns: whether its responses have several turns.
    """

    name: Literal["actor", "critic", "reference", "reward"]
    model: ModelSection
    engine: EngineSection
    optim: OptimSection | None
    value_head: bool = False
    classifier: bool = False
    total_steps: int = 0
    tokens_per_microbatch: int
    longest: int | None
    seed: int
    publish: Literal["adapters", "merged"] = "adapters"
    turns: bool = False


def actor_role(config: RlConfig, steps: int) -> Role:
    """Returns the role of the model that a reinforcement-learning run of this many steps trains."""
    c = config.critic
    return Role(
        name="actor",
        model=ModelSection.model_validate({n: getattr(config.model, n) for n in ModelSection.model_fields}),
        engine=config.engine,
        optim=config.optim,
        value_head=c is not None and c.shared_trunk,
        total_steps=(steps - (c.warmup_steps if c else 0)) * config.train.updates_per_step,
        tokens_per_microbatch=config.train.tokens_per_microbatch,
        longest=config.longest,
        seed=config.run.seed,
        publish=config.rollout.lora,
        turns=config.agent is not None,
    )


def critic_role(config: RlConfig, steps: int) -> Role:
    """Returns the role of the critic of a run, where it is a model of its own."""
    c, t = config.critic, config.train
    assert c is not None and not c.shared_trunk
    return Role(
        name="critic",
        model=beside(config, c.path).model_copy(
            update={"lora": c.lora, "activation_checkpointing": config.model.activation_checkpointing}
        ),
        engine=c.engine or config.engine,
        optim=c.optim or config.optim,
        value_head=True,
        total_steps=steps * t.updates_in(c.epochs_per_step or t.epochs_per_step),
        tokens_per_microbatch=t.tokens_per_microbatch,
        longest=config.longest,
        seed=config.run.seed,
    )


def reference_role(config: RlConfig) -> Role:
    """Returns the role of the reference of a run, where it is a model of its own."""
    return Role(
        name="reference",
        model=beside(config, config.model.reference),
        engine=config.model.reference_engine or config.engine,
        optim=None,
        tokens_per_microbatch=config.train.tokens_per_microbatch,
        longest=config.longest,
        seed=config.run.seed,
    )


def sft_role(config: SftConfig, steps: int) -> Role:
    """Returns the role of the model that a supervised run of this many steps trains."""
    return Role(
        name="actor",
        model=config.model,
        engine=config.engine,
        optim=config.optim,
        total_steps=steps,
        tokens_per_microbatch=config.train.tokens_per_microbatch,
        longest=None,  # data.max_tokens is a limit, and rows may all be shorter
        seed=config.run.seed,
    )


def reward_model_role(config: RewardModelConfig, steps: int) -> Role:
    """Returns the role of the model that a run of this many steps trains on preferences."""
    return Role(
        name="actor",
        model=config.model,
        engine=config.engine,
        optim=config.optim,
        classifier=True,
        total_steps=steps,
        tokens_per_microbatch=config.train.tokens_per_microbatch,
        longest=None,  # data.max_tokens is a limit, and pairs may all be shorter
        seed=config.run.seed,
    )


def reward_role(config: RlConfig | EvalConfig, *, packing: bool) -> Role:
    """Returns the role of the reward model of a run.

    Args:
        config: the configuration; it has the section.
        packing: whether its family takes packed sequences.
    """
    section = config.reward.model
    assert section is not None
    engine = section.engine or (config.engine if isinstance(config, RlConfig) else LocalSection())
    budget = config.train.tokens_per_microbatch if isinstance(config, RlConfig) else 0
    return Role(
        name="reward",
        model=ModelSection(path=section.path, packing=packing, trust_remote_code=section.trust_remote_code),
        engine=engine.model_copy(update={"dtype": section.dtype}),
        optim=None,
        classifier=True,
        tokens_per_microbatch=max(budget, section.max_tokens + 1),
        longest=None,  # its own limit, reward.model.max_tokens, was checked against its context before
        seed=config.run.seed,
    )


def beside(config: RlConfig, path: str | None) -> ModelSection:
    """Returns a model beside the actor, loaded as the actor is; None: the actor's own."""
    m = config.model
    return ModelSection(path=path or m.path, packing=m.packing, liger=m.liger, trust_remote_code=m.trust_remote_code)
