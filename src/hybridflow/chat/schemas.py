"""Tools that a row or a program describes, read into the form that chat templates list."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from hybridflow.chat.messages import RefusedValue, kind_of, without_nulls

_FIX = 'write {"type": "function", "function": {"name": ..., "description": ..., "parameters": {JSON schema}}}'


def read_tools(value: object) -> tuple[dict[str, Any], ...]:
    """Reads the tools of a row: a list of OpenAI's schemas, or of what these hold under "function", or JSON text of it.

    Keys without a value are left out, as Parquet fills them in.

    Raises:
        RefusedValue: it is something else.
    """
    found = _json(value) if isinstance(value, str) and value.strip() else value
    if not found:
        return ()
    if isinstance(found, Mapping):
        found = [found]
    if not isinstance(found, list | tuple):
        raise RefusedValue(f"is {kind_of(found)}, not a list of tools", fix=_FIX)
    tools = tuple(_tool(tool, i) for i, tool in enumerate(found))
    names = [tool["function"]["name"] for tool in tools]
    for name in names:
        if names.count(name) > 1:
            raise RefusedValue(
                "has two tools of one name", detail=name, why="a call could mean either", fix="rename one"
            )
    return tools


def _tool(value: object, number: int) -> dict[str, Any]:
    found = _json(value) if isinstance(value, str) else value
    if not isinstance(found, Mapping):
        raise RefusedValue(f"has a tool that is {kind_of(found)}", detail=f"tool {number}", fix=_FIX)
    function = found.get("function") if isinstance(found.get("function"), Mapping) else found
    assert isinstance(function, Mapping)
    function = without_nulls(function)
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise RefusedValue(
            "has a tool without a name", detail=f"tool {number}: {', '.join(function) or 'no keys'}", fix=_FIX
        )
    if not isinstance(function.setdefault("parameters", {"type": "object", "properties": {}}), Mapping):
        raise RefusedValue("has a tool whose parameters are no JSON schema", detail=function["name"], fix=_FIX)
    return {"type": "function", "function": function}


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise RefusedValue("has tools in a text that is no JSON", detail=str(error), fix=_FIX) from None
