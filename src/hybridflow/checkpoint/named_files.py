"""The files that a run's configuration names, recognised by their content when they have moved."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PATH_KEYS = ("model.path", "model.reference", "critic.path", "data.train", "data.eval", "data.template", "data.order")
PART = 65_536  # bytes of a large file's beginning and end that are read
_MODEL = ("config.json", "*.safetensors", "*.bin")


def content_of(config: Mapping[str, Any]) -> dict[str, str]:
    """Returns, for every file or folder that a configuration names (dotted keys), the digest of its content."""
    names = {name for key in PATH_KEYS for name in _split(config.get(key))[0]}
    found = {name: _digest(name) for name in sorted(names)}
    return {name: digest for name, digest in found.items() if digest is not None}


def same_files(before: Any, now: Any, known: Mapping[str, str], *, moved: bool) -> bool:
    """Returns whether two values of a key that names files name the same ones.

    Args:
        before: the value that the run began with.
        now: the one that it is to resume with.
        known: the result of `content_of` when the run began.
        moved: whether the user says that they are the same.
    """
    (old, rest), (new, other) = _split(before), _split(now)
    if rest != other or len(old) != len(new):
        return False
    if moved and not {"shuffled", "sequential"} & {*old, *new}:  # data.order may be one of our keywords
        return True
    return all(
        a == b or os.path.abspath(a) == os.path.abspath(b) or (a in known and known[a] == _digest(b))
        for a, b in zip(old, new)
    )


def _split(value: Any) -> tuple[list[str], str]:
    """Splits a value into its names, and what stands beside them (weights)."""
    if isinstance(value, list):
        rest = [{k: v for k, v in entry.items() if k != "source"} for entry in value]
        return [entry["source"] for entry in value], json.dumps(rest, sort_keys=True)
    return ([], "none") if value is None else ([str(value)], "one")


def _digest(name: str) -> str | None:
    """Computes the digest of a file: of all of it, or of a large one's size, beginning and end; of a folder, of its
    model's files.
    """
    file, _, function = name.rpartition(":") if ".py:" in name else (name, "", "")
    path = Path(file)
    if (path / "model" / "config.json").is_file() and not (path / "config.json").is_file():
        path = path / "model"
    files = sorted(f for pattern in _MODEL for f in path.glob(pattern)) if path.is_dir() else [path]
    digest = hashlib.blake2b(function.encode(), digest_size=16)
    try:
        for one in files:
            digest.update(f"{one.name if path.is_dir() else ''} {one.stat().st_size} ".encode())
            with one.open("rb") as stream:
                digest.update(stream.read(PART))
                stream.seek(max(PART, one.stat().st_size - PART))
                digest.update(stream.read(PART))
    except OSError:
        return None
    return digest.hexdigest() if files else None
