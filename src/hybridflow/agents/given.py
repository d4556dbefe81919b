"""Tools, environments and loops that a program gives as objects: the names that the run's configuration has for them.

A name holds a fingerprint (`config/fingerprints.py`): when the run is resumed with another object, the setting has
changed, and the run says so.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Mapping
from typing import Any, TypeAlias

from hybridflow.config.fingerprints import GIVEN, fingerprint
from hybridflow.config.locate import load_function
from hybridflow.errors import UserError

Given: TypeAlias = Mapping[str, Any]
NOTHING: Given = {}


def name_objects(section: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Takes the objects out of an ``agent`` section.

    Args:
        section: plain values, whose ``tools``, ``environment``, ``play`` and ``plays`` may be, or hold, objects.

    Returns:
        The section as a configuration can hold it, and the objects by the names that stand for them there.

    Raises:
        UserError: the tools are no list, or processes of their own would need the objects.
    """
    objects: dict[str, Any] = {}

    def named(value: Any) -> Any:
        if value is None or isinstance(value, str):
            return value
        plain = re.sub(r"\W", "", _name(value))
        name = f"{GIVEN}{plain}@{fingerprint([value])}"
        objects[name] = value
        return name

    result = dict(section)
    if result.get("tools") is not None:
        tools = result["tools"]
        if isinstance(tools, str) or not isinstance(tools, list | tuple):
            raise UserError(f"tools is a {type(tools).__name__}", fix="give a list: tools=[add, search]")
        result["tools"] = [named(value) for value in tools]
    for key in ("environment", "play"):
        if key in result:
            result[key] = named(result[key])
    if isinstance(result.get("plays"), Mapping):
        result["plays"] = {name: named(value) for name, value in result["plays"].items()}
    if objects and result.get("processes"):
        raise UserError(
            f"{', '.join(_name(value) for value in objects.values())} is given as an object, and agent.processes asks "
            "for processes of their own",
            why="another process loads it by its name, from a file",
            fix="name it as file.py:function, or leave agent.processes out",
        )
    return result, objects


def shown(reference: str) -> str:
    """Returns a name of a configuration as messages have it: of an object that was given, without its fingerprint.

    >>> shown("given:add@4b97adf348fa")
    'add'
    """
    return reference.removeprefix(GIVEN).partition("@")[0] if reference.startswith(GIVEN) else reference


def find(reference: str, given: Given) -> Any:
    """Returns what a name of a configuration stands for: an object that was given, or a function of a file.

    Raises:
        UserError: the object was given to another program, or the function is not there.
    """
    if not reference.startswith(GIVEN):
        return load_function(reference)
    if reference not in given:
        raise UserError(
            f"{reference} is an object that a program gave to this run, and a configuration cannot hold it",
            fix="run that program again, or name it as file.py:function",
        )
    return given[reference]


def _name(value: Any) -> str:
    while isinstance(value, functools.partial):
        value = value.func
    named = value if inspect.isroutine(value) or inspect.isclass(value) else type(value)
    return str(named.__name__)
