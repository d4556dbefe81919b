"""Rows that a program gives as objects: written to a file of the run's folder, which the configuration then names."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np

from hybridflow.checkpoint.run_folder import has_begun, write_atomically
from hybridflow.config.locate import is_function_reference
from hybridflow.config.sections.data import ONE
from hybridflow.data.files import ENDINGS, ending
from hybridflow.errors import UserError

_FORM = 'give a list of dicts, such as [{"prompt": "2+2=", "ground_truth": "4"}]'


def is_name(data: Any) -> bool:
    """Returns whether data is what `data.train` of a configuration takes: a path, a name, or a list of these."""
    if isinstance(data, str | os.PathLike):
        return True
    return isinstance(data, list | tuple) and bool(data) and all(map(_is_source, data))


def _is_source(entry: Any) -> bool:
    if isinstance(entry, str | os.PathLike):
        return ending(Path(entry)) in ENDINGS or is_function_reference(str(entry))
    return isinstance(entry, Mapping) and "source" in entry and set(entry) <= set(ONE)


def rows_of(data: Any, argument: str) -> list[dict[str, Any]]:
    """Returns the rows in a list or another iterable of dicts, a data set, a DataFrame or a table.

    Args:
        data: the rows.
        argument: what the call names them, for messages.

    Raises:
        UserError: they are something else, there are none, or a value is nothing that JSON can hold.
    """
    rows = [_row(row, i, argument) for i, row in enumerate(_entries(data, argument))]
    if not rows:
        raise UserError(f"{argument} has no rows", fix=_FORM)
    return rows


def write_rows(rows: Sequence[Mapping[str, Any]], path: Path, argument: str) -> None:
    """Writes rows, one JSON object a line; a run that has begun keeps the rows that it began with.

    Args:
        rows: the rows.
        path: a file in the folder ``given`` of a run.
        argument: what the call names the rows, for messages.

    Raises:
        UserError: the run began with other rows.
    """
    text = "".join(json.dumps(row) + "\n" for row in rows)
    run = path.parent.parent
    if path.is_file() and has_begun(run):
        before = path.read_text(encoding="utf-8")
        if before == text:
            return
        raise UserError(
            f"{argument} holds other rows than the run in {run} began with: {_difference(before, text)}",
            why="resuming with them would mix two runs",
            fix="give the same rows, or choose another folder",
        )
    write_atomically(path, text)


def _difference(before: str, text: str) -> str:
    old, new = before.splitlines(), text.splitlines()
    counts = f"there were {len(old)}, and there are {len(new)}" if len(old) != len(new) else ""
    index = next((i for i, (a, b) in enumerate(zip(old, new)) if a != b), None)
    if index is None:
        return counts
    was, now = json.loads(old[index]), json.loads(new[index])
    key = next((k for k in [*was, *now] if k not in was or k not in now or was[k] != now[k]), "")
    values = [f"{row[key]!r:.80}" if key in row else "missing" for row in (was, now)]
    first = f"row {index} is the first that differs: {key!r} was {values[0]}, is {values[1]}"
    return "; ".join(filter(None, [counts, first])) if key else f"the columns of row {index} have another order"


def is_mapping_of_splits(data: Any) -> bool:
    """Returns whether data is a DatasetDict of Hugging Face's datasets."""
    return isinstance(data, _classes("datasets", "DatasetDict", "IterableDatasetDict"))


def _entries(data: Any, argument: str) -> Iterable[Any]:
    """Returns the rows as they are given. Libraries are not imported: who gives their objects has them loaded."""
    if is_mapping_of_splits(data):
        splits = ", ".join(map(str, data))
        raise UserError(
            f"{argument} is a {type(data).__name__} with the splits {splits}",
            fix=f"give one of them: {argument}=dataset[{next(iter(data), 'train')!r}]",
        )
    if isinstance(data, _classes("datasets", "IterableDataset")):
        raise UserError(
            f"{argument} is a streaming data set",
            why="a run draws rows in an order of its own, and draws them again when it resumes",
            fix=f"read as many rows as you want: {argument}=list(dataset.take(10_000))",
        )
    if isinstance(data, _classes("pandas", "DataFrame")):
        return [{k: _without_nan(v) for k, v in row.items()} for row in data.to_dict("records")]
    if isinstance(data, _classes("pyarrow", "Table")):
        rows: list[Any] = data.to_pylist()
        return rows
    if isinstance(data, Mapping):
        raise UserError(
            f"{argument} is a dict of columns ({', '.join(map(str, list(data)[:5]))}), not a list of rows",
            fix=f"{argument}=[dict(zip(columns, values)) for values in zip(*columns.values())]",
        )
    if isinstance(data, FunctionType):
        raise UserError(f"{argument} is a function, not rows", fix=f"call it: {argument}={data.__name__}()")
    try:
        return iter(data)
    except TypeError:
        raise UserError(f"{argument} is a {type(data).__name__}, not rows", fix=_FORM) from None


def _classes(module: str, *names: str) -> tuple[type[Any], ...]:
    loaded = sys.modules.get(module)
    return tuple(vars(loaded)[name] for name in names if loaded is not None and name in vars(loaded))


def _row(row: Any, index: int, argument: str) -> dict[str, Any]:
    if not isinstance(row, Mapping):
        fix = f'{argument}=[{{"prompt": text}} for text in texts]' if isinstance(row, str) else _FORM
        raise UserError(f"row {index} of {argument} is a {type(row).__name__}, not a dict with columns", fix=fix)
    return {_key(key, index, argument): _plain(value, index, str(key), argument) for key, value in row.items()}


def _key(key: Any, index: int, argument: str) -> str:
    if not isinstance(key, str):
        raise UserError(f"row {index} of {argument} has the key {key!r}, a {type(key).__name__}", fix="use a text")
    return key


def _plain(value: Any, index: int, column: str, argument: str) -> Any:
    """Returns a value as JSON can hold it."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        raise _refused(f"{value!r}, a number that JSON does not have", index, column, argument, "write None or a text")
    if isinstance(value, Mapping):
        inside = {_key(key, index, argument): inner for key, inner in value.items()}
        return {key: _plain(inner, index, f"{column}.{key}", argument) for key, inner in inside.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner, index, column, argument) for inner in value]
    kind = type(value)
    if kind.__module__.startswith("PIL.") or isinstance(value, bytes):
        fix = "leave the column out: only text is read, and images are not supported"
    else:
        fix = "write it as a text, a number or a list, for example str(value)"
    raise _refused(f"a {kind.__module__}.{kind.__qualname__}".replace("builtins.", ""), index, column, argument, fix)


def _refused(what: str, index: int, column: str, argument: str, fix: str) -> UserError:
    return UserError(
        f"column {column!r} of row {index} of {argument} is {what}",
        why="rows are kept in the run's folder as JSON, so that the run can resume",
        fix=fix,
    )


def _without_nan(value: Any) -> Any:
    """Returns None for what pandas puts where a value is missing."""
    missing = value is None or (isinstance(value, float) and math.isnan(value)) or type(value).__name__ in _MISSING
    return None if missing else value


_MISSING = ("NAType", "NaTType")
