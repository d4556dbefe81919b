"""The rows of one or several sources as one numbered set, which knows the source of each row."""

from __future__ import annotations

import bisect
import hashlib
import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from hybridflow.config.locate import load_function
from hybridflow.config.sections.data import SourceSection
from hybridflow.data.rows import Row, read_rows, uneven_columns
from hybridflow.data.sampler import Order, Sampler
from hybridflow.errors import UserError, raised

Sources: TypeAlias = str | Sequence[SourceSection]


@dataclass(frozen=True, slots=True)
class RowSet:
    """Rows of several sources, one after the other.

    Args:
        rows: all rows that are left.
        sources: where they came from, with weights.
        starts: index of the first row of each source.
        numbers: for every row, its number in its own source, before any was left out.
    """

    rows: list[Row]
    sources: tuple[SourceSection, ...]
    starts: tuple[int, ...]
    numbers: Sequence[int]

    @property
    def name(self) -> str:
        """A description of the sources."""
        return ", ".join(s.source for s in self.sources)

    def place(self, index: int) -> tuple[str, int]:
        """Returns the source of a row, and its number there."""
        return self.sources[bisect.bisect_right(self.starts, index) - 1].source, self.numbers[index]

    def parts(self) -> list[range]:
        """Returns the row indices of each source."""
        return [range(a, b) for a, b in zip(self.starts, (*self.starts[1:], len(self.rows)))]

    def keep(self, indices: Sequence[int]) -> RowSet:
        """Keeps only these rows, given in rising order.

        Raises:
            UserError: a source with a weight has no row left.
        """
        starts = tuple(bisect.bisect_left(indices, start) for start in self.starts)
        kept = RowSet([self.rows[i] for i in indices], self.sources, starts, [self.numbers[i] for i in indices])
        empty = next((s.source for s, part in zip(self.sources, kept.parts()) if not part), None)
        if empty is not None:
            raise UserError(f"all rows of {empty} are too long", fix="raise the limit, or leave the source out")
        return kept

    def fingerprint(self) -> str:
        """Changes with any row, their order, their sources and the weights; to recognise the data on resume."""
        digest = hashlib.blake2b(digest_size=16)
        for part, source in zip(self.parts(), self.sources):
            digest.update(json.dumps(["source", len(part), source.weight]).encode())
            for i in part:
                digest.update(json.dumps(self.rows[i], sort_keys=True, default=repr).encode())
        return digest.hexdigest()

    def sampler(self, order: str, *, seed: int) -> Sampler:
        """Draws from these rows in the order of ``data.order``."""
        weighted = any(s.weight is not None for s in self.sources)
        parts = self.parts() if weighted else [range(len(self.rows))]
        weights = [s.weight or 1.0 for s in self.sources] if weighted else [1.0]
        if order in ("shuffled", "sequential"):
            return Sampler(parts, weights=weights, seed=seed, order=order)  # type: ignore[arg-type]
        return Sampler(parts, weights=weights, seed=seed, order=_users_order(order, self.rows, seed))

    def advice(self) -> list[str]:
        """Describes what is unusual about the rows without being a mistake."""
        lines = []
        for part, source in zip(self.parts(), self.sources):
            lacking = uneven_columns([self.rows[i] for i in part])
            lines += [
                f"{n} of {len(part)} rows of {source.source} lack the column {key!r}" for key, n in lacking.items()
            ]
        return lines


def read_sources(sources: Sources, *, seed: int) -> RowSet:
    """Reads the rows of all sources.

    Raises:
        UserError: one of them cannot be read.
    """
    listed = (SourceSection(source=sources),) if isinstance(sources, str) else tuple(sources)
    rows: list[Row] = []
    starts: list[int] = []
    numbers: list[int] = []
    for entry in listed:
        found = read_rows(entry.source, seed=seed)
        starts.append(len(rows))
        numbers += range(len(found))
        rows += found
    return RowSet(rows, listed, tuple(starts), numbers)


def _users_order(reference: str, rows: Sequence[Row], seed: int) -> Order:
    """Loads the order that ``file.py:function`` gives, and checks what it returns."""
    function: Callable[..., Any] = load_function(reference)
    known = ("rows", "seed", "epoch")
    parameters = inspect.signature(function).parameters
    unknown = [n for n, p in parameters.items() if n not in known and p.default is p.empty]
    if unknown:
        raise UserError(f"data.order {reference} asks for {unknown[0]!r}", fix=f"it can take any of {', '.join(known)}")

    def order(part: range, epoch: int) -> list[int]:
        given = {"rows": [rows[i] for i in part], "seed": seed, "epoch": epoch}
        try:
            places = [int(place) for place in function(**{n: v for n, v in given.items() if n in parameters})]
        except Exception as error:
            raise UserError(f"data.order {reference} raised {raised(error)}") from error
        if sorted(places) != list(range(len(part))):
            raise UserError(
                f"data.order {reference} returned {len(places)} places that are not an order of {len(part)} rows",
                why="an epoch draws every row once; what it leaves out would never be seen",
                fix="return each of 0 .. len(rows) - 1 once",
            )
        return [part[place] for place in places]

    return order
