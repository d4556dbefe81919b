"""``dotted.key=value`` on the command line: the type of the key decides how the value is read.

A key that holds text takes it as typed, `#`, colons, brackets and spaces included. ``null`` leaves a key unset, and
quotes around a whole value are taken off (``'"null"'`` is the word). Numbers, true and false, lists and sections are
read as YAML; for a list of texts, one text is a list of one. A key of any type (`reward.kwargs`, `rollout.engine_args`)
takes a value that reads as a number, true, false, a list or a section as that, everything else as text.
"""

from __future__ import annotations

import re
import types
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

from hybridflow.config.kinds.registry import KINDS
from hybridflow.config.yaml_file import Loader, refuse_repeated
from hybridflow.errors import UserError

UNSET = ("null", "")
_WHOLE = re.compile(r"[-+]?(0|[1-9]\d*)")
_NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)?")
_TAG = "tag:yaml.org,2002:"


def apply_override(values: dict[str, Any], text: str) -> None:
    """Sets the value of ``dotted.key=value`` in plain values.

    Raises:
        UserError: it is not of that form, or its value is not what the key needs.
    """
    key, sign, value = text.partition("=")
    key = key.strip()
    if not sign or not key:
        raise UserError(f"{text!r} is not an override", fix="write dotted.key=value, for example optim.lr=1e-4")
    if key[0] in "-+~":
        raise UserError(f"{text!r} is not an override", fix=f"keys have no sign before them: {text.lstrip('-+~')}")
    *parents, last = path = key.split(".")
    section = values
    for name in parents:
        inner = section.setdefault(name, {})
        if inner is None:
            inner = section[name] = {}
        if not isinstance(inner, dict):
            raise UserError(f"override {text!r}: {name} is a value, not a section")
        section = inner
    try:
        section[last] = read_value(value, annotation_at(path))
    except yaml.YAMLError as error:
        raise UserError(
            f"the value in override {text!r} is not valid YAML",
            fix=f"close what is open; for a text, put quotes inside of those of the shell: {key}='\"...\"'",
        ) from error


def annotation_at(path: Sequence[str]) -> Any:
    """Returns the type of a dotted key, in the first kind of configuration that has it; None where none has."""
    return next((found for kind in KINDS.values() if (found := _below(kind.config, path)) is not None), None)


def read_value(text: str, annotation: Any) -> Any:
    """Returns the value that a text means to a key of this type.

    Raises:
        yaml.YAMLError: it begins a list or a section, where the key holds one, and does not end it.
    """
    members = _members(annotation)
    nested = [m for m in members if _is_nested(m)]
    if not nested:
        return _scalar(text, members)
    items = next((_members(get_args(m)[0]) for m in nested if get_origin(m) is list), [])
    plain = text if items == [str] else text.strip()
    if plain[:1] in ("[", "{"):
        return _structure(plain, annotation)
    if plain in UNSET or (plain == "~" and items != [str]):
        return [] if members == nested and items == [str] else None
    if members == nested and items and not _is_nested(items[0]):
        return [_scalar(plain, items)]
    return _text(text)


def _below(annotation: Any, path: Sequence[str]) -> Any:
    if not path:
        return annotation
    for member in _members(annotation):
        inner: Any = None
        if isinstance(member, type) and issubclass(member, BaseModel):
            field = member.model_fields.get(path[0])
            inner = None if field is None else field.annotation
        elif get_origin(member) is dict:
            inner = get_args(member)[1]
        elif member is Any:
            return Any
        found = None if inner is None else _below(inner, path[1:])
        if found is not None:
            return found
    return None


def _members(annotation: Any) -> list[Any]:
    """Returns the types that a value may have, without None and without annotations."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _members(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [m for inner in get_args(annotation) for m in _members(inner)]
    return [] if annotation is type(None) else [Any if annotation is None else annotation]


def _is_nested(member: Any) -> bool:
    return get_origin(member) in (list, tuple, dict) or (isinstance(member, type) and issubclass(member, BaseModel))


def _is_text(annotation: Any) -> bool:
    return all(m is str or get_origin(m) is Literal for m in _members(annotation))


def _scalar(text: str, members: Sequence[Any]) -> Any:
    if list(members) == [str]:
        return _text(text)
    if Any in members or str in members:
        return _open(text)
    if _is_text(members[0]):  # a word of several
        return _text(text.strip())
    plain = text.strip()
    if plain in (*UNSET, "~"):
        return None
    if plain[0] in "[{":
        return _structure(plain, Any)
    return _number(plain) if members != [bool] else unquoted(plain) or plain


def _text(text: str) -> str | None:
    """Returns a text as it is typed; None for ``null``, and the content of quotes that surround all of it."""
    inner = unquoted(text)
    return None if text == "null" else text if inner is None else inner


def unquoted(text: str) -> str | None:
    """Returns the content of the quotes, where all of a text is one quoted text of YAML on one line; else None.

    >>> unquoted("'#'"), unquoted('"a" or "b"')
    ('#', None)
    """
    if len(text) < 2 or text[0] not in "'\"" or text[-1] != text[0] or len(text.splitlines()) > 1:
        return None
    try:
        node = yaml.compose(text, Loader)
    except yaml.YAMLError:
        return None
    if not isinstance(node, yaml.ScalarNode) or node.style != text[0] or node.end_mark.index != len(text):
        return None
    return str(node.value)


def _number(plain: str) -> Any:
    """Reads a number in Python's notation or YAML's; returns other text unchanged, for the message that refuses it."""
    plain = unquoted(plain) or plain
    for read in (int, float, lambda text: int(text, 0), lambda text: float(text.replace(".", "", 1))):
        try:
            return read(plain)
        except ValueError:
            continue
    return plain


def _open(text: str) -> Any:
    """Returns the value of a key of any type."""
    plain = text.strip()
    if plain[:1] in ("[", "{"):
        try:
            return _structure(plain, Any)
        except yaml.YAMLError:
            return text
    if plain in (*UNSET, "~"):
        return None
    if _WHOLE.fullmatch(plain):
        return int(plain)
    if _NUMBER.fullmatch(plain) and not plain.lstrip("-+").replace("_", "").isdigit():
        return float(plain)
    try:
        node = yaml.compose(plain, Loader)
    except yaml.YAMLError:
        return text
    if isinstance(node, yaml.ScalarNode) and node.value == plain and node.tag in (f"{_TAG}bool", f"{_TAG}null"):
        return Loader("").construct_object(node)
    if isinstance(node, yaml.ScalarNode) and node.value == plain and plain.lower().lstrip("-+") in (".inf", ".nan"):
        return float(plain.replace(".", "", 1))
    inner = unquoted(text)
    return text if inner is None else inner


def _structure(plain: str, annotation: Any) -> Any:
    """Reads a list or a section in YAML whose texts stay texts."""
    node = yaml.compose(plain, Loader)
    refuse_repeated(node, (), f"the value {plain!r}")
    return _converted(node, annotation)


def _converted(node: Any, annotation: Any) -> Any:
    members = _members(annotation)
    if isinstance(node, yaml.SequenceNode):
        items = next((get_args(m) for m in members if get_origin(m) in (list, tuple)), (Any,))
        return [_converted(entry, items[min(i, len(items) - 1)]) for i, entry in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        return {key.value: _converted(value, _inner(members, str(key.value))) for key, value in node.value}
    if node.style is not None:
        return node.value
    if node.value in (*UNSET, "~"):
        return None
    return read_value(node.value, annotation) if any(map(_is_nested, members)) else _scalar(node.value, members)


def _inner(members: Sequence[Any], name: str) -> Any:
    return next((found for m in members if (found := _below(m, [name])) is not None), Any)
