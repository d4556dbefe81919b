"""Calls on a worker group: arguments are split over its workers, and results are joined.

A worker is an ordinary class. A method that is marked with `remote` can be called on a whole group::

    class Actor:
        def __init__(self, context: WorkerContext, path: str) -> None: ...

        @remote(over("dp"))
        def update(self, part: Batch, loss: Loss) -> Update: ...

A dispatch is a pair of functions (HybridFlow, arXiv 2409.19256, section 4.1), so a user's own is written in place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

Call = tuple[tuple[Any, ...], dict[str, Any]]  # positional and keyword arguments
ATTRIBUTE = "__hybridflow_dispatch__"
F = TypeVar("F", bound=Callable[..., Any])


class Mesh:
    """The workers of a group on named dimensions, row by row: with ``{"dp": 2, "sp": 2}`` rank 2 is dp 1, sp 0."""

    def __init__(self, dims: Mapping[str, int]) -> None:
        self.dims = dict(dims)
        self.size = math.prod(self.dims.values())

    def coordinate(self, rank: int, dim: str) -> int:
        """Returns where a rank stands on a dimension."""
        names = list(self.dims)
        after = names[names.index(dim) + 1 :]
        return rank // math.prod(self.dims[n] for n in after) % self.dims[dim]


@dataclass(frozen=True)
class Dispatch:
    """The way in which a method is called on a group.

    Args:
        split: from the group's mesh and the call to one call per rank; None for a rank that is not called.
        join: from the mesh and the results by rank (None where a rank was not called) to what the caller gets.
    """

    split: Callable[[Mesh, Call], Sequence[Call | None]]
    join: Callable[[Mesh, Sequence[Any]], Any]


def remote(dispatch: Dispatch) -> Callable[[F], F]:
    """Marks a worker's method as one that can be called on the whole group."""

    def mark(function: F) -> F:
        setattr(function, ATTRIBUTE, dispatch)
        return function

    return mark


def dispatch_of(cls: type, method: str) -> Dispatch | None:
    """Returns the dispatch that a class's method was marked with; None if it was not."""
    return getattr(getattr(cls, method, None), ATTRIBUTE, None)


def over(dim: str) -> Dispatch:
    """Makes a dispatch whose first argument is a list with one part for each place on a mesh dimension; all ranks get
    the others.

    Ranks at the same place get the same part. The result is the list of the results by place, from the first rank of
    each.
    """

    def split(mesh: Mesh, call: Call) -> list[Call | None]:
        (parts, *rest), keywords = call
        if len(parts) != mesh.dims[dim]:
            raise ValueError(f"{len(parts)} parts for the {mesh.dims[dim]} places of dimension {dim!r}")
        return [((parts[mesh.coordinate(rank, dim)], *rest), keywords) for rank in range(mesh.size)]

    def join(mesh: Mesh, results: Sequence[Any]) -> list[Any]:
        first = {mesh.coordinate(rank, dim): rank for rank in reversed(range(mesh.size))}
        return [results[first[place]] for place in range(mesh.dims[dim])]

    return Dispatch(split, join)


def _to_all(mesh: Mesh, call: Call) -> list[Call | None]:
    return [call] * mesh.size


def _rank_by_rank(mesh: Mesh, call: Call) -> list[Call | None]:
    positional, keywords = call
    for argument in [*positional, *keywords.values()]:
        if len(argument) != mesh.size:
            raise ValueError(f"an argument has {len(argument)} entries for {mesh.size} workers")
    return [
        (tuple(argument[rank] for argument in positional), {name: a[rank] for name, a in keywords.items()})
        for rank in range(mesh.size)
    ]


def _to_first(mesh: Mesh, call: Call) -> list[Call | None]:
    return [call, *[None] * (mesh.size - 1)]


ONE_TO_ALL = Dispatch(_to_all, lambda mesh, results: list(results))  # everyone gets the same; a list by rank
ALL_TO_ALL = Dispatch(_rank_by_rank, lambda mesh, results: list(results))  # every argument is a list by rank
RANK_ZERO = Dispatch(_to_first, lambda mesh, results: results[0])  # the first alone
