"""Rows of data sets on the Hugging Face hub, through the `datasets` library (an extra)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hybridflow.errors import UserError

_NAME = re.compile(r"(?P<name>[\w-][\w.-]*/[\w.-]+)(?::(?P<config>[\w.-]+)?(?:/(?P<split>[\w.\[\]:%+-]+))?)?")
_FILE_ENDINGS = (".jsonl", ".json", ".parquet", ".csv", ".tsv", ".txt", ".arrow", ".gz", ".zst", ".zip", ".py")


def is_hub_name(source: str) -> bool:
    """Returns whether a text can name a data set on the hub: ``org/name``, with ``:config``, ``:config/split`` or
    ``:/split``.

    >>> [is_hub_name(s) for s in ("openai/gsm8k", "openai/gsm8k:main/test", "data/rows.jsonl", "rows", "a/b/c")]
    [True, True, False, False, False]
    """
    found = _NAME.fullmatch(source)
    return found is not None and not found["name"].endswith(_FILE_ENDINGS) and not Path(found["name"]).exists()


def read_hub(source: str, *, instead: str, split: str | None = None) -> list[dict[str, Any]]:
    """Reads all rows of a split; images stay in the form they are stored in, ``{bytes, path}``.

    Args:
        source: see `is_hub_name`.
        instead: what to do where the hub cannot be reached, for the message.
        split: which split, if `source` names none; without either it is "train".

    Raises:
        UserError: the library is not installed, the hub cannot be reached, or it has no such data set.
    """
    found = _NAME.fullmatch(source)
    assert found is not None, source
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UserError(
            f"{source} is read from the Hugging Face hub, and the datasets library cannot be imported: {error}",
            why="there is no file or folder of this name",
            fix=f'pip install "hybridflow[hub]", or {instead}',
        ) from error
    split = found["split"] or split or "train"
    try:
        table = load_dataset(found["name"], found["config"], split=split).with_format("arrow")[:]
    except Exception as error:  # the library passes on those of its network stack, which have no base in common
        raise UserError(
            f"{source} (split {split}) cannot be read from the Hugging Face hub: {_first_line(error)}",
            why="there is no file or folder of this name either",
            fix=f"check the name and the network, or {instead}",
        ) from error
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def _first_line(error: Exception) -> str:
    text = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {text}"
