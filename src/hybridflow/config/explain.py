"""What a key means, and what a configuration has there: `hybridflow check --explain KEY`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from hybridflow.config.describe import COMMANDS, Key, keys_of
from hybridflow.config.load import read_values, validate
from hybridflow.config.sections import Section
from hybridflow.errors import UserError, nearest


def explain(key: str, path: Path | None = None, overrides: Sequence[str] = ()) -> list[dict[str, Any]]:
    """What there is to know about a key, once for each command in which it differs.

    Args:
        key: with dots: ``optim.lr``; a section gives all its keys.
        path: a configuration; its own kind alone is then explained, and what it has there is told.
        overrides: see `load_config`.

    Returns:
        For each key: "key", "type", "default", "meaning", "commands"; with a configuration also "given" (whether it
        is set there) and "value" (set or not; absent where the configuration has mistakes).

    Raises:
        UserError: there is no such key, or the configuration cannot be read.
    """
    values = None if path is None else read_values(path, overrides)
    kinds = COMMANDS if values is None else {name: COMMANDS[name] for name in [kind_of(values)]}
    found: dict[Key, list[str]] = {}
    for command, kind in kinds.items():
        for known in keys_of(kind):
            if known.name == key or known.name.startswith(f"{key}."):
                found.setdefault(known, []).append(command)
    if not found:
        names = {known.name for kind in kinds.values() for known in keys_of(kind)}
        last = [name for name in names if name.rpartition(".")[2] == key.rpartition(".")[2]]
        hint = f"did you mean {' or '.join(map(repr, sorted(last)))}?" if last else nearest(key, names)
        raise UserError(f"there is no key {key!r} in a configuration for {' or '.join(kinds)}", fix=hint)
    described = [
        {
            "key": known.name,
            "type": known.type.replace("`", ""),
            "default": known.default.strip("*`"),
            "meaning": known.description,
            "commands": commands,
        }
        for known, commands in found.items()
    ]
    if values is not None:
        for one in described:
            one |= _said(str(one["key"]), values, next(iter(kinds.values())), path)
    return described


def explanation_lines(described: Sequence[dict[str, Any]], path: Path | None) -> Iterator[str]:
    """The same in words."""
    for one in described:
        yield f"{one['key']}  ({', '.join(one['commands'])})"
        if one["type"] != "section":
            yield f"  {one['type']}; default: {one['default']}"
        yield f"  {one['meaning']}"
        if "given" in one and one["type"] != "section":
            value = f": {as_yaml(one['value'])}" if "value" in one else ""
            yield f"  {path} {'sets it' if one['given'] else 'leaves the default'}{value}"


def as_yaml(value: Any) -> str:
    """A value on one line, as a YAML file has it; "unset" for none.

    >>> as_yaml({"rank": 8}), as_yaml(None), as_yaml(1e-6)
    ('{rank: 8}', 'unset', '1e-06')
    """
    if value is None or isinstance(value, float):
        return "unset" if value is None else repr(value)
    text = yaml.safe_dump(value, default_flow_style=True, width=1_000_000, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def kind_of(values: dict[str, Any]) -> str:
    """Which command a configuration is for, by the sections it has."""
    if "reward" not in values and "train" in values:
        return "reward-model" if "pairs_per_update" in (values["train"] or {}) else "sft"
    return "train" if "train" in values else "eval"


def _said(key: str, values: dict[str, Any], kind: type[Section], path: Path | None) -> dict[str, Any]:
    """What a configuration has at a key: as it is validated, or as it is written where it has mistakes."""
    given, written = _at(values, key)
    try:
        resolved = validate(kind, values, base=path and path.parent).model_dump(mode="json")
    except UserError:
        return {"given": given} | ({"value": written} if given else {})
    return {"given": given, "value": _at(resolved, key)[1]}


def _at(values: Any, key: str) -> tuple[bool, Any]:
    """Whether there is a value under a dotted key, and the value."""
    for part in key.split("."):
        if not isinstance(values, dict) or part not in values:
            return False, None
        values = values[part]
    return True, values
