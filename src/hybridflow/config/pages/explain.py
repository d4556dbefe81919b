"""Explains a key, and its value in a configuration: `hybridflow check --explain KEY`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from hybridflow.config.keys import Key, keys_of
from hybridflow.config.kinds.registry import KINDS
from hybridflow.config.load import read_values, validate
from hybridflow.config.names import meaning
from hybridflow.config.pieces.presets import CORRECTIONS, METHODS, PRESETS
from hybridflow.config.pieces.tables import ADVANTAGES, AGGREGATIONS, KL_ESTIMATORS, POLICY_LOSSES
from hybridflow.config.sections.base import Section
from hybridflow.config.sections.choices import sections_in
from hybridflow.config.sections.rewards import REWARDS, SPECIAL
from hybridflow.errors import UserError, near, nearest

SHOWN = 8  # keys that an error lists
CHOICES: dict[str, dict[str, str]] = {
    "algorithm.preset": {name: METHODS[name] for name in PRESETS},
    "algorithm.advantage": dict.fromkeys(ADVANTAGES, ""),
    "algorithm.policy_loss": dict.fromkeys(POLICY_LOSSES, ""),
    "algorithm.aggregation": dict.fromkeys(AGGREGATIONS, ""),
    "algorithm.kl_reward_estimator": dict.fromkeys(KL_ESTIMATORS, ""),
    "algorithm.kl_loss_estimator": dict.fromkeys(KL_ESTIMATORS, ""),
    "algorithm.correction.preset": dict.fromkeys(CORRECTIONS, ""),
    "reward.function": dict.fromkeys((*REWARDS, *SPECIAL), ""),
}


def explain(key: str, path: Path | None = None, overrides: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Explains a key, once for each command in which it differs.

    Args:
        key: with dots: ``optim.lr``; a section gives all its keys.
        path: a configuration; its own kind alone is then explained, with the value that it has there.
        overrides: see `load_config`.

    Returns:
        For each key: "key", "type", "default", "meaning", "commands"; with a configuration also "given" (whether it
        is set there) and "value" (set or not; absent where the configuration has mistakes, or has no use for the
        key). A key of some kinds of its section alone also has "where".

    Raises:
        UserError: there is no such key, or the configuration cannot be read.
    """
    values = None if path is None else read_values(path, overrides)
    names = KINDS if values is None else [kind_of(values)]
    kinds = {name: KINDS[name].config for name in names}
    found = _found(key, kinds)
    here = None if found else meaning(key)
    if here is not None and here.keys:
        here = here.within({known.name for kind in kinds.values() for known in keys_of(kind)})
        found = {known: commands for k in here.keys for known, commands in _found(k, kinds, inside=False).items()}
    if not found:
        raise UserError(f"there is no key {key!r} in a configuration for {' or '.join(kinds)}", fix=_like(key, kinds))
    described = [
        {
            "key": known.name,
            "type": known.type.replace("`", ""),
            "default": known.default.replace("`", "").strip("*"),
            "meaning": known.description,
            "commands": commands,
        }
        | ({"where": known.where} if known.where else {})
        | ({"choices": CHOICES[known.name]} if known.name in CHOICES else {})
        | ({"asked": f"{key}: {here.line()}"} if here is not None else {})
        for known, commands in found.items()
    ]
    if values is not None:
        for one in described:
            one |= _said(str(one["key"]), values, next(iter(kinds.values())), path)
    return described


def _found(key: str, kinds: Mapping[str, type[Section]], *, inside: bool = True) -> dict[Key, list[str]]:
    """Returns the keys of that name, and those inside of it, with the commands that have them."""
    found: dict[Key, list[str]] = {}
    for command, kind in kinds.items():
        for known in keys_of(kind):
            if known.name == key or (inside and known.name.startswith(f"{key}.")):
                found.setdefault(known, []).append(command)
    return found


def _like(key: str, kinds: Mapping[str, type[Section]]) -> str:
    """Names the keys that may be meant: those that end so, those with the word in them, or the nearest."""
    if (here := meaning(key)) is not None:
        return here.line()
    names = sorted({known.name for kind in kinds.values() for known in keys_of(kind)})
    word = key.rpartition(".")[2]
    same = [name for name in names if name.rpartition(".")[2] == word]
    some = same or [name for name in names if word and word.lower() in name.rpartition(".")[2]]
    if not some:
        return nearest(key, names) if near(key, names) else f"sections: {', '.join(_tops(kinds))}"
    more = f" (and {len(some) - SHOWN} more)" if len(some) > SHOWN else ""
    return f"did you mean {' or '.join(map(repr, some[:SHOWN]))}{more}?"


def _tops(kinds: Mapping[str, type[Section]]) -> list[str]:
    return list(dict.fromkeys(name for kind in kinds.values() for name in kind.model_fields))


def explanation_lines(described: Sequence[dict[str, Any]], path: Path | None) -> Iterator[str]:
    """Yields an explanation as lines for a reader."""
    if described and "asked" in described[0]:
        yield str(described[0]["asked"])
    for one in described:
        yield f"{one['key']}  ({', '.join(one['commands'])})"
        if one["type"] != "section":
            yield f"  {one['type']}; default: {one['default']}"
        yield f"  {one['meaning']}"
        if "where" in one:
            yield f"  it is for {one['where']} alone"
        for name, words in one.get("choices", {}).items():
            yield f"    {name:{max(map(len, one['choices']))}}  {words}".rstrip()
        if "given" in one and one["type"] != "section":
            value = f": {as_yaml(one['value'])}" if "value" in one else ""
            default = "leaves the default" if value or "where" not in one else "has no use for it"
            yield f"  {path} {'sets it' if one['given'] else default}{value}"


def as_yaml(value: Any) -> str:
    """Returns a value on one line, as a YAML file has it; "unset" for none.

    >>> as_yaml({"rank": 8}), as_yaml(None), as_yaml(1e-6)
    ('{rank: 8}', 'unset', '1e-06')
    """
    if value is None or isinstance(value, float):
        return "unset" if value is None else repr(value)
    text = yaml.safe_dump(value, default_flow_style=True, width=1_000_000, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def kind_of(values: Mapping[str, Any]) -> str:
    """Returns the command that a configuration is for: the one that knows most of its keys, and of those the one that
    lacks least.

    Raises:
        UserError: it could be for several.
    """
    misfits = {name: _misfit(values, kind.config.model_fields) for name, kind in KINDS.items()}
    best = [name for name, misfit in misfits.items() if misfit == min(misfits.values())]
    if len(best) > 1 and any(values.values()):
        needs = "; ".join(f"for {name} {_needed(values, KINDS[name].config)}" for name in best)
        raise UserError(
            f"nothing says whether this configuration is for {' or for '.join(best)}",
            fix=f"add what is missing: {needs}",
        )
    return best[0]


def _misfit(values: Mapping[str, Any], fields: Mapping[str, FieldInfo]) -> tuple[int, int]:
    """Counts the given keys that a kind does not know, and the keys that it requires and that are not given."""
    strange = [given for name, given in values.items() if name not in fields]
    unknown, missing = sum(max(1, len(given)) if isinstance(given, Mapping) else 1 for given in strange), 0
    for name, field in fields.items():
        inner, given = sections_in(field.annotation, field.metadata), values.get(name)
        if name not in values:
            missing += field.is_required()
        elif inner is not None and isinstance(given, Mapping):
            below = _misfit(given, inner.fields)
            unknown, missing = unknown + below[0], missing + below[1]
    return unknown, missing


def _needed(values: Mapping[str, Any], kind: type[BaseModel]) -> str:
    """Describes the required keys that are not given."""
    lacking = [name for name, field in kind.model_fields.items() if field.is_required() and name not in values]
    for name, field in kind.model_fields.items():
        inner = sections_in(field.annotation, field.metadata)
        if inner is not None and isinstance(given := values.get(name), Mapping):
            lacking += [f"{name}.{k}" for k, f in inner.fields.items() if f.is_required() and k not in given]
    return ", ".join(lacking) or "nothing"


def _said(key: str, values: dict[str, Any], kind: type[Section], path: Path | None) -> dict[str, Any]:
    """Returns the value that a configuration has at a key: as it is validated, or as it is written where it has
    mistakes.
    """
    given, written = _at(values, key)
    try:
        resolved = validate(kind, values, base=path and path.parent).model_dump(mode="json")
    except UserError:
        return {"given": given} | ({"value": written} if given else {})
    here, value = _at(resolved, key)
    elsewhere = not here and isinstance(_at(resolved, key.rpartition(".")[0])[1], dict)  # a key of another choice
    return {"given": given} | ({} if elsewhere else {"value": value})


def _at(values: Any, key: str) -> tuple[bool, Any]:
    """Returns whether there is a value under a dotted key, and the value."""
    for part in key.split("."):
        if not isinstance(values, dict) or part not in values:
            return False, None
        values = values[part]
    return True, values
