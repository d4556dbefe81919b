"""The models beside the actor: a critic, which is trained with it, and a reference, which never is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hybridflow.checkpoint.weights import read_weights, write_weights
from hybridflow.config.sections import ModelSection, RlConfig
from hybridflow.engines.local import LocalEngine
from hybridflow.engines.reference import LocalReference
from hybridflow.errors import UserError
from hybridflow.models.load import load_model, load_tokenizer, require_context
from hybridflow.models.lora import has_adapters, load_trainable
from hybridflow.models.value import ValueHead, read_value_head, value_head, write_value_head

PREFIX = "critic."  # of the critic's parameters among the moments of a checkpoint


@dataclass
class Critic:
    """What values the states of answers.

    Args:
        engine: scores "value" and learns "value"; the actor's own engine where the trunk is shared.
        shared: whether it is.
        head: the value head.
        tokenizer: saved beside the critic's weights; the actor's.
    """

    engine: LocalEngine
    shared: bool
    head: ValueHead
    tokenizer: PreTrainedTokenizerBase

    def write(self, folder: Path) -> None:
        """Writes ``critic/`` into a checkpoint: the value head, and the weights where they are not the actor's."""
        (folder / "critic").mkdir()
        write_value_head(self.head, folder / "critic")
        if not self.shared:
            write_weights(self.engine.model, self.tokenizer, folder / "critic")

    def read(self, folder: Path) -> None:
        """Reads what `write` wrote.

        Raises:
            UserError: it is another critic's.
        """
        read_value_head(self.head, folder / "critic")
        if not self.shared:
            read_weights(self.engine.model, folder / "critic")

    def join_state(self, actor: dict[str, Any]) -> dict[str, Any]:
        """The actor's engine state with the critic's beside it, as one checkpoint keeps them."""
        if self.shared:
            return actor
        own = self.engine.state()
        moments = {PREFIX + name: kept for name, kept in own["moments"].items()}
        plain = {key: value for key, value in own.items() if key != "moments"}
        return {**actor, "moments": actor["moments"] | moments, "critic": plain}

    def load_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Takes the critic's part out of what `join_state` made, and returns the actor's."""
        if self.shared:
            return dict(state)
        own = {n.removeprefix(PREFIX): kept for n, kept in state["moments"].items() if n.startswith(PREFIX)}
        self.engine.load({**state["critic"], "moments": own})
        moments = {n: kept for n, kept in state["moments"].items() if not n.startswith(PREFIX)}
        return {key: value for key, value in state.items() if key != "critic"} | {"moments": moments}


def check_companions(config: RlConfig, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Says what stands beside the actor, before anything is loaded.

    Raises:
        UserError: one of them reads other tokens than the actor.
    """
    c, reference = config.critic, config.model.reference
    for key, path in (("critic.path", c.path if c else None), ("model.reference", reference)):
        if path is not None:
            _require_same_tokens(load_tokenizer(path, seed=config.run.seed), tokenizer, f"{key} {path}")
    if c is not None and c.shared_trunk:
        yield "critic: a value head on the actor's own trunk"
    elif c is not None:
        alone = f"; it is trained alone in the first {c.warmup_steps} steps" if c.warmup_steps else ""
        yield f"critic: a model of its own, from {c.path or config.model.path}{alone}"
    if config.algorithm.needs_reference and reference is None and config.model.lora is not None:
        yield "reference: the actor with its adapters switched off"
    elif config.algorithm.needs_reference:
        yield f"reference: a second model that is never trained, {reference or config.model.path}"


def make_critic(
    config: RlConfig, actor: LocalEngine, tokenizer: PreTrainedTokenizerBase, *, steps: int
) -> Critic | None:
    """The critic of a configuration, if it has one.

    Args:
        config: the configuration.
        actor: the actor's engine; with a shared trunk it has the value head already.
        tokenizer: the actor's.
        steps: steps of the run.

    Raises:
        UserError: its model cannot be loaded, or reads other tokens than the actor's.
    """
    c, seed = config.critic, config.run.seed
    if c is None:
        return None
    if c.shared_trunk:
        assert actor.value_head is not None
        return Critic(actor, True, actor.value_head, tokenizer)
    section = ModelSection(
        path=c.path or config.model.path,
        lora=c.lora,
        packing=config.model.packing,
        activation_checkpointing=config.model.activation_checkpointing,
        trust_remote_code=config.model.trust_remote_code,
    )
    model, own_tokenizer = load_trainable(section, seed=seed)
    _require_same_tokens(own_tokenizer, tokenizer, f"critic.path {section.path}")
    require_context(model, config.data.max_prompt_tokens + config.rollout.max_response_tokens)
    head, t = value_head(model), config.train
    answers = t.prompts_per_step * t.samples_per_prompt
    engine = LocalEngine(
        model,
        c.optim or config.optim,
        total_steps=steps * (c.epochs_per_step or t.epochs_per_step) * (answers // (t.sequences_per_update or answers)),
        tokens_per_microbatch=config.train.tokens_per_microbatch,
        device=actor.device,
        value_head=head,
        name="critic",
    )
    return Critic(engine, False, head, tokenizer)


def make_reference(
    config: RlConfig, actor: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> LocalReference | None:
    """The reference of a configuration, if something uses one: the actor without its adapters, or a frozen model.

    Raises:
        UserError: its model cannot be loaded, or reads other tokens than the actor's.
    """
    if not config.algorithm.needs_reference:
        return None
    size, path = config.train.tokens_per_microbatch, config.model.reference
    if path is None and has_adapters(actor):
        return LocalReference(actor, tokens_per_microbatch=size)
    model, own_tokenizer = load_model(
        path or config.model.path,
        seed=config.run.seed,
        packing=config.model.packing,
        trust_remote_code=config.model.trust_remote_code,
    )
    _require_same_tokens(own_tokenizer, tokenizer, f"model.reference {path}")
    require_context(model, config.data.max_prompt_tokens + config.rollout.max_response_tokens)
    return LocalReference(model, tokens_per_microbatch=size, device=device)


def _require_same_tokens(own: PreTrainedTokenizerBase, actors: PreTrainedTokenizerBase, what: str) -> None:
    if own.get_vocab() != actors.get_vocab():
        raise UserError(
            f"{what} has another tokenizer than model.path",
            why="it would read other text than the actor wrote",
            fix="give a model with the same tokenizer",
        )
