"""Pieces of an algorithm by name, each given what its signature asks for.

Shapes: T tokens of a batch, M scored tokens of a micro-batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from hybridflow.config.locate import is_function_reference, load_function

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])

ABSENT: Any = object()  # what `given` returns where there is nothing for a parameter


def piece(registry: Mapping[str, FunctionT], name: str) -> FunctionT | Callable[..., Any]:
    """Returns the function of a registered name, or the user's own that ``file.py:function`` names.

    Raises:
        UserError: no such file or function.
    """
    return load_function(name) if is_function_reference(name) else registry[name]


def call(function: Callable[..., Any], given: Callable[[str], Any]) -> Any:
    """Calls a function with the value that is given for each of its parameters.

    Args:
        function: any function of named parameters.
        given: the value for a parameter's name, or `ABSENT`: the parameter's default is then taken.

    Raises:
        KeyError: there is nothing for a parameter without a default.
    """
    arguments = {}
    for name, parameter in inspect.signature(function).parameters.items():
        value = given(name)
        if value is not ABSENT:
            arguments[name] = value
        elif parameter.default is parameter.empty:
            raise KeyError(name)
    return function(**arguments)


def columns_read(function: Callable[..., Any]) -> list[str]:
    """Returns the columns ``x_T`` that a policy loss reads besides the scores: its parameters ``x_M``."""
    own = ("logp_M", "sequence_M")
    return [f"{p[:-1]}T" for p in inspect.signature(function).parameters if p.endswith("_M") and p not in own]
