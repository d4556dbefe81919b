"""Rewards that a program gives as objects: the name that the run's configuration records for them.

The name holds a fingerprint of the source text (of a lambda its code), defaults, closure values and bound arguments.
When the run is resumed with another function, the setting has changed, and the run says so. What a function reads
elsewhere (globals, files) is not in it.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import re
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from hybridflow.config.kinds.rl import RlConfig
from hybridflow.config.sections.rewards import GIVEN
from hybridflow.rewards.graders.function import name_of

DEPTH = 20  # of lists and dicts in each other; deeper ones, and those that hold themselves, count by their type

GivenReward: TypeAlias = Callable[..., Any] | Sequence[Callable[..., Any]]


def with_given(config: RlConfig, reward: GivenReward | None) -> RlConfig:
    """Returns a configuration that records a reward which a program gave, instead of those that it names.

    Args:
        config: the configuration.
        reward: a function, a callable object, or a list of them; None leaves the configuration as it is.
    """
    if reward is None:
        return config
    name = recorded_name(reward)
    if config.reward.function.partition("@")[0] == name.partition("@")[0]:
        return config  # recorded before the reward was tried: an object may count its calls
    recorded: dict[str, Any] = {"function": name, "terms": None, "kwargs": {}}
    return config.model_copy(update={"reward": config.reward.model_copy(update=recorded)})


def named(functions: Sequence[Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """Names every function of a list; of several with one name the later ones have a number."""
    names: dict[str, Callable[..., Any]] = {}
    for function in functions:
        name, number = name_of(function), 2
        while name in names:
            name, number = f"{name_of(function)}_{number}", number + 1
        names[name] = function
    return names


def recorded_name(reward: GivenReward) -> str:
    """Returns what stands for a reward in the configuration of a run: ``given:NAME@FINGERPRINT``.

    Args:
        reward: a function, a callable object, or a list of them.
    """
    functions = list(reward) if isinstance(reward, Sequence) else [reward]
    names = "+".join(re.sub(r"\W", "", name_of(function)) for function in functions)
    content = json.dumps([_function(function) for function in functions], sort_keys=True)
    return f"{GIVEN}{names}@{hashlib.blake2b(content.encode(), digest_size=6).hexdigest()}"


def _function(value: Any, depth: int = 0) -> Any:
    """Returns what a reward is made of: a function, a method, a partial, or an object with its settings."""
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
    if depth < DEPTH and isinstance(value, functools.partial | types.FunctionType):  # that the reward calls
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
