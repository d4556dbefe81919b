"""The location of a model's files: a folder, or a name on the Hugging Face hub or ModelScope, fetched once and kept."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from hybridflow.config.locate import is_function_reference
from hybridflow.errors import UserError, near, typed

MODELSCOPE = "modelscope://"
SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py"]  # what is not weights
WEIGHTS = ["*.safetensors"]

_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def is_hub_name(path: str) -> bool:
    """Returns whether this names a model on the Hugging Face hub: ``org/name``, and nothing here has that name.

    >>> [is_hub_name(path) for path in ("Qwen/Qwen3-0.6B", "/models/qwen3", "./qwen3", "qwen3", "a/b/c")]
    [True, False, False, False, False]
    """
    return _NAME.fullmatch(path) is not None and not Path(path).exists()


def model_at(path: str) -> str:
    """Returns where the model is that a path names: a run's folder stands for the model that the run left in it.

    Raises:
        UserError: a run that has left none yet.
    """
    folder = Path(path)
    if is_function_reference(path) or (folder / "config.json").is_file():
        return path
    if (folder / "model" / "config.json").is_file():
        return str(folder / "model")
    steps = sorted(int(found.name[5:]) for found in folder.glob("checkpoints/step-*") if found.name[5:].isdigit())
    if steps:
        target = f"{path.rstrip('/')}-step-{steps[-1]}"
        raise UserError(
            f"the run in {path} has no model yet: it is not done",
            fix=f"write its newest checkpoint as a model, {typed('export', path, target)}, and give {target} instead",
        )
    return path


def model_folder(path: str, *, weights: bool = True) -> Path:
    """Returns the folder of a model in Hugging Face format; a name on a hub is fetched first, unless it is in the
    cache.

    Args:
        path: a folder, ``org/name`` on the Hugging Face hub, or ``modelscope://org/name``.
        weights: whether the weights are needed too; configuration and tokenizer are small.

    Raises:
        UserError: there is no such folder, or the name cannot be fetched.
    """
    path, patterns = model_at(path), SMALL_FILES + WEIGHTS * weights
    if path.startswith(MODELSCOPE):
        return _from_modelscope(path.removeprefix(MODELSCOPE), patterns)
    if "://" in path:
        raise UserError(f"no model at {path}", fix=f"give a folder, org/name on the hub, or {MODELSCOPE}org/name")
    if is_hub_name(path):
        from huggingface_hub import snapshot_download

        return _fetched(path, "the Hugging Face hub", lambda: snapshot_download(path, allow_patterns=patterns))
    folder = Path(path)
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{path} holds adapters (adapter_config.json), not a whole model",
            why="they are useless without the model that they were trained on",
            fix="merge them into it: `hybridflow export RUN FOLDER` for those of a run, peft's merge_and_unload and "
            "save_pretrained for others",
        )
    if not (folder / "config.json").is_file():
        raise UserError(
            f"no model at {path}",
            why="a model folder has a config.json beside its weights",
            fix="give a folder in Hugging Face format, a name on the hub (org/name, modelscope://org/name), or "
            "file.py:function that returns (model, tokenizer); if another run writes this folder, start that run first",
        )
    return folder


def _from_modelscope(name: str, patterns: list[str]) -> Path:
    try:
        from modelscope import snapshot_download
    except ImportError as error:
        raise UserError(
            f"{MODELSCOPE}{name} needs the modelscope library, which cannot be imported: {error}",
            fix="pip install 'hybridflow[modelscope]'",
        ) from error
    return _fetched(f"{MODELSCOPE}{name}", "ModelScope", lambda: snapshot_download(name, allow_patterns=patterns))


def _fetched(path: str, where: str, fetch: Callable[[], str]) -> Path:
    try:
        folder = Path(fetch())
    except Exception as error:  # the libraries pass on errors of their network stacks, which have no common base class
        text = next(iter(str(error).strip().splitlines()), "")
        meant = near(Path(path).name, [entry.name for entry in Path(path).parent.glob("*/")])
        other = f"; the nearest is {Path(path).parent / meant}" if meant is not None else ""
        raise UserError(
            f"model {path} cannot be fetched from {where}: {type(error).__name__}: {text}",
            why=f"there is no folder of this name either{other}",
            fix="check the name and the network (HF_HUB_OFFLINE forbids it), log in where the model is gated, or fetch "
            "it elsewhere and give the folder",
        ) from error
    if not (folder / "config.json").is_file():
        raise UserError(f"{path} on {where} has no config.json", fix="give a model in Hugging Face format")
    return folder


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """Reads the plain values of a JSON file in a model folder.

    Raises:
        UserError: it holds no JSON object.
    """
    try:
        values = json.loads((folder / name).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{folder / name} is not JSON: {error}", fix="fetch or save the model again") from error
    if not isinstance(values, dict):
        raise UserError(
            f"{folder / name} holds a JSON {type(values).__name__}, not an object", fix="fetch or save the model again"
        )
    return values


def code_files(auto_map: dict[str, Any]) -> list[str]:
    """Returns the files that an ``auto_map`` would have run."""
    entries = [e for value in auto_map.values() for e in (value if isinstance(value, list) else [value]) if e]
    return sorted({entry.rpartition(".")[0] + ".py" for entry in entries})


def refuse_own_code(path: str, what: list[str]) -> NoReturn:
    """Raises a UserError for a folder that would have code of its own run: only the user can allow that."""
    raise UserError(
        f"{path} would run code of its own: {', '.join(what)}",
        why="whoever wrote that code could do anything on this machine; nothing of it has been run",
        fix="read it, then set model.trust_remote_code=true (generate: --trust-remote-code); or take a model that "
        "transformers has built in",
    )
