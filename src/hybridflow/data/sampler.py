"""The order in which rows are drawn: a function of (seed, draw), so a sampler has no state but its count.

With weights, draw d goes to the source whose share of the unit interval holds frac(start + d * golden ratio), a
low-discrepancy sequence: after any number of draws each source has had its share to within a few draws, not only in
the long run. Within its draws every source goes through its rows epoch by epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Literal, TypeAlias

import numpy as np

from hybridflow.noise import NoiseKey, permutation

Order: TypeAlias = Callable[[range, int], Sequence[int]]
"""Row indices of one source and the epoch -> the same indices in the order to draw them."""

_STEP = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: all arithmetic is on integers modulo 2^64, exact at any draw
_CHUNK = 1 << 20


class Sampler:
    """Draws row indices epoch after epoch; each epoch of a source sees every row of it once.

    Args:
        rows: number of rows, or the row indices of each source.
        seed: the run's seed.
        weights: shares of the sources; they need not sum to one.
        order: of each epoch: "shuffled" (its own random order), "sequential", or a function.
        drawn: draws made until now; a resume sets it.
    """

    def __init__(
        self,
        rows: int | Sequence[range],
        *,
        seed: int,
        weights: Sequence[float] = (1.0,),
        order: Literal["shuffled", "sequential"] | Order = "shuffled",
        drawn: int = 0,
    ) -> None:
        self._sources = [range(rows)] if isinstance(rows, int) else list(rows)
        assert len(weights) == len(self._sources) and all(self._sources) and min(weights) > 0
        self.seed, self.order, self.drawn = seed, order, drawn
        ends = [int(end / sum(weights) * 2**64) for end in accumulate(weights)][:-1]
        self._ends = np.array(ends, dtype=np.uint64)  # where each source's share of the interval ends; the last at 2^64
        self._start = NoiseKey(seed, "source").bits() % 2**64
        self._counted = 0  # draws that `_counts` covers
        self._counts = np.zeros(len(self._sources), dtype=np.int64)  # of those, how many each source had
        self._epochs: dict[int, tuple[int, Sequence[int]]] = {}  # of each source, the current epoch and its order

    def take(self, count: int) -> list[tuple[int, int]]:
        """Takes the next `count` draws as (draw, row index); the draw number is unique over the run."""
        self._count_up_to(self.drawn)
        taken = []
        for draw, source in enumerate(self._source_of(self.drawn, self.drawn + count).tolist(), self.drawn):
            epoch, place = divmod(int(self._counts[source]), len(self._sources[source]))
            taken.append((draw, self._ordered(source, epoch)[place]))
            self._counts[source] += 1
        self.drawn = self._counted = self.drawn + count
        return taken

    def _ordered(self, source: int, epoch: int) -> Sequence[int]:
        if self._epochs.get(source, (-1, ()))[0] != epoch:
            rows = self._sources[source]
            if self.order == "sequential":
                ordered: Sequence[int] = rows
            elif self.order == "shuffled":
                ordered = [rows[i] for i in permutation(NoiseKey(self.seed, "shuffle", epoch, source), len(rows))]
            else:
                ordered = self.order(rows, epoch)
            self._epochs[source] = (epoch, ordered)
        return self._epochs[source][1]

    def _source_of(self, first: int, end: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Returns the source of each of these draws."""
        draws = np.arange(first, end, dtype=np.uint64)
        points = draws * np.uint64(_STEP) + np.uint64(self._start)  # wraps
        return np.searchsorted(self._ends, points, side="right")

    def _count_up_to(self, draw: int) -> None:
        """Advances `_counts` to the draws before this one."""
        if draw < self._counted:
            self._counts[:], self._counted = 0, 0
        for first in range(self._counted, draw, _CHUNK):
            found = self._source_of(first, min(first + _CHUNK, draw))
            self._counts += np.bincount(found, minlength=len(self._sources))
        self._counted = draw
