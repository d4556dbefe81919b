"""Countdown: an expression over exactly the given numbers, worked out exactly and never run."""

from __future__ import annotations

import random
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridflow.rewards.verifiable.countdown import score

GOAL = {"target": 98, "numbers": [44, 19, 35]}
RIGHT, MISSED, WRONG = {"score": 1.0, "valid": 1.0}, {"score": 0.0, "valid": 1.0}, {"score": 0.0, "valid": 0.0}


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("<answer>44 + 19 + 35</answer>", RIGHT),
        ("<think>44-19</think> <answer> (35+44) + 19 = 98 </answer>", RIGHT),
        ("<answer>1</answer> <answer>44+19+35</answer>", RIGHT),
        ("Let me see.\n44 + 19 + 35", RIGHT),
        ("<answer>44 - -19 + 35</answer>", RIGHT),
        ("<answer>[44 + 19] + 35</answer>", RIGHT),
        ("<answer>44 + 19 - 35</answer>", MISSED),
        ("<answer>44 / (19 - 19) + 35</answer>", WRONG),
        ("<answer>44 + 19 + 35 = 99</answer>", WRONG),
        ("<answer>44 + 54</answer>", WRONG),
        ("<answer>98</answer>", WRONG),
        ("<answer>44 + 19 + 35 + 0</answer>", WRONG),
        ("<answer>44 + 19 + 35</answer> <answer>98</answer>", WRONG),
        ("<answer>44 + 19 + 35", WRONG),
        ("44 + 19 + 35\nso it is done", WRONG),
        ("<answer>44 + 19 + 35.0</answer>", WRONG),
        ("<answer>44 ** 1 + 19 + 35</answer>", WRONG),
        ("<answer>44 // 1 + 19 + 35</answer>", WRONG),
        ("<answer>44 + 19 + 3_5</answer>", WRONG),
        ("<answer>0x2C + 19 + 35</answer>", WRONG),
        ("<answer>44(19)(35)</answer>", WRONG),
        ("<answer>(44, 19, 35)</answer>", WRONG),
        ("<answer>__import__('os').abort()</answer>", WRONG),
        ("<answer>" + "(" * 140 + "44+19+35" + ")" * 140 + "</answer>", RIGHT),
        ("<answer>" + "(" * 10**5 + "44+19+35" + ")" * 10**5 + "</answer>", WRONG),
        ("<answer>" + "-" * 290 + "44</answer>", WRONG),
        ("<answer>" + "9" * 10**6 + "</answer>", WRONG),
        ("<answer>44 + 19 + 35 or 97</answer>", WRONG),
        ("<answer></answer>", WRONG),
        ("", WRONG),
    ],
)
def test_the_game(response: str, expected: dict[str, float]) -> None:
    assert score(response, GOAL) == expected


def test_signs_of_print_are_operators() -> None:
    goal = {"target": 6, "numbers": [3, 4, 2]}
    assert score(f"<answer>3 {chr(0xD7)} 4 {chr(0xF7)} 2</answer>", goal) == RIGHT
    assert score(r"<answer>3 \times 4 \div 2</answer>", goal) == RIGHT
    assert score(f"<answer>4 + 2 {chr(0x2212)} 3</answer>", goal) == MISSED


def test_fractions_are_exact_and_a_division_by_zero_reaches_nothing() -> None:
    assert score("<answer>8 / (3 - 8 / 3)</answer>", {"target": 24, "numbers": [8, 3, 8, 3]}) == RIGHT
    assert score("<answer>5 / (3 - 3)</answer>", {"target": 0, "numbers": [3, 5, 3]}) == MISSED


def test_form_alone_is_worth_what_the_argument_says() -> None:
    assert score("<answer>44 + 19 - 35</answer>", GOAL, format_score=0.1) == {"score": 0.1, "valid": 1.0}
    assert score("<answer>anything</answer>", GOAL, format_score=0.1) == WRONG


@pytest.mark.parametrize("truth", [None, {}, "98", {"target": 98}, [98, [1, 2]]])
def test_another_ground_truth_is_refused(truth: Any) -> None:
    with pytest.raises(ValueError, match=r"needs a ground_truth|ground truth of countdown is \{'target'"):
        score("<answer>98</answer>", truth)


@given(st.lists(st.integers(1, 99), min_size=2, max_size=6), st.integers(0, 2**32))
def test_every_expression_reaches_the_value_that_it_was_built_with(numbers: list[int], seed: int) -> None:
    rng = random.Random(seed)
    parts = [(str(n), Fraction(n)) for n in numbers]
    while len(parts) > 1:
        (left, a), (right, b) = (parts.pop(rng.randrange(len(parts))) for _ in range(2))
        sign = rng.choice("+-*/" if b else "+-*")
        parts.append((f"({left} {sign} {right})", {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else a}[sign]))
    text, value = parts[0]
    assert score(f"<answer>{text}</answer>", {"target": value, "numbers": numbers}) == RIGHT
    assert score(f"<answer>{text}</answer>", {"target": value + 1, "numbers": numbers}) == MISSED
    assert score(f"<answer>{text}</answer>", {"target": value, "numbers": [*numbers, 1]}) == WRONG
