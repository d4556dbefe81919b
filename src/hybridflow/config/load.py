"""From a YAML file and dotted overrides to a validated configuration, with errors that name the key."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from hybridflow.config.locate import is_function_reference, locate
from hybridflow.config.sections import Section
from hybridflow.errors import UserError, nearest

ConfigT = TypeVar("ConfigT", bound=Section)

FILE_KEYS = (
    ("model", "path"),
    ("model", "reference"),
    ("critic", "path"),
    ("data", "train"),
    ("data", "eval"),
    ("data", "template"),
)
FUNCTION_KEYS = (  # a name of ours, or file.py:function
    ("data", "order"),
    ("reward", "function"),
    ("eval", "answer"),
    ("algorithm", "advantage"),
    ("algorithm", "policy_loss"),
    ("algorithm", "aggregation"),
)


def load_config(kind: type[ConfigT], path: str | Path, overrides: Sequence[str] = ()) -> ConfigT:
    """Reads a YAML file, applies overrides such as ``optim.lr=1e-4`` and validates the whole.

    Args:
        kind: RlConfig, SftConfig or EvalConfig.
        path: the YAML file.
        overrides: ``dotted.key=value``, the value in YAML; they win over the file.

    Raises:
        UserError: no file, not YAML, an unknown key (the nearest is named), or a value that does not fit.
    """
    return validate(kind, read_values(path, overrides), source=str(path))


def read_values(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The plain values of a YAML file and overrides, not validated; files beside it are found.

    Raises:
        UserError: no file, not YAML, not sections, or an override that is none.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no configuration file {path}", fix="give a YAML file, for example recipes/carry/grpo.yaml")
    try:
        values = yaml.load(path.read_text(), _Loader) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold sections (run:, model:, ...), it holds a {type(values).__name__}")
    for text in overrides:
        apply_override(values, text)
    values = {name: section for name, section in values.items() if section is not None}  # all its keys commented out
    _locate_files(values, path.parent)
    return values


def validate(kind: type[ConfigT], values: dict[str, Any], *, source: str = "the configuration") -> ConfigT:
    """Validates plain values; all mistakes are reported together.

    Raises:
        UserError: see `load_config`.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        lines = [_explain(kind, dict(e)) for e in error.errors()]
    raise UserError(
        f"{source} has {len(lines)} mistake{'s' * (len(lines) > 1)}:\n" + "\n".join(f"  {x}" for x in lines)
    )


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-4 as a string; everyone here means a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def _locate_files(values: dict[str, Any], base: Path) -> None:
    """Lets a configuration name files beside itself, wherever the command is run."""
    for section, key in (*FILE_KEYS, *FUNCTION_KEYS):
        inner = values.get(section)
        if isinstance(inner, dict) and key in inner:
            inner[key] = _located(inner[key], base, only_functions=(section, key) in FUNCTION_KEYS)
    if isinstance(reward := values.get("reward"), dict):
        _locate_rewards(reward, base)


def _locate_rewards(reward: dict[str, Any], base: Path) -> None:
    """The files that parts of a reward name."""
    sources, terms = reward.get("sources"), reward.get("terms")
    if isinstance(sources, dict):
        reward["sources"] = {name: _located(value, base, only_functions=True) for name, value in sources.items()}
    named = [(term, "function", True) for term in (terms.values() if isinstance(terms, dict) else ())]
    for section, keys in [("model", ("path", "template")), ("judge", ("path", "template"))]:
        named += [(reward.get(section), key, False) for key in keys]
    for inner, key, only_functions in [*named, (reward.get("judge"), "parser", True)]:
        if isinstance(inner, dict) and key in inner:
            inner[key] = _located(inner[key], base, only_functions=only_functions)


def _located(value: Any, base: Path, *, only_functions: bool) -> Any:
    """The same value with its file found: a name, a list of names, or an object with a name under ``source``."""
    if isinstance(value, str):
        return value if only_functions and not is_function_reference(value) else locate(value, base)
    if isinstance(value, list):
        return [_located(entry, base, only_functions=only_functions) for entry in value]
    if isinstance(value, dict) and "source" in value:
        return {**value, "source": _located(value["source"], base, only_functions=only_functions)}
    return value


def apply_override(values: dict[str, Any], text: str) -> None:
    """Sets what ``dotted.key=value`` says in plain values.

    Raises:
        UserError: it is not of that form, or its value is not YAML.
    """
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise UserError(f"{text!r} is not an override", fix="write dotted.key=value, for example optim.lr=1e-4")
    *parents, last = key.strip().split(".")
    section = values
    for name in parents:
        inner = section.setdefault(name, {})
        if inner is None:
            inner = section[name] = {}
        if not isinstance(inner, dict):
            raise UserError(f"override {text!r}: {name} is a value, not a section")
        section = inner
    try:
        section[last] = yaml.load(value, _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"the value in override {text!r} is not valid YAML", fix="quote it: key='...'") from error


def _explain(kind: type[BaseModel], error: dict[str, Any]) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = _fields_at(kind, error["loc"][:-1])
        return f"{where}: unknown key; {nearest(str(error['loc'][-1]), known)}"
    if error["type"] == "missing":
        return f"{where}: missing"
    message = str(error["msg"]).removeprefix("Value error, ")
    if not where or error["type"] == "value_error":
        return f"{where}: {message}" if where else message
    return f"{where}: {message[0].lower() + message[1:]} (it is {error['input']!r})"


def _fields_at(kind: type[BaseModel], location: Sequence[Any]) -> list[str]:
    model: Any = kind
    for part in location:
        if isinstance(part, int):
            continue  # a place in a list, whose entries were found with the list
        model = _section_in(model.model_fields[part].annotation)
        if model is None:
            return []
    return list(model.model_fields)


def _section_in(annotation: Any) -> Any:
    """The section in an annotation such as ``LoraSection | None`` or ``list[SourceSection]``."""
    if hasattr(annotation, "model_fields"):
        return annotation
    return next((found for inner in get_args(annotation) if (found := _section_in(inner)) is not None), None)
