"""A model that is trained, written as folders: in a checkpoint, and as a plain Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hybridflow.checkpoint.store import whole_folder
from hybridflow.errors import UserError
from hybridflow.protocols.training import TrainEngine


def save_engine(
    engine: TrainEngine, tokenizer: PreTrainedTokenizerBase, folder: Path, *, background: bool = False
) -> None:
    """Writes an engine into an empty folder of a checkpoint; a whole model gets its tokenizer beside it."""
    engine.save(folder, background=background)
    if (folder / "model").is_dir():
        tokenizer.save_pretrained(folder / "model")


def export_engine(engine: TrainEngine, tokenizer: PreTrainedTokenizerBase, target: Path) -> None:
    """Writes an engine's model as a plain Hugging Face folder, adapters merged; an older one there is replaced.

    Raises:
        UserError: the disk is full or not writable; an older export still stands.
    """
    with whole_folder(target, lambda error: not_written(target, error)) as folder:
        engine.export(folder)
        tokenizer.save_pretrained(folder)


def not_written(target: Path, error: Exception) -> UserError:
    """Makes the error for a model that could not be written to a folder, with what helps."""
    return UserError(
        f"the model could not be written to {target}: {error}",
        fix=f"make room on the disk of {target}, or give another folder",
    )
