"""Reading rows (dicts) from .jsonl, .parquet, a function of the user's, or the hub, and holding them to one kind."""

from __future__ import annotations

import inspect
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from hybridflow.config.locate import is_function_reference, load_function
from hybridflow.data.hub import is_hub_name, read_hub
from hybridflow.errors import UserError, nearest

Row: TypeAlias = dict[str, Any]
ENDINGS = (".jsonl", ".json", ".parquet")


def read_rows(source: str, *, seed: int = 0) -> list[Row]:
    """All rows of a data source.

    Args:
        source: a .jsonl or .parquet file, ``file.py:function`` that returns a list of dicts (it is called with
            ``seed=`` if it takes one), or a name on the hub (see `data.hub`).
        seed: for such a function.

    Raises:
        UserError: no such file, no rows, or something in it that is not a row.
    """
    if is_function_reference(source):
        rows = _call(source, load_function(source), seed)
    elif is_hub_name(source):
        rows = read_hub(source, instead="give a .jsonl or .parquet file")
    else:
        rows = read_file(Path(source))
    if not rows:
        raise UserError(f"{source} has no rows")
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"row {i} of {source} is a {type(row).__name__}, not an object with columns")
    return rows


def read_file(path: Path) -> list[Row]:
    """All rows of a .jsonl, .json or .parquet file.

    Raises:
        UserError: there is no such file, or it is something else.
    """
    if path.is_dir():
        inside = [p.name for p in sorted(path.iterdir()) if p.suffix in ENDINGS]
        raise UserError(
            f"{path} is a folder, not a data file",
            why="the files of a folder are often splits of which only one should be read",
            fix=f"name a file in it: {', '.join(inside[:8])}" if inside else "name a .jsonl or .parquet file",
        )
    if not path.is_file():
        raise UserError(
            f"no data file {path}", fix="give a .jsonl or .parquet file, file.py:function, or org/name on the hub"
        )
    if path.suffix == ".parquet":
        try:
            rows: list[Row] = pq.read_table(path).to_pylist()
        except pa.ArrowInvalid as error:
            raise UserError(f"{path} is not a parquet file: {error}") from error
        return rows
    if path.suffix in ENDINGS:
        return _read_json(path)
    raise UserError(f"{path} has an unknown ending {path.suffix!r}", fix="use .jsonl or .parquet")


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


def has_column(row: Row, key: str) -> bool:
    """Whether `column` finds something."""
    value: Any = row
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            return False
        value = value[part]
    return True


def require_one_schema(rows: Sequence[Row], keys: Sequence[str], *, source: str) -> None:
    """Holds every row to the kind of value that most rows have in the columns that are used.

    Raises:
        UserError: the first row that differs, and from what.
    """
    for key in keys:
        kinds = [_kind(row, key) for row in rows]
        counts = Counter(kinds)
        if len(counts) == 1:
            continue
        usual, number = counts.most_common(1)[0]
        if usual is None:  # a column that most rows lack: it is used, so the lack is the mistake
            usual, number = next((k, n) for k, n in counts.most_common() if k is not None)
        index = next(i for i, kind in enumerate(kinds) if kind != usual)
        other = next(i for i, kind in enumerate(kinds) if kind == usual)
        others = f"row {other} and {number - 1} others" if number > 1 else f"row {other}"
        if kinds[index] is None:
            part = key.split(".")
            inside = next((i for i in range(1, len(part)) if has_column(rows[index], ".".join(part[:i]))), 0)
            place = column(rows[index], ".".join(part[:inside]), source=source, index=index) if inside else rows[index]
            raise UserError(
                f"row {index} of {source} has no column {key!r}, {others} have it",
                fix=nearest(part[inside], place) if isinstance(place, dict) and place else "",
            )
        raise UserError(
            f"{key} of row {index} of {source} is {kinds[index]}, in {others} it is {usual}",
            why="rows of different kinds in one file are a mistake more often than not",
            fix="write the column alike in every row",
        )


def uneven_columns(rows: Sequence[Row]) -> dict[str, int]:
    """Columns that some rows have and others lack, with the number of rows that lack them."""
    counts = Counter(key for row in rows for key in row)
    return {key: len(rows) - count for key, count in counts.items() if count < len(rows)}


_KINDS = {
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
    type(None): "null",
}


def _kind(row: Row, key: str) -> str | None:
    """What kind of value lies under a key, in words; None where there is none."""
    if not has_column(row, key):
        return None
    value = column(row, key, source="", index=0)
    return _KINDS.get(type(value), f"a {type(value).__name__}")


def _call(source: str, function: Callable[..., Any], seed: int) -> list[Row]:
    takes_seed = "seed" in inspect.signature(function).parameters
    try:
        return list(function(seed=seed) if takes_seed else function())
    except Exception as error:
        raise UserError(
            f"{source} raised {type(error).__name__}: {error}", fix="make it return a list of dicts"
        ) from error


def _read_json(path: Path) -> list[Row]:
    """One object per line, or (in a .json file) one list of objects."""
    with path.open("rb") as lines:
        if path.suffix == ".json" and lines.read(1) == b"[":
            lines.seek(0)
            try:
                return list(json.loads(lines.read().decode()))
            except ValueError as error:
                raise UserError(f"{path} is not JSON: {error}") from error
        lines.seek(0)
        rows = []
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    rows.append(json.loads(line.decode()))
                except ValueError as error:  # not JSON, or not UTF-8
                    raise UserError(f"line {number} of {path} is not JSON: {error}") from error
    return rows
