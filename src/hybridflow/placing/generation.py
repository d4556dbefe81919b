"""Makes the generation engine of a configuration's `rollout` section, and the way it samples."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hybridflow.chat.special_tokens import stop_decoder
from hybridflow.config.sections.placement import PlacementSection
from hybridflow.config.sections.rollout import GenerationSection, InlineSection, OwnEngine
from hybridflow.placing.build import role_tokenizer
from hybridflow.placing.role import Role
from hybridflow.protocols.generation import RolloutEngine, Sampling
from hybridflow.rollout.inline.engine import InlineEngine
from hybridflow.rollout.startup import EngineModel, Launch, Supervision
from hybridflow.weights.channel import WeightRoute

if TYPE_CHECKING:
    from hybridflow.rollout.served.engine import AsyncEngine
    from hybridflow.rollout.vllm.engine import VllmEngine


def inline_engine(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    section: InlineSection | None = None,
    *,
    stop: Sequence[str] = (),
    same_memory: bool = False,
    keep_turns: bool = False,
) -> InlineEngine:
    """Makes the inline engine on this model, with the section's settings.

    Args:
        model: a model that `models.load` loaded.
        tokenizer: decodes responses, where a text ends them.
        section: None takes its defaults.
        stop: texts that may end responses, besides those of the section.
        same_memory: see `InlineEngine`.
        keep_turns: see `InlineEngine`.
    """
    r = section or InlineSection()
    return InlineEngine(
        model,
        max_cache_tokens=r.max_cache_tokens,
        decode=stop_decoder(tokenizer, [*r.stop, r.stop_regex, *stop]),
        dtype=None if r.dtype == "auto" else getattr(torch, r.dtype),
        compile=r.compile,
        same_memory=same_memory,
        keep_turns=keep_turns,
    )


def own_engine(
    role: Role,
    section: OwnEngine,
    placement: PlacementSection,
    start: Path | None,
    *,
    run_folder: Path | None = None,
    note: Callable[[str, str], None] | None = None,
) -> RolloutEngine:
    """Starts vLLM or SGLang, with weights of its own and the section's settings.

    Args:
        role: the actor's.
        section: how responses are generated.
        placement: how weights travel to its processes.
        start: the folder of a model to begin with; None where servers run already.
        run_folder: see `Launch`.
        note: called with (kind, text) for events of the engine's processes.

    Raises:
        UserError: the engine is missing, of another version, or refuses the configuration; no server responds.
    """
    assert role.longest is not None
    model = EngineModel(
        start,
        role.longest,
        tensor_parallel=section.tensor_parallel if section.engine == "sglang" or section.mode != "in_process" else 1,
        dtype=None if section.dtype == "auto" else section.dtype,
        seed=role.seed,
        engine_args=section.engine_args,
    )
    ours: dict[str, Any] = {
        "supervision": Supervision(section.start_timeout, section.answer_timeout, section.restarts),
        "route": WeightRoute(placement.transport, placement.folder, placement.delta),
        "decode": stop_decoder(role_tokenizer(role), [*section.stop, section.stop_regex]),
    }
    if section.engine == "sglang" or section.mode == "server":
        ours["launch"] = Launch(section.python, run_folder)
    if section.mode == "server":
        ours |= {"servers": section.servers, "replicas": section.replicas}
    if section.engine == "vllm":
        ours["lora"] = role.model.lora if role.publish == "adapters" else None
    engine: VllmEngine | AsyncEngine
    # vLLM and SGLang take seconds to import, and live in environments of their own.
    if section.engine == "vllm" and section.mode == "server":
        from hybridflow.rollout.vllm.server import VllmServerEngine

        engine = VllmServerEngine(model, **ours)
    elif section.engine == "vllm":
        from hybridflow.rollout.vllm.engine import VllmEngine

        engine = VllmEngine(model, mode=section.mode, **ours)
    elif section.mode == "server":
        from hybridflow.rollout.sglang.server import SglangServerEngine

        engine = SglangServerEngine(model, **ours)
    else:
        from hybridflow.rollout.sglang.engine import SglangEngine

        engine = SglangEngine(model, **ours)
    if note is not None:
        engine.note = note
    return engine


def describe_engine(section: OwnEngine) -> str:
    """Describes in one line the engine that generates, for `check`.

    Raises:
        UserError: it is missing, or of another version.
    """
    if section.mode == "server" and section.servers:
        return f"{section.engine} at {', '.join(section.servers)}: contacted when the run starts"
    if section.engine == "sglang":
        from hybridflow.rollout.sglang.start import require_sglang

        return require_sglang(section.python)
    if section.mode == "server":
        from hybridflow.rollout.vllm.server import require_vllm_at

        return require_vllm_at(section.python or sys.executable)
    from hybridflow.rollout.vllm.engine import require_vllm

    return require_vllm()


def training_sampling(section: GenerationSection, stop_token_ids: tuple[int, ...]) -> Sampling:
    """Returns how training samples are drawn.

    Args:
        section: the configuration.
        stop_token_ids: tokens that end a response.
    """
    return Sampling(
        section.max_response_tokens,
        section.temperature,
        stop_token_ids,
        **section.cut,
        stop=tuple(section.stop),
        stop_regex=section.stop_regex,
    )
