"""`hybridflow export`: a checkpoint as a plain Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml

from hybridflow.checkpoint.store import read_checkpoint, saved_steps, step_folder
from hybridflow.checkpoint.weights import export_model, read_weights
from hybridflow.config.sections import ModelSection
from hybridflow.errors import UserError
from hybridflow.models.lora import load_trainable


def export(run: Path, target: Path, *, step: int | None = None, dtype: str = "float32") -> Path:
    """Writes a run's checkpoint as a folder that any Hugging Face program loads; adapters are merged.

    Args:
        run: the run's folder.
        target: the folder to write; it must not exist yet.
        step: which checkpoint; None for the newest.
        dtype: precision of the written weights.

    Raises:
        UserError: no such run or checkpoint, a damaged one, or the target exists.
    """
    steps = saved_steps(run / "checkpoints")
    if not steps or not (run / "config.yaml").is_file():
        what = "config.yaml" if steps else "checkpoints"
        raise UserError(f"{run} has no {what}", fix="give the folder of a run (run.folder)")
    if step is not None and step not in steps:
        raise UserError(f"{run} has no checkpoint of step {step}", fix=f"it has {', '.join(map(str, steps))}")
    if target.exists():
        raise UserError(f"{target} exists already", fix="give a new folder")
    folder = step_folder(run / "checkpoints", steps[-1] if step is None else step)
    read_checkpoint(folder)  # for its check of every file
    config = yaml.safe_load((run / "config.yaml").read_text())
    section = ModelSection.model_validate(config["model"])
    model, tokenizer = load_trainable(section, seed=config["run"]["seed"])
    read_weights(model, folder)
    export_model(model, tokenizer, target, dtype=getattr(torch, dtype))
    return target
