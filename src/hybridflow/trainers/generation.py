"""How a configuration's `rollout` section becomes an inline engine and the way it samples."""

from __future__ import annotations

import torch
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hybridflow.config.sections import RolloutSection
from hybridflow.protocols import Sampling
from hybridflow.rollout.inline import InlineEngine


def inline_engine(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, section: RolloutSection | None = None
) -> InlineEngine:
    """The inline engine on this model, as the section says.

    Args:
        model: a model that `models.load` loaded.
        tokenizer: reads answers, where they end by their text.
        section: None takes its defaults.
    """
    r = section or RolloutSection()

    def decode(token_ids: list[int]) -> str:
        return str(tokenizer.decode(token_ids, skip_special_tokens=True))

    return InlineEngine(
        model,
        max_cache_tokens=r.max_cache_tokens,
        decode=decode,
        dtype=None if r.dtype == "auto" else getattr(torch, r.dtype),
        compile=r.compile,
    )


def training_sampling(section: RolloutSection, stop_token_ids: tuple[int, ...]) -> Sampling:
    """How training samples are drawn.

    Args:
        section: the configuration.
        stop_token_ids: tokens that end an answer.
    """
    return Sampling(
        section.max_response_tokens,
        section.temperature,
        stop_token_ids,
        top_p=section.top_p,
        top_k=section.top_k,
        min_p=section.min_p,
        stop=tuple(section.stop),
        stop_regex=section.stop_regex,
    )
