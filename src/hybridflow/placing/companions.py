"""The models beside the actor: a critic, which is trained with it, and a reference, which never is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hybridflow.config.kinds.rl import RlConfig
from hybridflow.errors import UserError
from hybridflow.placing.build import load_role
from hybridflow.placing.places import Places
from hybridflow.placing.role import critic_role, reference_role
from hybridflow.protocols.training import Scorer, TrainEngine


@dataclass
class Critic:
    """The model that values the states of responses.

    Args:
        engine: scores "value" and learns "value"; the actor's own engine where the trunk is shared.
        shared: whether the trunk is shared; the actor's part of a checkpoint then has the value head too.
    """

    engine: TrainEngine
    shared: bool


def check_companions(config: RlConfig, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Yields lines on the models beside the actor, before anything is loaded.

    Raises:
        UserError: one of them cannot be loaded, or reads other tokens than the actor.
    """
    c, reference = config.critic, config.model.reference
    require_companions(config, tokenizer)
    if c is not None and c.shared_trunk:
        yield "critic: a value head on the actor's own trunk"
    elif c is not None:
        alone = f"; it is trained alone in the first {c.warmup_steps} steps" if c.warmup_steps else ""
        yield f"critic: a model of its own, from {c.path or config.model.path}{alone}"
    if config.algorithm.needs_reference and reference is None and config.model.lora is not None:
        yield "reference: the actor with its adapters switched off"
    elif config.algorithm.needs_reference:
        yield f"reference: a second model that is never trained, {reference or config.model.path}"


def make_critic(config: RlConfig, actor: TrainEngine, places: Places, *, steps: int) -> Critic | None:
    """Makes the critic of a configuration, if it has one.

    Args:
        config: the configuration.
        actor: the actor's engine; with a shared trunk it has the value head already.
        places: where models are built.
        steps: steps of the run.

    Raises:
        UserError: its model cannot be loaded.
    """
    if config.critic is None:
        return None
    shared = config.critic.shared_trunk
    return Critic(actor if shared else places.trained(critic_role(config, steps)), shared)


def make_reference(config: RlConfig, actor: TrainEngine, places: Places) -> Scorer | None:
    """Makes the reference of a configuration, if something uses one: the actor without its adapters, or a frozen model.

    Raises:
        UserError: its model cannot be loaded.
    """
    if not config.algorithm.needs_reference:
        return None
    if config.model.reference is None and config.model.lora is not None:
        return actor.without_adapters()
    return places.reference(reference_role(config))


def require_companions(config: RlConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Reads the outlines of critic and reference, and compares their tokenizers with the actor's.

    Raises:
        UserError: one of them cannot be loaded, or reads other tokens than the actor.
    """
    c, named = config.critic, []
    if c is not None and not c.shared_trunk:
        named.append(("critic.path", c.path, critic_role(config, 1)))
    if config.model.reference is not None:
        named.append(("model.reference", config.model.reference, reference_role(config)))
    for key, path, role in named:
        if load_role(role, outline=True)[1].get_vocab() != tokenizer.get_vocab():
            raise UserError(
                f"{key} {path} has another tokenizer than model.path",
                why="it would read other text than the actor wrote",
                fix="give a model with the same tokenizer",
            )
