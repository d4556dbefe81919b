"""Environments of users: found, checked as far as they can be without playing, and made for each trajectory."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeAlias

from hybridflow.agents.processes import RemoteObject
from hybridflow.errors import UserError
from hybridflow.protocols.environments import Action, Environment

_CALLED = {"reset": "reset(row, seed)", "step": "step(action)", "close": "close()"}
_EXAMPLE: dict[str, tuple[Any, ...]] = {"reset": ({}, 0), "step": (None,), "close": ()}

MakeEnvironment: TypeAlias = Callable[[], Environment | Awaitable[Environment]]


def environment_maker(name: str, source: Any, kwargs: Mapping[str, Any]) -> MakeEnvironment:
    """Returns a function that makes the environment of a trajectory.

    Args:
        name: of the environment, for messages.
        source: a class, or a plain or async function that returns an object; or an object, which is copied.
        kwargs: what it is called with.

    Raises:
        UserError: it cannot be called so, or it is a class without one of the methods.
    """
    if not callable(source):  # an object that a program gave
        _require_methods(name, source, lambda method: False)
        if kwargs:
            raise UserError(
                f"the environment {name} is an object, and agent.environment_kwargs has {', '.join(kwargs)}",
                fix="give the class, or set them in the object",
            )
        return lambda: _checked(name, copy.deepcopy(source))
    try:
        inspect.signature(source).bind(**kwargs)
    except TypeError as error:
        given = ", ".join(kwargs) or "nothing"
        raise UserError(
            f"the environment {name} cannot be made: {error}",
            why=f"it is called with agent.environment_kwargs, which has {given}",
            fix="set in agent.environment_kwargs what it needs, or give its arguments defaults",
        ) from None
    if inspect.isclass(source):
        _require_methods(name, source, inspect.isfunction)

    async def awaited(made: Awaitable[Any]) -> Environment:
        return _checked(name, await made)

    def make() -> Environment | Awaitable[Environment]:
        made = source(**kwargs)
        return awaited(made) if inspect.isawaitable(made) else _checked(name, made)

    return make


def _checked(name: str, made: Any) -> Environment:
    _require_methods(name, made, lambda method: False)
    environment: Environment = made
    return environment


def _require_methods(name: str, owner: Any, takes_itself: Callable[[Any], bool]) -> None:
    """Raises a UserError where a class, or an object, lacks a method or has one with other arguments."""
    methods = {method: getattr(owner, method, None) for method in _CALLED}
    empty = {getattr(Environment, method) for method in ("reset", "step")}  # of the protocol, which one may inherit
    missing = [
        _CALLED[method]
        for method, found in methods.items()
        if not callable(found) or getattr(found, "__func__", found) in empty
    ]
    if missing:
        raise UserError(
            f"the environment {name} has no {' and no '.join(missing)}",
            why="an environment has the methods reset(row, seed), step(action) and close()",
            fix="define what is missing",
        )
    for method, found in methods.items():
        own = (owner,) if takes_itself(found) else ()
        try:
            inspect.signature(found).bind(*own, *_EXAMPLE[method])  # type: ignore[arg-type]
        except TypeError as error:
            raise UserError(
                f"{method} of the environment {name} cannot be called: {error}",
                why=f"it is called as {_CALLED[method]}",
                fix=f"define it as `def {_CALLED[method].replace('(', '(self, ').replace(', )', ')')}`, plain or async",
            ) from None


class RemoteEnvironment:
    """An environment in a process: see `Environment`.

    Args:
        held: the object there.
    """

    def __init__(self, held: RemoteObject) -> None:
        self.held = held

    async def reset(self, row: dict[str, Any], seed: int) -> Any:
        """See `Environment.reset`."""
        return await self.held.call("reset", row, seed)

    async def step(self, action: Action) -> Any:
        """See `Environment.step`."""
        return await self.held.call("step", action)

    async def close(self) -> None:
        """See `Environment.close`."""
        await self.held.close()
