"""The needs of a piece of an algorithm; for a function of the user's own its parameters express them.

The file is read, not run, so that this works without torch.

Shapes: T tokens of a batch, M scored tokens of a micro-batch, N trajectories, K components of a reward.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from hybridflow.config.locate import is_function_reference
from hybridflow.errors import nearest

OUTPUTS = {"old_logp_T": "logp", "sum_pi_squared_T": "sum_pi_squared"}  # columns that need a forward pass of the policy


@dataclass(frozen=True, slots=True)
class Needs:
    """What a piece needs from the run."""

    needs_group: bool = False
    """several responses to one prompt"""
    needs_critic: bool = False
    """values of states, from a critic that it trains"""
    needs_reference: bool = False
    """log-probabilities of the reference"""
    needs_greedy: bool = False
    """the reward of a greedy response to every prompt"""
    needs_components: bool = False
    """a reward function that returns several numbers by name"""
    needs_rollout_logp: bool = False
    """the sampler's log-probabilities beside those of the policy at the start of the step"""
    outputs: tuple[str, ...] = ()
    """what the policy is asked for before the step's updates: an extra forward pass"""
    statistics: bool = False
    """statistics of the whole mini-batch under the current policy: an extra forward pass per update"""
    every_answer: bool = False
    """responses without an advantage have a loss too, so none may be left out"""
    by_sequence: bool = False
    """sums or means over each sequence: the whole response, or the part of a trajectory between two forks"""
    modes: tuple[str, ...] = ()
    """the only aggregations that it has a meaning in; empty: any"""
    values: tuple[str, ...] = ()
    """the keys of the algorithm section that it takes"""


def needs_of(name: str, table: Mapping[str, Needs]) -> Needs:
    """Returns the needs of a piece, from the table or from its own file.

    Raises:
        ValueError: no such file, or no such function in it.
    """
    if not is_function_reference(name):
        return table.get(name, Needs())
    parameters, values = signature_of(name)
    return needs_from(parameters, values)


def signature_of(name: str) -> tuple[list[str], dict[str, bool]]:
    """Returns the positional parameters of ``file.py:function``, and its keyword-only ones with whether they have a
    default.

    Raises:
        ValueError: no such file, or no such function in it.
    """
    file, _, function = name.rpartition(":")
    if not Path(file).is_file():
        raise ValueError(f"no file {file} (for {name}); give file.py:function, relative to the configuration")
    return _signature(file, function, Path(file).stat().st_mtime_ns)


def needs_from(parameters: Iterable[str], values: Iterable[str]) -> Needs:
    """Returns the needs that the names of a function's parameters express."""
    parameters = list(parameters)
    names = {p[:-1] + "T" if p.endswith("_M") else p for p in parameters}
    found = Needs(
        needs_group="group_N" in names,
        needs_critic="value_T" in names,
        needs_reference="ref_logp_T" in names,
        needs_greedy="baseline_N" in names,
        needs_components="components_NK" in names,
        values=tuple(values),
    )
    if "logp_M" in parameters:  # a policy loss, which has its ratio anyway
        return replace(found, needs_rollout_logp="rollout_logp_T" in names, by_sequence="sequence_M" in parameters)
    return replace(found, outputs=tuple(output for column, output in OUTPUTS.items() if column in names))


@cache
def _signature(file: str, function: str, changed: int) -> tuple[list[str], dict[str, bool]]:
    try:
        tree = ast.parse(Path(file).read_text())
    except SyntaxError as error:
        raise ValueError(f"{file} is not Python: {error}") from error
    functions = {node.name: node.args for node in tree.body if isinstance(node, ast.FunctionDef)}
    if function not in functions:
        raise ValueError(f"{file} has no function {function!r}; {nearest(function, functions)}")
    arguments = functions[function]
    positional = [a.arg for a in (*arguments.posonlyargs, *arguments.args)]
    return positional, {a.arg: d is not None for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults)}
