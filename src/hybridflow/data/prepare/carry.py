"""Carry: additions of three-digit numbers, the task of the recipe of that name. Made here."""

from __future__ import annotations

import random

from hybridflow.data.prepare.schema import Generated, Split, prepared_row
from hybridflow.data.rows import Row

HELD_OUT = 5  # one pair in this many is kept for evaluation


def is_held_out(a: int, b: int) -> bool:
    """Returns whether this pair belongs to the evaluation set; training never sees it."""
    return random.Random(f"{a}+{b}").randrange(HELD_OUT) == 0


def pairs(seed: str, held_out: bool, count: int) -> list[tuple[int, int]]:
    """Returns distinct pairs of 100..999 from one side of the split, in random order."""
    rng = random.Random(seed)
    found: dict[tuple[int, int], None] = {}
    while len(found) < count:
        pair = (rng.randint(100, 999), rng.randint(100, 999))
        if is_held_out(*pair) == held_out:
            found[pair] = None
    return list(found)


def make(split: Split, count: int, seed: int) -> list[Row]:
    """Makes this many problems; the test problems are the same for every seed."""
    drawn = pairs(f"rl-{seed}" if split == "train" else "evaluation", held_out=split == "test", count=count)
    return [
        prepared_row("carry", f"{a}+{b}=", ability="math", ground_truth=str(a + b), split=split, index=i)
        for i, (a, b) in enumerate(drawn)
    ]


CARRY = Generated({"train": 4_000, "test": 200}, make)
