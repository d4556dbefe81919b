"""Fingerprints of functions and classes that a program gives as objects: what they are made of, in a few letters.

A fingerprint covers the source text (of a lambda its code), defaults, closure values and bound arguments. What a
function reads elsewhere (globals, files) is not in it.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import types
from collections.abc import Mapping, Sequence
from typing import Any

GIVEN = "given:"  # begins the name that a configuration has for an object which a program gave
DEPTH = 20  # of lists and dicts in each other; deeper ones, and those that hold themselves, count by their type


def fingerprint(values: Sequence[Any]) -> str:
    """Returns the fingerprint of functions, classes or callable objects."""
    content = json.dumps([_function(value) for value in values], sort_keys=True)
    return hashlib.blake2b(content.encode(), digest_size=6).hexdigest()


def _function(value: Any, depth: int = 0) -> Any:
    """Returns what a function is made of: a function, a method, a partial, or an object with its settings."""
    if isinstance(value, functools.partial):
        return [_function(value.func, depth), _content(value.args, depth), _content(value.keywords, depth)]
    if isinstance(value, types.MethodType):
        return [value.__name__, _function(value.__self__, depth)]
    if isinstance(value, types.FunctionType):
        defaults = _content([value.__defaults__, value.__kwdefaults__], depth)
        cells = zip(value.__code__.co_freevars, value.__closure__ or ())
        closure = {name: _content(cell.cell_contents, depth) for name, cell in cells if _is_filled(cell)}
        return [value.__qualname__, _text_of(value), defaults, closure]
    kind = value if isinstance(value, type) else type(value)
    return [
        kind.__qualname__,
        _source(kind),
        _content(getattr(value, "__dict__", {}), depth) if kind is not value else None,
    ]


def _content(value: Any, depth: int = 0) -> Any:
    """Returns what JSON can hold of a value; of other objects the type alone, because their text may be an address."""
    if value is None or isinstance(value, str | int | float):
        return value
    if depth < DEPTH and isinstance(value, Mapping):
        return {str(key): _content(inside, depth + 1) for key, inside in value.items()}
    if depth < DEPTH and isinstance(value, list | tuple):
        return [_content(inside, depth + 1) for inside in value]
    if depth < DEPTH and isinstance(value, set | frozenset):
        return sorted(json.dumps(_content(inside, depth + 1), sort_keys=True) for inside in value)
    if depth < DEPTH and isinstance(value, functools.partial | types.FunctionType):  # that the function calls
        return _function(value, depth + 1)
    return type(value).__qualname__


def _text_of(function: types.FunctionType) -> Any:
    """Returns a function's source; a lambda's code, because its line holds what else is written there."""
    source = None if function.__name__ == "<lambda>" else _source(function)
    return _code(function.__code__) if source is None else source


def _source(value: Any) -> str | None:
    try:
        return inspect.getsource(value)
    except (OSError, TypeError):  # typed into an interpreter, or written in C
        return None


def _code(code: types.CodeType) -> list[Any]:
    return [code.co_code.hex(), list(code.co_names), [_constant(constant) for constant in code.co_consts]]


def _constant(value: Any) -> Any:
    if isinstance(value, frozenset):  # `in {...}`; its order differs from one process to the next
        return sorted(map(repr, value))
    return _code(value) if isinstance(value, types.CodeType) else repr(value)


def _is_filled(cell: types.CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:  # a name that is not set yet
        return False
    return True
