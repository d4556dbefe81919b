"""From a YAML file and dotted overrides to a validated configuration, with errors that name the key."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, get_args, overload

from pydantic import ValidationError

from hybridflow.config.keys import keys_of
from hybridflow.config.kinds.rl import RlConfig
from hybridflow.config.names import meaning
from hybridflow.config.overrides import annotation_at, apply_override
from hybridflow.config.paths import home
from hybridflow.config.sections.base import HERE, Section
from hybridflow.config.sections.choices import Sections, sections_in
from hybridflow.config.yaml_file import read_yaml
from hybridflow.errors import UserError, near, nearest

ConfigT = TypeVar("ConfigT", bound=Section)


@overload
def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RlConfig: ...


@overload
def load_config(path: str | Path, overrides: Sequence[str] = (), *, kind: type[ConfigT]) -> ConfigT: ...


def load_config(path: str | Path, overrides: Sequence[str] = (), *, kind: type[Any] = RlConfig) -> Any:
    """Reads a YAML file, applies overrides such as ``optim.lr=1e-4`` and validates the whole.

    Args:
        path: the YAML file.
        overrides: ``dotted.key=value``, see `overrides`; they win over the file.
        kind: the class of the configuration: by default that of a reinforcement-learning run.

    Raises:
        UserError: no file, not YAML, an unknown key (the nearest is named), or a value that does not fit.
    """
    return validate(kind, read_values(path, overrides), source=str(path), base=home(path).parent)


def read_values(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Reads the plain values of a YAML file and overrides, without validation.

    Raises:
        UserError: there is no file, it is not YAML, a key occurs twice, a section is none, or an override is malformed.
    """
    path = home(path)
    if not path.is_file():
        files = ", ".join(str(file) for file in sorted(path.glob("*.yaml")))
        if files:
            fix = f"give one of its files: {files}"
        elif "=" in path.name:
            fix = "give the YAML file first, then keys that it does not have: CONFIG key=value"
        else:
            meant = near(path.name, [file.name for file in path.parent.glob("*.y*ml")])
            other = f"did you mean {path.parent / meant}? or " if meant is not None else ""
            fix = f"{other}give a YAML file; `hybridflow recipes carry` copies an example to recipes/carry"
        raise UserError(f"{path} is a folder" if path.is_dir() else f"no configuration file {path}", fix=fix)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}", fix="save it as UTF-8") from error
    values = read_yaml(text, str(path)) or {}
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold sections (run:, model:, ...), it holds a {type(values).__name__}")
    for override in overrides:
        apply_override(values, override)
    return {name: section for name, section in values.items() if section is not None}  # all its keys commented out


def validate(
    kind: type[ConfigT], values: dict[str, Any], *, source: str = "the configuration", base: Path | None = None
) -> ConfigT:
    """Validates plain values; all mistakes are reported together.

    Args:
        kind: see `load_config`.
        values: sections by name.
        source: how to call them in messages.
        base: a folder in which named files are looked up, if the current one has none of that name.

    Raises:
        UserError: see `load_config`.
    """
    try:
        return kind.model_validate(values, context={"base": base})
    except ValidationError as error:
        lines = [line for e in error.errors() for line in _explain(kind, dict(e))]
    raise UserError(
        f"{source} has {len(lines)} mistake{'s' * (len(lines) > 1)}:\n" + "\n".join(f"  {x}" for x in lines)
    )


def _explain(kind: type[Section], error: dict[str, Any]) -> Iterator[str]:
    sections, chosen, written = _sections_at(kind, error["loc"])
    where = ".".join(written)
    if error["type"] == "extra_forbidden" and sections is not None and written[-1] in sections.fields:
        yield _of_another_kind(sections, chosen, written)
        return
    if error["type"] == "extra_forbidden":
        inside = [key for key in _leaves(error["input"], where) if meaning(key) is not None]
        if len(written) == 1 and meaning(where) is None and _misspelt(kind, sections, where) is not None:
            inside = []  # it is a section of ours, rather than another program's
        for key in inside or [where]:
            yield f"{key}: unknown key; {_hint(kind, sections, written[-1], key)}"
        return
    if error["type"] == "missing":
        instead = [f"{where.rpartition('.')[0]}.{key}" for key in _by_presence(sections)]
        yield f"{where}: missing" + f"; or give {' or '.join(instead)} instead" * bool(instead)
        return
    message = str(error["msg"]).removeprefix("Value error, ").replace(HERE, where)
    if not where or error["type"] == "value_error":
        yield f"{where}: {message}" if where else message
        return
    if error["type"] in ("model_type", "dict_type"):
        message = f"it must be a {'section' if error['type'] == 'model_type' else 'mapping'}, such as {{key: value}}"
    yield f"{where}: {message[0].lower() + message[1:]} (it is {error['input']!r}){_instead_of_minus_one(error)}"


def _of_another_kind(sections: Sections, chosen: str, written: Sequence[str]) -> str:
    """Says what is wrong with a key that belongs to other kinds of its section."""
    assert sections.one_of is not None
    section, key = ".".join(written[:-1]), written[-1]
    told = ", ".join(f"{section}.{other}" for other in sections.one_of.keys if other != key)
    return f"{section}.{key} is for {sections.where(key)}, and this is {chosen} ({told}): change that, or leave it out"


def _by_presence(sections: Sections | None) -> list[str]:
    """Returns the keys whose presence chooses another kind of section."""
    one_of = None if sections is None else sections.one_of
    return [] if sections is None or one_of is None else [key for key in one_of.keys if not sections.words(key)]


def _instead_of_minus_one(error: dict[str, Any]) -> str:
    """Says which value means "never" or "all" here, to a user who writes -1 as in other programs."""
    if error["input"] not in (-1, "-1"):
        return ""
    if error["type"] == "greater_than_equal":
        return "; for never, none or all use 0"
    unset = type(None) in get_args(annotation_at([str(part) for part in error["loc"]]))
    return "; for no limit leave it out, or write null" if unset else ""


def _leaves(value: Any, where: str) -> Iterator[str]:
    """Yields the dotted keys of all values below a key, or the key itself."""
    if not isinstance(value, dict) or not value:
        yield where
        return
    for name, inner in value.items():
        yield from _leaves(inner, f"{where}.{name}")


def _hint(kind: type[Section], sections: Sections | None, last: str, where: str) -> str:
    """Returns a hint for an unknown key: another program's name for a key, a key from another section, or the nearest
    name.
    """
    every = {key.name: key for key in keys_of(kind)}
    found = meaning(where)
    if found is not None:
        beside = [f"{where.rpartition('.')[0]}.{name}" for key in found.keys for name in (key.rpartition(".")[2], key)]
        own = tuple(key for key in beside if key in every)  # this section's, or its engine's
        return replace(found, keys=own or found.within(every).keys).line()
    return _misspelt(kind, sections, last) or nearest(last, [] if sections is None else sections.fields)


def _misspelt(kind: type[Section], sections: Sections | None, last: str) -> str | None:
    """Returns the key that is meant: a similar one of this section, or those of this name in other sections."""
    if sections is not None and near(last, sections.fields) is not None:
        return nearest(last, sections.fields)
    every = [key.name for key in keys_of(kind)]
    elsewhere = sorted(key for key in every if key.rpartition(".")[2] == last and key.count(".") == 1)
    return f"did you mean {' or '.join(map(repr, elsewhere[:4]))}?" if elsewhere else None


def _sections_at(kind: type[Section], location: Sequence[Any]) -> tuple[Sections | None, str, list[str]]:
    """Returns the section around a wrong value, the name of its kind, and the place as a user writes it.

    pydantic's location names the kind of a section after the section, and a place in a list.
    """
    sections: Sections | None = Sections((kind,))
    chosen, written, below = "", [], list(location)
    while below:
        part = below.pop(0)
        written.append(str(part))
        if isinstance(part, int) or sections is None or not below:
            continue
        field = sections.fields.get(part)
        sections = None if field is None else sections_in(field.annotation, field.metadata, lists=True)
        chosen = below.pop(0) if sections is not None and sections.one_of is not None else ""
    return sections, chosen, written
