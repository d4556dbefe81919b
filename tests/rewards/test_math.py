"""MATH, DAPO-math and Geometry3K: what is accepted, what is not, and what cannot be told."""

from __future__ import annotations

import importlib.util
import threading
import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridflow.errors import UserError
from hybridflow.rewards.verifiable import geo3k, math, math_dapo
from hybridflow.rewards.verifiable.expressions import same
from hybridflow.rewards.verifiable.registry import CHECKS

RIGHT, WRONG = {"score": 1.0, "undecided": 0.0}, {"score": 0.0, "undecided": 0.0}


@pytest.mark.parametrize(
    ("said", "true"),
    [
        (r"\frac{1}{2}", r"\frac12"),  # the first two: golden scores of verl
        ("0.5", r"\frac{1}{2}"),
        (r"\dfrac{3}{6}", "1/2"),
        (r"-\frac{1}{2}", r"\frac{-1}{2}"),
        (r"3\frac{1}{2}", "3.5"),
        ("3 1/2", r"\frac72"),
        ("1,000", "1000"),
        (r"10{,}000", "10,\\!000"),
        (r"1.5\times10^{3}", "1500"),
        ("042", "42"),
        ("18.00", "18"),
        (r"\$18", "18"),
        ("18 dollars", "18"),
        (r"18\%", "18"),
        (r"18\text{ cm}^2", "18"),
        (r"30^\circ", "30"),
        ("x = 18", "18"),
        ("18.", "18"),
        (r"\text{(C)}", "C"),
        (r"\text{monday}", r"\text{Monday}"),
        (r"\left( 1, 2 \right)", "(1,2)"),
        (r"\sqrt2", r"\sqrt{2}"),
        (chr(0xFF14) + chr(0xFF12), "42"),  # full-width digits
        (chr(0x2212) + "5", "-5"),  # a minus sign
        ("1" + chr(0xA0) + "cm", "1"),  # a space that does not break
        ("1" + chr(0x200B) + "8", "18"),  # a space without width
    ],
)
def test_texts_and_numbers_that_say_the_same_are_right(said: str, true: str) -> None:
    assert same(said, true) is True
    assert math.score(rf"so $\boxed{{{said}}}$.", true) == RIGHT
    assert math.score(rf"\boxed{{{said}}}", rf"thus \boxed{{{true}}}") == RIGHT


@pytest.mark.parametrize(
    ("said", "true"),
    [
        ("", "18"),
        ("18 or 19", "18"),
        ("19, 18", "18"),
        ("18, 19", "18"),
        (r"18\text{ or }19", "18"),
        ("18 million", "18"),
        (r"18\text{ million}", "18"),
        ("19 = 18", "18"),
        ("18 = 19", "18"),
        ("9 + 9", "18"),
        (r"9 \cdot 2", "18"),
        ("1 8", "18"),
        ("18x", "18"),
        ("0.333", r"\frac13"),
        ("0.333333333", r"\frac13"),
        ("1/0", "1"),
        ("2/3/1", "2/3"),
        ("-18", "18"),
        ("50%", "0.5"),
        ("5", "yes"),
        ("9^{9^{9^{9}}}", "18"),
        ("{" * 500 + "}" * 500, "18"),
        ("#", "18"),
    ],
)
def test_whatever_else_is_said_is_not_a_right_number(said: str, true: str) -> None:
    assert math.score(rf"\boxed{{{said}}}", true) == WRONG


@pytest.mark.parametrize(
    ("said", "true", "right"),
    [
        ("(x+1)^2", "x^2+2x+1", True),
        ("y + x", "x+y", True),
        (r"\frac{3}{2\sqrt 3}", r"\frac{\sqrt3}{2}", True),
        (r"2.5\pi", r"\frac{5\pi}{2}", True),
        (r"\frac{\sqrt{3}}{2}, 5", r"\frac{\sqrt3}{2}", False),
        (r"5 = \frac{\sqrt{3}}{2}", r"\frac{\sqrt3}{2}", False),
        (r"\frac{\sqrt{3}}{2}\text{ or }5", r"\frac{\sqrt3}{2}", False),
        (r"5\text{ or }\frac{\sqrt{3}}{2}", r"\frac{\sqrt3}{2}", False),
        ("0.866", r"\frac{\sqrt3}{2}", False),
        ("2, 1", "1, 2", True),
        ("(2, 1)", "(1, 2)", False),
        ("(0, 1)", "[0, 1)", False),
        ("2x+1", "3x+1", False),
        ("}{", "x", False),
        (r"\pm 3", "3, -3", True),
        (r"\{3, -2\}", "(3, -2)", False),
        ("(3, -2)", r"\{3, -2\}", False),
    ],
)
def test_expressions_are_compared_by_algebra(said: str, true: str, right: bool) -> None:
    assert math.score(rf"\boxed{{{said}}}", true) == (RIGHT if right else WRONG)


def test_without_algebra_expressions_are_texts() -> None:
    assert math.score(r"\boxed{y + x}", "x+y", symbolic=False) == WRONG
    assert math.score(r"\boxed{x + y}", "x+y", symbolic=False) == RIGHT


def test_the_last_box_counts_and_a_statement_only_where_there_is_none() -> None:
    assert [math.score(r, "2")["score"] for r in [r"\boxed{1} \boxed{2}", r"\boxed{2} \boxed{1}"]] == [1, 0]
    assert math.score(r"\boxed{2} and then \boxed{3", "2") == WRONG  # cut off
    assert math.score(r"\boxed{2}", "2")["score"] == math.score(r"\fbox{2}", "2")["score"] == 1
    assert math.score(r"\boxed{3} Answer: 2", "2") == WRONG
    assert [math.score(r, "2")["score"] for r in ["Answer: $2$", "so the answer is 2.\n", "Answer: 3\nAnswer: 2"]] == [
        1
    ] * 3
    assert [math.score(r, "2")["score"] for r in ["2", "Answer: 2 or 3", "Answer: 2" + 300 * " ", "answers: 2"]] == [
        0
    ] * 4


def test_any_of_several_right_answers_will_do() -> None:
    assert math.score(r"\boxed{0.5}", ["2", r"\frac12"]) == RIGHT
    assert math.score(r"\boxed{3}", ["2", r"\frac12"]) == WRONG


@pytest.mark.parametrize("missing", [None, "", [], [None]])
def test_without_a_right_answer_there_is_no_score(missing: object) -> None:
    for score in (math.score, math_dapo.score, geo3k.score):
        for response in (r"\boxed{2}", ""):
            with pytest.raises(ValueError, match=r"needs a ground_truth|compares with a text or a number"):
                score(response, missing)


def test_what_takes_too_long_is_undecided_and_the_next_comparison_goes_on() -> None:
    tower = r"\boxed{9^{9^{9^{9}}}}"
    assert math.score(tower, "x+1", seconds=0.5) == {"score": 0.0, "undecided": 1.0}
    assert math.score(r"\boxed{1+x}", "x+1") == RIGHT
    assert math.score(rf"\boxed{{{'x+' * 2000}1}}", "x+1") == {"score": 0.0, "undecided": 1.0}
    assert geo3k.score(rf"\boxed{{{'x+' * 2000}1}}", "x+1")["undecided"] == 1


def test_algebra_works_in_any_thread() -> None:
    scores: list[float] = []
    threads = [
        threading.Thread(target=lambda n=n: scores.append(math.score(rf"\boxed{{{n} + x}}", f"x + {n}")["score"]))
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert scores == [1.0] * 8


def test_without_math_verify_the_check_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    CHECKS["math"]({})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"math-verify is not installed[\s\S]*pip install 'hybridflow\[math\]'"):
        CHECKS["math"]({})
    with pytest.raises(UserError, match="math-verify is not installed"):
        CHECKS["geo3k"]({})
    CHECKS["math"]({"symbolic": False})


@given(st.fractions(), st.sampled_from([r"\frac{%d}{%d}", "%d/%d", r"\dfrac{%d}{%d}"]), st.booleans())
def test_every_fraction_in_every_form_is_right_and_another_is_not(value: Fraction, form: str, unreduced: bool) -> None:
    factor = 3 if unreduced else 1
    said = form % (value.numerator * factor, value.denominator * factor)
    assert math.score(rf"\boxed{{{said}}}", str(value)) == RIGHT
    assert math.score(rf"\boxed{{{said}}}", str(value + 1)) == WRONG


@given(st.integers(-(10**9), 10**9), st.sampled_from(["{:d}", "{:,}", "{:d}.0", "+{:d}", "{:d} cm", r"\${:,}"]))
def test_every_number_in_every_form_is_right_and_another_is_not(value: int, form: str) -> None:
    said = form.format(abs(value))
    assert math.score(rf"\boxed{{{said}}}", abs(value)) == RIGHT
    assert math.score(rf"\boxed{{{said}}}", abs(value) + 1) == WRONG
    assert math_dapo.score(f"Answer: {said}", str(abs(value))) == {"score": 1.0, "acc": 1.0}
    assert math_dapo.score(f"Answer: {said}", str(abs(value) + 1)) == {"score": -1.0, "acc": 0.0}


@pytest.mark.parametrize(
    ("response", "true", "right"),
    [
        ("Answer: $42$", "42", True),  # a golden score of verl
        ("Answer: 41", "42", False),
        ("**Answer:** 42.", 42, True),
        (r"Answer: \boxed{042}", "42", True),
        (r"so \boxed{42}", "42", True),
        (r"Answer: 41, no: \boxed{42}", "42", True),  # the last statement counts
        (r"\boxed{42}, no. Answer: 43", "42", False),
        ("Answer: 1\nAnswer: 42", "42", True),
        ("Answer: 42 or 43", "42", False),
        ("Answer: 42, 43", "42", False),
        ("42", "42", False),
        ("", "42", False),
        ("Answer: 42" + " " * 290, "42", True),
        ("Answer: 42" + " " * 300, "42", False),
        ("Answer: 7", "007", True),  # AIME's leading zeros
        ("Answer: 40+2", "42", False),
        (r"Answer: $\frac{1}{2}$", r"\frac12", True),
    ],
)
def test_dapo_gives_one_or_minus_one(response: str, true: object, right: bool) -> None:
    assert math_dapo.score(response, true) == ({"score": 1.0, "acc": 1.0} if right else {"score": -1.0, "acc": 0.0})


@pytest.mark.parametrize(
    ("response", "score"),
    [
        (r"<think>a</think> \boxed{4}", 1.0),
        (r"\boxed{4}", 0.9),  # a golden score of verl
        (r"<think>a</think>\boxed{5}", 0.1),
        (r"so <think>a</think>\boxed{4}", 0.9),
        (r"<think>\boxed{4}</think>", 0.9),
        (r"<think>\boxed{4}", 0.9),
        ("<think>a</think> Answer: 4", 0.0),
        ("", 0.0),
    ],
)
def test_geometry_counts_form_a_tenth(response: str, score: float) -> None:
    graded = geo3k.score(response, "4")
    assert graded["score"] == pytest.approx(score)
    assert graded["score"] == pytest.approx(0.9 * graded["accuracy"] + 0.1 * graded["format"])


@pytest.mark.parametrize(
    "text",
    ["{" * 10**6, r"\boxed{" * 10**5, "\\" * 10**6, "answer " * 10**5, "Answer:" * 10**5, " " * 10**6, "1," * 10**6]
    + [r"\boxed{" + "1" * 10**6 + "}", r"\boxed{" + "{" * 10**5 + "}" * 10**5 + "}", r"\boxed{" + "a" * 10**6 + "1}"],
)
def test_a_million_characters_take_no_time(text: str) -> None:
    for score in (math.score, math_dapo.score, geo3k.score):
        start = time.process_time()
        assert score(text, "18")["score"] in (0.0, -1.0)
        assert time.process_time() - start < 0.25
