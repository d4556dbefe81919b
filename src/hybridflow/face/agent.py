"""Tools and an environment that a program gives to `hybridflow.train`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hybridflow.agents.given import Given, name_objects

_OF_ENVIRONMENT = ("environment", "environment_kwargs", "tasks", "eval_tasks")


def with_agent(
    values: Mapping[str, Any], tools: Sequence[Any] | None, environment: Any
) -> tuple[dict[str, Any], Given]:
    """Lays tools and an environment over the sections of a run, in which names stand for objects.

    Args:
        values: sections by name.
        tools: of the call; they take the place of an environment of `values`.
        environment: of the call; it takes the place of tools of `values`.

    Returns:
        The sections, and the objects by their names.

    Raises:
        UserError: see `name_objects`.
    """
    section = values.get("agent")
    if tools is None and environment is None and not isinstance(section, Mapping):
        return dict(values), {}
    agent = dict(section) if isinstance(section, Mapping) else {}
    if tools is not None and environment is None:
        agent = {key: value for key, value in agent.items() if key not in _OF_ENVIRONMENT}
    if environment is not None and tools is None:
        agent.pop("tools", None)
    agent |= {} if tools is None else {"tools": tools}
    agent |= {} if environment is None else {"environment": environment}
    named, given = name_objects(agent)
    result = {**values, "agent": named}
    if named.get("environment") is not None:  # it may make its tasks and give its rewards by itself
        result = {"data": {}, "reward": {"function": "environment"}} | result
    return result, given
