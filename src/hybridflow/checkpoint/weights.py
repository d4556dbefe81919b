"""A model's weights in a checkpoint, and as a plain Hugging Face folder for others to use."""

from __future__ import annotations

import copy
import os
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hybridflow.checkpoint.store import assign_weights, disk_refused
from hybridflow.errors import UserError
from hybridflow.models.lora import has_adapters, load_adapters, merged, save_adapters


def write_weights(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes ``model/`` (a plain Hugging Face folder), or ``adapter/`` where only adapters are trained."""
    if has_adapters(model):
        save_adapters(model, folder / "adapter")
    else:
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")


def read_weights(model: PreTrainedModel, folder: Path) -> None:
    """Reads what `write_weights` wrote into a model of the same shape.

    Raises:
        UserError: the checkpoint is another model's.
    """
    kind = "adapter" if has_adapters(model) else "model"
    if not (folder / kind).is_dir():
        other = "all weights" if kind == "adapter" else "adapters only"
        raise UserError(
            f"the checkpoint {folder} holds {other}, the configuration trains "
            + ("adapters (model.lora)" if kind == "adapter" else "all weights"),
            fix="give the model.lora that the run began with, or another run.folder",
        )
    if kind == "adapter":
        load_adapters(model, folder / "adapter")
        return
    # Through from_pretrained, because saving may rename and regroup tensors (fused experts).
    saved = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    assign_weights(model, saved.state_dict(), source=folder)


def export_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, target: Path, *, dtype: torch.dtype = torch.float32
) -> None:
    """Writes a plain Hugging Face folder, adapters merged; it is there whole or not at all.

    Args:
        model: the trained model; it is left as it is.
        tokenizer: saved beside it.
        target: the folder; an older export there is replaced.
        dtype: precision of the written weights.

    Raises:
        UserError: the disk is full or not writable; an older export still stands.
    """
    plain = merged(model)
    state = {name: tensor.to(dtype) for name, tensor in plain.state_dict().items()}
    aside = target.with_name(f".partial-{target.name}")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        plain.save_pretrained(aside, state_dict=state)
        config = copy.deepcopy(plain.config)
        config.dtype = dtype  # save_pretrained wrote the model's own, whatever the state's is
        config.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        if target.exists():
            shutil.rmtree(target)
        os.replace(aside, target)
    except Exception as error:
        shutil.rmtree(aside, ignore_errors=True)
        if not disk_refused(error):
            raise
        raise UserError(
            f"the model could not be written to {target}: {error}",
            fix=f"make room on the disk of {target}, or give another folder",
        ) from error
