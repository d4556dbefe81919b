"""Countdown: reach a target with given numbers and + - * /, each number once. Made here, from a solution."""

from __future__ import annotations

import random

from hybridflow.data.prepare.schema import Generated, Split, prepared_row
from hybridflow.data.rows import Row

LARGEST = 99
TARGETS = range(10, 100)


def make(split: Split, count: int, seed: int) -> list[Row]:
    """Makes this many different problems with three or four numbers; those of train and test differ in their
    numbers.
    """
    rng = random.Random(f"countdown-{split}-{seed}")
    rows: dict[tuple[object, ...], Row] = {}
    while len(rows) < count:
        numbers = [rng.randint(1, LARGEST) for _ in range(rng.choice((3, 4)))]
        held_out = random.Random(str(sorted(numbers))).randrange(5) == 0
        target, solution = _combine(numbers, rng)
        key = (*sorted(numbers), target)
        if target in TARGETS and held_out == (split == "test") and key not in rows:
            rows[key] = prepared_row(
                "countdown",
                f"Reach {target} with the numbers {', '.join(map(str, numbers))}: use each exactly once, with "
                "+, -, *, / and parentheses. Think step by step, and give the expression in <answer></answer>.",
                ability="math",
                ground_truth={"target": target, "numbers": numbers},
                split=split,
                index=len(rows),
                solution=solution,
            )
    return list(rows.values())


def _combine(numbers: list[int], rng: random.Random) -> tuple[int, str]:
    """Joins numbers at random until one is left; returns it and its expression. No result is below 0 or a fraction."""
    left = [(n, str(n)) for n in numbers]
    while len(left) > 1:
        (a, x), (b, y) = left.pop(rng.randrange(len(left))), left.pop(rng.randrange(len(left)))
        sign = rng.choice([s for s in "+-*/" if (s != "-" or a >= b) and (s != "/" or (b and a % b == 0))])
        value = {"+": a + b, "-": a - b, "*": a * b, "/": a // b if b else 0}[sign]
        left.append((value, f"({x} {sign} {y})"))
    return left[0]


COUNTDOWN = Generated({"train": 10_000, "test": 500}, make)
