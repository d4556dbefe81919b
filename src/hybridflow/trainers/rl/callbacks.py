"""Callbacks: functions of the user's that are called after each step of a run.

The names of a callback's arguments decide what it is given:

    step        the number of the step, which is recorded
    metrics     its line of metrics.jsonl, a dict
    run         the run; ``run.stop.request("why")`` ends it in order after this step
    groups      the prompts with their responses and rewards
    batch       what was trained on
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from hybridflow.batch import Batch
from hybridflow.errors import UserError, near, nearest, raised
from hybridflow.protocols.groups import Group
from hybridflow.rewards.graders.function import name_of
from hybridflow.trainers.rl.run import RlRun

Callback: TypeAlias = Callable[..., object]
ARGUMENTS = ("step", "metrics", "run", "groups", "batch")
_FORM = "write def callback(step, metrics): ..., with any of the arguments " + ", ".join(ARGUMENTS)


def require_callbacks(callbacks: Sequence[Callback]) -> None:
    """Checks that every callback can be called.

    Raises:
        UserError: one is no function, or wants an argument that there is none of.
    """
    if not isinstance(callbacks, Sequence):
        raise UserError(f"callbacks is a {type(callbacks).__name__}, not a list", fix="callbacks=[function]")
    for index, callback in enumerate(callbacks):
        if not callable(callback):
            raise UserError(f"entry {index} of callbacks is a {type(callback).__name__}, not a function", fix=_FORM)
        _arguments_of(callback)


def call_back(
    callbacks: Sequence[Callback],
    run: RlRun,
    step: int,
    metrics: Mapping[str, float],
    groups: list[Group],
    batch: Batch,
) -> None:
    """Calls every callback after a step that is recorded.

    Raises:
        UserError: a callback raised; the step is saved, so that the run resumes with the next.
    """
    given = {"step": step, "metrics": metrics, "run": run, "groups": groups, "batch": batch}
    for callback in callbacks:
        try:
            callback(**{name: given[name] for name in _arguments_of(callback)})
        except Exception as error:
            run.keep(step)
            raise UserError(
                f"the callback {name_of(callback)} raised after step {step}: {raised(error)}",
                why=f"the step itself is done and saved in {run.folder.path}",
                fix=f"correct the callback and start again: the run resumes with step {step + 1}"
                if step < run.total_steps
                else "correct the callback and start again: the run then writes its model",
            ) from error


def _arguments_of(callback: Callback) -> list[str]:
    name = name_of(callback)
    if isinstance(callback, type):
        raise UserError(f"the callback {name} is a class, and not a function", fix=f"give an object of it; {_FORM}")
    try:
        parameters = inspect.signature(callback).parameters.values()
    except ValueError as error:  # of functions that are written in C
        raise UserError(f"the callback {name} has no signature that Python can read", fix=_FORM) from error
    every = any(p.kind is p.VAR_KEYWORD for p in parameters)
    by_place = next((p.name for p in parameters if p.kind is p.POSITIONAL_ONLY), None)
    if by_place is not None:
        raise UserError(f"the callback {name} takes {by_place!r} by position only", fix=_FORM)
    various = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    wanted = [p.name for p in parameters if p.default is p.empty and p.kind not in various]
    unknown = next((n for n in wanted if n not in ARGUMENTS), None)
    if unknown is not None:
        hint = f"{nearest(unknown, ARGUMENTS)} " if near(unknown, ARGUMENTS) else ""
        raise UserError(f"the callback {name} wants {unknown!r}, which is not there", fix=hint + _FORM)
    return list(ARGUMENTS) if every else [p.name for p in parameters if p.name in ARGUMENTS]
