"""Reading rows (dicts) from .jsonl, .parquet, or a function of the user's, and telling data sets apart."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from hybridflow.config.locate import is_function_reference, load_function
from hybridflow.errors import UserError, nearest

Row: TypeAlias = dict[str, Any]


def read_rows(source: str, *, seed: int = 0) -> list[Row]:
    """All rows of a data source.

    Args:
        source: a .jsonl or .parquet file, or ``file.py:function`` that returns a list of dicts; it is called with
            ``seed=`` if it takes one.
        seed: for such a function.

    Raises:
        UserError: no such file, no rows, or something in it that is not a row.
    """
    if is_function_reference(source):
        function = load_function(source)
        takes_seed = "seed" in inspect.signature(function).parameters
        try:
            rows = list(function(seed=seed) if takes_seed else function())
        except Exception as error:
            raise UserError(
                f"{source} raised {type(error).__name__}: {error}", fix="make it return a list of dicts"
            ) from error
    else:
        path = Path(source)
        if not path.is_file():
            raise UserError(f"no data file {source}", fix="give a .jsonl or .parquet file, or file.py:function")
        if path.suffix == ".parquet":
            try:
                rows = pq.read_table(path).to_pylist()
            except pa.ArrowInvalid as error:
                raise UserError(f"{source} is not a parquet file: {error}") from error
        elif path.suffix in (".jsonl", ".json"):
            rows = _read_jsonl(path)
        else:
            raise UserError(f"{source} has an unknown ending {path.suffix!r}", fix="use .jsonl or .parquet")
    if not rows:
        raise UserError(f"{source} has no rows")
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"row {i} of {source} is a {type(row).__name__}, not an object with columns")
    return rows


def column(row: Row, key: str, *, source: str, index: int) -> Any:
    """The value under a key; dots go inside (``reward_model.ground_truth``).

    Raises:
        UserError: the row has no such column; the nearest one is named.
    """
    value: Any = row
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            known = list(value) if isinstance(value, dict) else []
            raise UserError(f"row {index} of {source} has no column {key!r}", fix=nearest(part, known) if known else "")
        value = value[part]
    return value


def fingerprint_rows(rows: Sequence[Row]) -> str:
    """A fingerprint of the rows and their order, to recognise on resume that the data is still the same."""
    digest = hashlib.blake2b(digest_size=16)
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=repr).encode())
    return digest.hexdigest()


def _read_jsonl(path: Path) -> list[Row]:
    rows = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    rows.append(json.loads(line.decode()))
                except ValueError as error:  # not JSON, or not UTF-8
                    raise UserError(f"line {number} of {path} is not JSON: {error}") from error
    return rows
