"""Builds models of roles, in the process that will compute them: whole, or this rank's part."""

from __future__ import annotations

import torch
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hybridflow.config.sections.engine import ShardedSection
from hybridflow.engines.fsdp.engine import ShardedEngine, ShardedReference
from hybridflow.engines.fsdp.load import load_sharded
from hybridflow.engines.local import LocalEngine
from hybridflow.engines.reference import LocalReference
from hybridflow.models.load import load_tokenizer, require_context
from hybridflow.models.lora import load_trainable
from hybridflow.models.ulysses import check_degree
from hybridflow.models.value import value_head
from hybridflow.placing.role import Role


def load_role(role: Role, *, outline: bool = False) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads the whole model of a role, in this process, and its tokenizer.

    Args:
        role: which model.
        outline: without its weights: what would be refused is then refused before anything starts.

    Raises:
        UserError: it cannot be loaded or not be cut as its engine section says, or a sequence can be longer than its
            context.
    """
    model, tokenizer = load_trainable(role.model, seed=role.seed, classifier=role.classifier, outline=outline)
    if role.longest is not None:
        require_context(model, role.longest)
    check_degree(model.config.get_text_config().num_attention_heads, role.engine.sequence_parallel)
    return model, tokenizer


def role_tokenizer(role: Role) -> PreTrainedTokenizerBase:
    """Loads the tokenizer alone."""
    return load_tokenizer(role.model.path, seed=role.seed, trust_remote_code=role.model.trust_remote_code)


def local_engine(role: Role, device: torch.device) -> LocalEngine:
    """Makes the engine of a role that is trained by one process: this one.

    Raises:
        UserError: see `load_role`.
    """
    assert role.optim is not None and role.name in ("actor", "critic")
    model, _ = load_role(role)
    return LocalEngine(
        model,
        role.optim,
        total_steps=role.total_steps,
        tokens_per_microbatch=role.tokens_per_microbatch,
        device=device,
        value_head=value_head(model) if role.value_head else None,
        name=role.name,
        dtype=role.engine.dtype,
    )


def local_reference(role: Role, device: torch.device) -> LocalReference:
    """Makes the scorer of a role that is never trained, in this process.

    Raises:
        UserError: see `load_role`.
    """
    model, _ = load_role(role)
    return LocalReference(
        model,
        tokens_per_microbatch=role.tokens_per_microbatch,
        device=device,
        dtype=role.engine.dtype,
        keeps=role.name == "reward",
    )


def engine_of(role: Role, device: torch.device) -> LocalEngine | ShardedEngine | LocalReference | ShardedReference:
    """Makes a role's engine or scorer, for the whole model or this rank's part."""
    trained = role.optim is not None
    if role.engine.strategy == "local":
        return local_engine(role, device) if trained else local_reference(role, device)
    return sharded_engine(role, role.engine, device) if trained else sharded_reference(role, role.engine, device)


def sharded_engine(role: Role, section: ShardedSection, device: torch.device) -> ShardedEngine:
    """Makes this rank's part of a model that is trained."""
    assert role.optim is not None and role.name in ("actor", "critic")
    model = _sharded_model(role)
    return ShardedEngine(
        model,
        role.optim,
        section=section,
        total_steps=role.total_steps,
        tokens_per_microbatch=role.tokens_per_microbatch,
        device=device,
        value_head=value_head(model) if role.value_head else None,
        name=role.name,
    )


def sharded_reference(role: Role, section: ShardedSection, device: torch.device) -> ShardedReference:
    """Makes this rank's part of a model that is never trained."""
    model = _sharded_model(role)
    return ShardedReference(model, section=section, tokens_per_microbatch=role.tokens_per_microbatch, device=device)


def _sharded_model(role: Role) -> PreTrainedModel:
    model, _ = load_sharded(role.model, seed=role.seed, classifier=role.classifier)
    if role.longest is not None:
        require_context(model, role.longest)
    return model
