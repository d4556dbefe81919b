"""Reads rows (dicts) from a file, a function of the user's, or the hub, and checks that they are of one kind."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from hybridflow.config.locate import is_function_reference, load_function
from hybridflow.data.files import read_file
from hybridflow.data.hub import is_hub_name, read_hub
from hybridflow.errors import UserError, near, nearest, raised

Row: TypeAlias = dict[str, Any]
# Usual names of these columns, the most specific first; for the hint that names the setting.
_NAMES = {
    "prompt": ("prompt", "question", "problem", "instruction", "query", "messages", "conversations", "input", "text"),
    "ground_truth": ("ground_truth", "answer", "solution", "final_answer", "expected_answer", "target", "label",
                     "reference", "output", "reward_model"),
    "response": ("response", "completion", "answer", "output", "solution", "chosen", "text"),
    "messages": ("messages", "conversations", "conversation", "dialogue", "dialog", "chat", "turns"),
    "text": ("text", "content", "document"),
    "chosen": ("chosen", "preferred", "chosen_response", "response_chosen", "better", "winner", "response_j"),
    "rejected": ("rejected", "dispreferred", "rejected_response", "response_rejected", "worse", "loser", "response_k"),
}  # fmt: skip


def read_rows(source: str, *, seed: int = 0) -> list[Row]:
    """Reads all rows of a data source.

    Args:
        source: a file (see `data.files`), ``file.py:function`` that returns a list of dicts (it is called with
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


def column(row: Row, key: str, *, source: str, index: int, setting: str = "") -> Any:
    """Returns the value under a key; a dot goes inside (``reward_model.ground_truth``).

    Args:
        row: the row.
        key: the column.
        source: where the row is from, for messages.
        index: its number there.
        setting: the configuration key that names the column, such as ``data.prompt_key``.

    Raises:
        UserError: the row has no such column; the nearest one is named, and the setting that would take it.
    """
    value: Any = row
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            fix = _other_column(key, part, value, setting)
            raise UserError(f"row {index} of {source} has no column {key!r}", fix=fix)
        value = value[part]
    return value


def _other_column(key: str, part: str, place: object, setting: str) -> str:
    """Says what to do about a column that does not exist: the nearest name, or a usual one."""
    known = list(map(str, place)) if isinstance(place, dict) else []
    if not known:
        return ""
    hint = nearest(part, known)
    wanted = setting.removeprefix("data.").strip("-").replace("-", "_").removesuffix("_key")
    alike = near(part, known)
    usual = alike or next((name for name in _NAMES.get(wanted, ()) if name in known and name != key), None)
    other = "" if alike else _for_another_command(wanted, known)
    if other:
        return other
    if usual is None and wanted == "messages":
        return _instead_of_messages(known) or hint
    if not setting or usual is None:
        return hint
    path = ".".join([*key.split(".")[: key.split(".").index(part)], usual])
    if usual == "reward_model":
        inside = place.get(usual) if isinstance(place, dict) else None
        return f"set {setting}={usual}.KEY, KEY being one of {', '.join(inside)}" if isinstance(inside, dict) else hint
    return f"{hint} set {setting}={path}" if alike else f"set {setting}={path}; {hint}"


def _for_another_command(wanted: str, known: Sequence[str]) -> str:
    """Returns where rows belong that have another command's columns, as data sets for TRL name them; "" for others."""
    if wanted in ("prompt", "ground_truth", "messages") and {"chosen", "rejected"} <= set(known):
        return "rows with chosen and rejected are preferences: hybridflow reward-model trains on them"
    if wanted == "prompt" and "messages" in known:
        return (
            "rows with messages are conversations: hybridflow sft trains on them; where each ends with the user's "
            "turn, set data.prompt_key=messages"
        )
    if wanted == "ground_truth" and {"prompt", "completion"} <= set(known):
        return (
            "rows with prompt and completion are for hybridflow sft (data.prompt_key=prompt "
            "data.response_key=completion); where the completion is the right answer, set "
            "data.ground_truth_key=completion"
        )
    if wanted == "messages" and "text" in known:
        return "set data.format=text, which trains on the column text as it is"
    return ""


def _instead_of_messages(known: Sequence[str]) -> str:
    """Says what to do with rows that have no conversation in one column."""
    asked, said = (next((name for name in _NAMES[what] if name in known), None) for what in ("prompt", "response"))
    if asked and said and asked != said:
        return f"set data.prompt_key={asked} data.response_key={said}"
    if asked and {"ground_truth", "reward_model"} & set(known):
        return "these rows are for hybridflow train, whose configuration has a section reward"
    return ""


def has_column(row: Row, key: str) -> bool:
    """Returns whether `column` finds a value."""
    value: Any = row
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            return False
        value = value[part]
    return True


def require_one_schema(rows: Sequence[Row], keys: Mapping[str, str], *, source: str) -> None:
    """Checks that every row has the kind of value that most rows have, in the columns that are used.

    Args:
        rows: of one source.
        keys: the columns, each with the setting that names it.
        source: where the rows are from.

    Raises:
        UserError: the first row that differs, and from what.
    """
    for key, setting in keys.items():
        kinds = [_kind(row, key) for row in rows]
        counts = Counter(kinds)
        if len(counts) == 1:
            column(rows[0], key, source=source, index=0, setting=setting)
            continue
        usual, number = counts.most_common(1)[0]
        if usual is None:  # a column that most rows lack: it is used, so its absence is the mistake
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
    """Returns the columns that some rows have and others lack, with the number of rows that lack them."""
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
    """Describes the kind of value under a key; None where there is none."""
    if not has_column(row, key):
        return None
    value = column(row, key, source="", index=0)
    return _KINDS.get(type(value), f"a {type(value).__name__}")


def _call(source: str, function: Callable[..., Any], seed: int) -> list[Row]:
    takes_seed = "seed" in inspect.signature(function).parameters
    try:
        return [_plain(row) for row in (function(seed=seed) if takes_seed else function())]
    except Exception as error:
        raise UserError(f"{source} raised {raised(error)}", fix="make it return a list of dicts") from error


def _plain(value: Any) -> Any:
    """Returns a value with numpy's arrays and numbers, which pandas makes, as Python's lists and numbers."""
    if isinstance(value, dict):
        return {key: _plain(inside) for key, inside in value.items()}
    if isinstance(value, np.ndarray):
        return [_plain(inside) for inside in value.tolist()]
    if isinstance(value, list):
        return [_plain(inside) for inside in value]
    return value.item() if isinstance(value, np.generic) else value
