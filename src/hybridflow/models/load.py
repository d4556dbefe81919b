"""Loading a causal language model and its tokenizer, from a folder or from a function of the user's."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_utils import AttentionInterface, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from hybridflow.config.locate import is_function_reference, load_function
from hybridflow.errors import UserError
from hybridflow.models.attention import ATTENTION, attention

AttentionInterface.register(ATTENTION, attention)


def load_model(
    path: str, *, seed: int = 0, base: Path | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, in float32 master weights, with ragged attention and without dropout, and its tokenizer.

    Args:
        path: a folder in Hugging Face format, or ``file.py:function``; the function is called with ``seed=`` (where it
            takes one) and returns (model, tokenizer).
        seed: for a function that makes random weights.

    Raises:
        UserError: nothing there, not a causal language model, or attention that the ragged layout does not cover.
    """
    disable_progress_bar()  # a bar for every load and save drowns the run's own progress
    if is_function_reference(path):
        model, tokenizer = _from_function(path, seed)
    else:
        folder = _require_folder(path)
        try:
            # Every model has eager attention; which attention is used is decided below.
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(
                f"the model in {path} cannot be loaded: {str(error).splitlines()[0]}",
                fix="check that the folder is complete and holds a causal language model",
            ) from error
        tokenizer = load_tokenizer(path)
    _refuse_uncovered_attention(model)
    model.set_attn_implementation(ATTENTION)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # the trainer must score the very distribution that was sampled
    return model, tokenizer


def load_tokenizer(path: str, *, seed: int = 0) -> PreTrainedTokenizerBase:
    """The tokenizer alone; a function reference is called for it, a folder is read.

    Raises:
        UserError: there is no tokenizer, or it has no end-of-sequence token.
    """
    if is_function_reference(path):
        tokenizer = _from_function(path, seed)[1]
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(_require_folder(path))
        except (OSError, ValueError) as error:
            raise UserError(
                f"no tokenizer in {path}: {str(error).splitlines()[0]}",
                fix="save the tokenizer into the model's folder (tokenizer.save_pretrained)",
            ) from error
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {path} has no end-of-sequence token",
            why="without one no answer ever ends before the length limit",
            fix="set eos_token in its tokenizer_config.json",
        )
    return tokenizer


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Token ids that end an answer: the tokenizer's end of sequence, and those of the model's generation config."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    extra = configured if isinstance(configured, list) else [] if configured is None else [configured]
    return tuple(sorted({int(tokenizer.eos_token_id), *map(int, extra)}))


def _require_folder(path: str) -> Path:
    folder = Path(path)
    if not (folder / "config.json").is_file():  # asked before transformers is, which would look for it on the network
        raise UserError(
            f"no model at {path}",
            why="a model folder has a config.json beside its weights",
            fix="give a folder in Hugging Face format, or file.py:function that returns (model, tokenizer)",
        )
    return folder


def _from_function(path: str, seed: int) -> tuple[Any, Any]:
    function = load_function(path)
    takes_seed = "seed" in inspect.signature(function).parameters
    made = function(seed=seed) if takes_seed else function()
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], PreTrainedModel)):
        raise UserError(
            f"{path} must return (model, tokenizer), a transformers model and its tokenizer",
            why=f"it returned {type(made).__name__}",
        )
    made[0].to(torch.float32)
    return made


def _refuse_uncovered_attention(model: PreTrainedModel) -> None:
    config = model.config
    # Older architectures (Mistral, Phi-3) have a window for all layers instead of a type for each.
    untyped = "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
    kinds = set(getattr(config, "layer_types", None) or [untyped])
    uncovered = sorted(kinds - {"full_attention"})
    if getattr(config, "attn_logit_softcapping", None):
        uncovered.append("attention soft-capping")
    if uncovered or not model._supports_attention_backend:
        raise UserError(
            f"{type(model).__name__} uses attention that packed sequences do not cover yet"
            + (f": {', '.join(uncovered)}" if uncovered else ""),
            why="running it packed would silently attend across sequences",
            fix="use a model with full causal attention (Llama, Qwen2, Qwen3, ...)",
        )


def require_context(model: PreTrainedModel, tokens: int) -> None:
    """Raises a UserError if sequences of so many tokens do not fit the model's context."""
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and tokens > context:
        raise UserError(
            f"the longest possible sequence has {tokens} tokens, the model's context is {context}",
            why="data.max_prompt_tokens + rollout.max_response_tokens",
            fix="lower one of them, or take a model with a longer context",
        )
