"""Writes trained models as folders: in a checkpoint, and as a plain Hugging Face folder (`hybridflow export`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hybridflow.checkpoint.artifacts import not_written
from hybridflow.checkpoint.store import read_best, read_checkpoint, saved_steps, step_folder, whole_folder
from hybridflow.config.sections.model import RlModelSection
from hybridflow.engines.shards import SHARDS, read_shards, whole_tensors
from hybridflow.errors import UserError
from hybridflow.models.classifier import holds_classifier
from hybridflow.models.files import empty_model, export_model, read_weights, write_adapters, write_streamed
from hybridflow.models.load import load_tokenizer
from hybridflow.models.lora import load_trainable
from hybridflow.models.outline import first_line


def export(
    run: Path,
    target: Path,
    *,
    step: int | None = None,
    best: bool = False,
    dtype: str = "float32",
    adapter: bool = False,
) -> dict[str, Any]:
    """Writes a run's checkpoint as a folder that any Hugging Face program loads; adapters are merged, or left apart.

    A checkpoint of all weights has its own config and tokenizer; adapters need the model that they were trained on.

    Args:
        run: the run's folder.
        target: the folder to write; it must not exist yet.
        step: which checkpoint; None for the newest.
        best: the best one by ``checkpoint.best``, instead.
        dtype: precision of the written weights.
        adapter: write the adapters alone, as a folder of peft's.

    Returns:
        "folder", "step" and "dtype".

    Raises:
        UserError: no such run or checkpoint, a damaged one, no adapters in it, or the target exists.
    """
    checkpoints = run / "checkpoints"
    steps = saved_steps(checkpoints)
    if not steps or not (run / "config.yaml").is_file():
        what = "config.yaml" if steps else "checkpoints"
        raise UserError(f"{run} has no {what}", fix="give the folder of a run (run.folder)")
    if best:
        found = read_best(checkpoints)
        if found is None:
            raise UserError(
                f"{run} does not say which of its checkpoints is the best",
                why="checkpoint.best names no metric, or nothing has been evaluated since the first step",
                fix="train with checkpoint.best set, or give --step",
            )
        step = found.step
    if step is not None and step not in steps:
        raise UserError(f"{run} has no checkpoint of step {step}", fix=f"it has {', '.join(map(str, steps))}")
    if target.exists():
        raise UserError(f"{target} exists already", fix="give a new folder")
    step = steps[-1] if step is None else step
    folder = step_folder(checkpoints, step)
    read_checkpoint(folder)  # for its check of every file
    try:
        config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        section = RlModelSection.model_validate(config["model"])  # it has all that a supervised run's has
        seed = int(config["run"]["seed"])
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        raise UserError(
            f"{run / 'config.yaml'} cannot be read any more: {first_line(error)}", fix="restore it"
        ) from error
    section = section.model_copy(update={"packing": False})  # nothing is computed here
    if adapter and section.lora is None:
        raise UserError(f"{run} trains all weights: it has no adapter", fix="leave out --adapter")
    with whole_folder(target, lambda error: not_written(target, error)) as aside:
        precision = getattr(torch, dtype)
        if adapter:
            model, tokenizer = _with_adapters(folder, section, seed)
            write_adapters(model, aside, precision)
        else:
            tokenizer = _write_model(folder, section, seed, aside, precision)
        tokenizer.save_pretrained(aside)
    return {"folder": str(target), "step": step, "dtype": dtype}


def _write_model(
    checkpoint: Path, section: RlModelSection, seed: int, target: Path, dtype: torch.dtype
) -> PreTrainedTokenizerBase:
    """Writes the model of a checkpoint; returns its tokenizer. Of a sharded one, only a part is in memory at a time."""
    shards, own = checkpoint / SHARDS, checkpoint / "model"
    if own.is_dir() and shards.is_dir():
        model = empty_model(own, trust_remote_code=section.trust_remote_code)
        tensors = ((n, t) for n, t in whole_tensors(shards, "model/") if not n.startswith("value_head."))
        write_streamed(model, tensors, target, dtype)
        return load_tokenizer(str(own), trust_remote_code=section.trust_remote_code)
    if own.is_dir():
        plain = section.model_copy(update={"path": str(own), "lora": None})
        model, tokenizer = load_trainable(plain, seed=0, classifier=holds_classifier(own))
    else:
        model, tokenizer = _with_adapters(checkpoint, section, seed)
    export_model(model, target, dtype)
    return tokenizer


def _with_adapters(
    checkpoint: Path, section: RlModelSection, seed: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads the model that a run began with, with a checkpoint's adapters, and its tokenizer."""
    model, tokenizer = load_trainable(section, seed=seed)
    if (checkpoint / SHARDS).is_dir():
        adapters = {f"model/{n}": p.detach() for n, p in model.named_parameters() if p.requires_grad}
        read_shards(adapters, checkpoint / SHARDS)
    else:
        read_weights(model, checkpoint)
    return model, tokenizer
