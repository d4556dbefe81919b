"""Rewards that a program gives as objects: scored in this process, or named for processes of their own."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hybridflow.data.prompts import VERL_TRUTH
from hybridflow.errors import UserError
from hybridflow.rewards.graders.function import RewardFunction, name_of
from hybridflow.rewards.graders.given import GivenReward, named

TRUTH = "ground_truth"  # the column, and the argument of a reward


def split_reward(section: Mapping[str, Any]) -> tuple[dict[str, Any], GivenReward | None]:
    """Takes the object out of a reward section.

    Args:
        section: plain values of the section ``reward``, whose ``function`` may be a function, a callable object, or a
            list of them.

    Returns:
        The section as a configuration can hold it, and the object. Where the section asks for processes, functions are
        named in the section, and there is no object.

    Raises:
        UserError: the list is empty, an entry is no function, or other processes cannot load a function by its name.
    """
    given = section.get("function")
    several = isinstance(given, list | tuple)
    if not several and not callable(given):
        if given is not None and not isinstance(given, str):
            raise UserError(
                f"reward is a {type(given).__name__}, and not a function",
                fix="write def score(response, ground_truth): ..., and give reward=score",
            )
        return dict(section), None
    functions: list[Any] = list(given) if isinstance(given, list | tuple) else [given]
    if not functions:
        raise UserError("reward is an empty list", fix="give a function, or several that are added up")
    for index, function in enumerate(functions):
        if isinstance(function, torch.nn.Module):
            raise UserError(
                f"reward is a model ({type(function).__name__})",
                why="a model that scores is loaded and placed by the run",
                fix='reward={"function": "model", "model": {"path": folder or name}}, for a sequence classifier',
            )
        if not callable(function):
            raise UserError(
                f"entry {index} of reward is a {type(function).__name__}, and not a function",
                fix='give functions, or name all parts: reward={"terms": {"exact": {"function": "gsm8k"}, ...}}',
            )
    rest = {key: value for key, value in section.items() if key not in ("function", "kwargs", "terms")}
    kwargs, pool = section.get("kwargs") or {}, section.get("pool")
    if kwargs:
        functions = [functools.partial(function, **kwargs) for function in functions]
    processes = pool.get("processes") if isinstance(pool, Mapping) else None
    if not isinstance(processes, int) or processes < 1:
        return rest, functions if several else functions[0]
    if not several:
        return rest | _by_name(functions[0]), None
    terms = {name: _by_name(function) for name, function in named(functions).items()}
    return rest | {"terms": terms}, None


def needs_no_truth(rows: Sequence[Mapping[str, Any]], reward: GivenReward) -> bool:
    """Returns whether the rows have no column of ground truths, and the reward does not ask for one either."""
    if any(TRUTH in row or VERL_TRUTH.partition(".")[0] in row for row in rows):
        return False
    functions = list(reward) if isinstance(reward, Sequence) else [reward]
    return not any(RewardFunction(function, name_of(function)).wants_truth for function in functions)


def _by_name(function: Callable[..., Any]) -> dict[str, Any]:
    """Returns a function as ``file.py:function``, with what a partial was given as its kwargs."""
    kwargs: dict[str, Any] = {}
    inner = function
    while isinstance(inner, functools.partial):
        if inner.args:
            raise _cannot_be_named(function, "is a partial with arguments by position; give them by name")
        kwargs, inner = {**inner.keywords, **kwargs}, inner.func
    if not inspect.isfunction(inner):
        raise _cannot_be_named(function, "is an object or a method")
    if inner.__name__ == "<lambda>":
        raise _cannot_be_named(function, "is a lambda")
    if "." in inner.__qualname__:
        raise _cannot_be_named(function, "is defined inside of another function or class")
    module = sys.modules.get(inner.__module__)
    file = getattr(module, "__file__", None)  # not that of its code, which of a decorated function is the decorator's
    if inner.__module__ == "__main__" or file is None or not Path(file).is_file():
        raise _cannot_be_named(function, "is defined in the program itself, or in a notebook")
    if getattr(module, inner.__name__, None) is not inner:
        raise _cannot_be_named(function, f"is not what {file} has under that name")
    return {"function": f"{file}:{inner.__name__}"} | ({"kwargs": kwargs} if kwargs else {})


def _cannot_be_named(function: Callable[..., Any], what: str) -> UserError:
    return UserError(
        f"the reward {name_of(function)} {what}, and reward.pool.processes asks for processes of its own",
        why="another process loads a reward by its name, from a file",
        fix="write it as a function in a file of its own and import it, or leave pool.processes out: it is then called "
        "in this process",
    )
