"""The keys of a configuration, one by one, as the sections declare them: name, type, default, meaning."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from hybridflow.config.inherit import INHERITS
from hybridflow.config.paths import PATHS
from hybridflow.config.pieces.presets import PRESETS
from hybridflow.config.sections.base import Section
from hybridflow.config.sections.choices import Sections, sections_in, words


@dataclass(frozen=True, slots=True)
class Key:
    """A key of the configuration, described.

    Args:
        name: with dots: ``optim.lr``.
        type: described with its bounds; "section" where other keys are inside.
        default: as text: "*required*", "unset", "by preset", or the value between backticks.
        description: one line.
        where: describes the kinds of its section that have it; empty where all have it.
    """

    name: str
    type: str
    default: str
    description: str
    where: str = ""


def told_by(name: str, sections: Sections) -> str:
    """Describes how the kinds of a section are told apart; empty where there is one kind."""
    if sections.one_of is None:
        return ""
    return f"Its keys depend on {' and '.join(f'{name}.{key}' for key in sections.one_of.keys)}."


@functools.cache
def keys_of(model: type[Section]) -> tuple[Key, ...]:
    """Returns all keys of a whole configuration, sections before their contents."""
    return tuple(keys_below(Sections((model,)), ""))


def keys_below(sections: Sections, prefix: str) -> Iterator[Key]:
    """Describes the keys of a section and of those inside it, each with the prefix before its name."""
    for name, field in sections.fields.items():
        inner = sections_in(field.annotation, field.metadata)
        described = " ".join(str(field.description or (inner and inner.what)).split())
        described += f" {told_by(prefix + name, inner)}" if inner is not None and prefix else ""
        tells = sections.tells(name)
        if inner is not None:
            kind = "section"
        elif tells and words(field):
            kind = " or ".join(f"`{word}`" for word in sections.words(name))
        else:
            kind = _type(field.annotation, field.metadata)
        default = "unset" if tells and field.is_required() else _default(f"{prefix}{name}", field)
        yield Key(f"{prefix}{name}", kind, default, described, "" if tells else sections.where(name))
        if inner is not None:
            yield from keys_below(inner, f"{prefix}{name}.")


def _type(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """Describes a type with its bounds: ``integer >= 0``."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0], [*_metadata(arguments[1:]), *metadata])
    if origin in (Union, types.UnionType):
        return " or ".join(_type(a, metadata) for a in arguments if a is not type(None))
    if origin is Literal:
        return " or ".join(f"`{a}`" for a in arguments)
    if origin is list:
        word = _type(arguments[0])
        return f"path or list of {word}" if word.startswith("{") else f"list of {word}"  # one source is a path
    if origin is tuple:
        return f"[{', '.join(_type(a) for a in arguments)}]"
    if origin is dict:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "{" + ", ".join(annotation.model_fields) + "}"
    if any(m in PATHS for m in metadata):
        return "path"
    word = {int: "integer", float: "number", str: "text", bool: "true or false"}[annotation]
    return " ".join([word, " and ".join(_bounds(metadata))]).strip()


def _metadata(parts: Sequence[Any]) -> list[Any]:
    return [inner for p in parts for inner in (p.metadata if isinstance(p, FieldInfo) else [p])]


def _bounds(metadata: Sequence[Any]) -> list[str]:
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    return [f"{sign} {getattr(m, name):g}" for m in metadata for name, sign in signs.items() if hasattr(m, name)]


def _default(key: str, field: FieldInfo) -> str:
    section, _, name = key.partition(".")
    inside, _, last = key.rpartition(".")
    if inside in INHERITS:
        return f"as `{INHERITS[inside]}.{last}`"
    if section == "algorithm" and any(name in values for values in PRESETS.values()):
        return "by preset"
    if field.is_required():
        return "*required*"
    return in_words(field.get_default(call_default_factory=True))


def in_words(value: Any) -> str:
    """Writes a value as the page of keys shows it."""
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{list(value)}`" if isinstance(value, tuple) else f"`{value}`"
