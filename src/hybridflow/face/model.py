"""A model that a program gives as an object: saved to the run's folder, which the configuration then names."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from hybridflow.checkpoint.run_folder import has_begun
from hybridflow.errors import UserError
from hybridflow.models.load import require_vocabulary

_OF_SAVING = ("transformers_version", "architectures", "dtype", "_name_or_path")  # saving a model sets them
FINGERPRINT = "given.json"  # in the saved folder: a digest of every tensor, of the tokenizer and of the configuration


def checked_pair(model: Any, tokenizer: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Returns a model and a tokenizer that fit together.

    Raises:
        UserError: one of them is something else, or they do not fit.
    """
    peft = sys.modules.get("peft")  # who gives such a model has it loaded
    if peft is not None and isinstance(model, peft.PeftModel):
        raise UserError(
            "model is a peft model",
            why="a run makes its own adapters, or trains all weights",
            fix='give the base model, and the adapters\' shape as model={"path": base, "lora": {"rank": 16}}; or merge '
            "them: model.merge_and_unload()",
        )
    if not isinstance(model, PreTrainedModel):
        raise UserError(
            f"model is a {type(model).__name__}",
            fix="give a Hugging Face folder or name, file.py:function, or a PreTrainedModel with tokenizer=",
        )
    if tokenizer is None:
        raise UserError(
            f"model is a {type(model).__name__}, and no tokenizer is given",
            why="a model does not hold its tokenizer",
            fix="tokenizer=AutoTokenizer.from_pretrained(...), or give the model's folder or name instead",
        )
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise UserError(
            f"tokenizer is a {type(tokenizer).__name__}", fix="tokenizer=AutoTokenizer.from_pretrained(...)"
        )
    require_vocabulary(f"the {type(model).__name__} in model=", model, tokenizer)
    _require_same_special_ids(model, tokenizer)
    return model, tokenizer


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, target: Path) -> None:
    """Saves a model in Hugging Face's format; a run that has begun keeps the model that it began with.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        target: a folder in the folder ``given`` of a run.

    Raises:
        UserError: the run began with another model.
    """
    now, run = _fingerprint(model, tokenizer), target.parent.parent
    file = target / FINGERPRINT
    before: dict[str, str] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if before == now:
        return
    if before and has_begun(run):
        part = next(name for name in [*before, *now] if before.get(name) != now.get(name))
        raise UserError(
            f"model is not the one that the run in {run} began with: its {part} differs",
            why="resuming with it would mix two runs",
            fix=f"choose another folder, or resume with model={str(target)!r}, which holds what the run began with",
        )
    disable_progress_bar()  # as where models are loaded: a bar would hide the lines of the checks
    aside = target.with_name(f".{target.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    (aside / FINGERPRINT).write_text(json.dumps(now, indent=1), encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    os.replace(aside, target)


def _require_same_special_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises a UserError where the model's configuration has other special ids than the tokenizer."""
    for name in ("bos_token_id", "eos_token_id"):
        own = getattr(tokenizer, name)
        configs = (model.config.get_text_config(), model.generation_config)
        found = [i for config in configs for i in _ids(getattr(config, name, None))]
        if own is not None and found and own not in found:
            raise UserError(
                f"the tokenizer's {name} is {own} ({tokenizer.convert_ids_to_tokens(own)!r}), and that of the model's "
                f"configuration is {', '.join(map(str, dict.fromkeys(found)))}",
                why="a tokenizer of another model gives every token another meaning",
                fix=f"give the model's own tokenizer; if it is, set model.config.{name} = {own} and "
                f"model.generation_config.{name} = {own}",
            )


def _ids(value: Any) -> list[int]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def _fingerprint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Returns a digest of every part of a model and its tokenizer."""
    config = {k: v for k, v in model.config.to_diff_dict().items() if k not in _OF_SAVING}
    own = getattr(model, "generation_config", None)  # its end-of-sequence ids end responses
    generation = {} if own is None else {k: v for k, v in own.to_diff_dict().items() if k not in _OF_SAVING}
    parts = {
        "configuration": _digest(json.dumps(config, sort_keys=True, default=str).encode()),
        "generation configuration": _digest(json.dumps(generation, sort_keys=True, default=str).encode()),
        "tokenizer's vocabulary": _digest(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()),
        "tokenizer's special tokens": _digest(json.dumps(tokenizer.special_tokens_map, sort_keys=True).encode()),
        "chat template": _digest(json.dumps(tokenizer.chat_template, sort_keys=True).encode()),
    }
    for name, tensor in model.state_dict().items():
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        parts[f"tensor {name}"] = _digest(f"{tensor.dtype} {tuple(tensor.shape)} ".encode(), content.data)
    return parts


def _digest(*parts: bytes | memoryview) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
