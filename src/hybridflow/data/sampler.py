"""In which order rows are drawn: a function of (seed, draw), so a sampler has no state but its count."""

from __future__ import annotations

from hybridflow.noise import NoiseKey, permutation


class Sampler:
    """Draws row indices epoch after epoch; each epoch sees every row once.

    Args:
        rows: number of rows.
        seed: the run's seed.
        shuffle: whether epochs have an order of their own.
        drawn: draws made so far; set it to go on after a resume.
    """

    def __init__(self, rows: int, *, seed: int, shuffle: bool = True, drawn: int = 0) -> None:
        self.num_rows, self.seed, self.shuffle, self.drawn = rows, seed, shuffle, drawn
        self._epoch, self._order = -1, list(range(rows))

    def take(self, count: int) -> list[tuple[int, int]]:
        """The next `count` draws as (draw, row index); the draw number is unique over the run."""
        taken = []
        for draw in range(self.drawn, self.drawn + count):
            epoch, place = divmod(draw, self.num_rows)
            if self.shuffle and epoch != self._epoch:
                self._epoch, self._order = epoch, permutation(NoiseKey(self.seed, "shuffle", epoch), self.num_rows)
            taken.append((draw, self._order[place]))
        self.drawn += count
        return taken
