r"""Mathematics by structure: equal values are accepted in any notation, and no change of structure is.

`mathematics.jsonl` has right answers with other ways to write them, and with wrong ones that look like them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hybridflow.rewards.verifiable import geo3k, math, math_dapo
from hybridflow.rewards.verifiable.expressions import same
from hybridflow.rewards.verifiable.latex import read
from hybridflow.rewards.verifiable.latex_tree import Unreadable
from hybridflow.rewards.verifiable.text import last_boxed

ROWS = [json.loads(line) for line in Path(__file__).with_name("mathematics.jsonl").read_text().splitlines()]
ENTRIES = st.fractions(-99, 99, max_denominator=12)


def test_every_labelled_answer_is_scored_as_it_is_labelled() -> None:
    faults = [
        (row["truth"], said, label)
        for row in ROWS
        for label in ("right", "wrong")
        for said in row[label]
        if math.score(f"so $\\boxed{{{said}}}$.", row["truth"])["score"] != (label == "right")
    ]
    assert faults == []


def test_the_other_rewards_of_mathematics_accept_nothing_that_is_wrong() -> None:
    wrong = [(row["truth"], said) for row in ROWS for said in row["wrong"]]
    assert len(wrong) > 700
    assert [one for one in wrong if math_dapo.score(f"Answer: {one[1]}", one[0])["acc"]] == []
    assert [one for one in wrong if geo3k.score(f"\\boxed{{{one[1]}}}", one[0], symbolic=False)["accuracy"]] == []


def written(value: Fraction, form: str) -> str:
    """A number in one of the notations of `NOTATIONS`."""
    sign = "-" if value < 0 else ""
    above, below = abs(value.numerator), value.denominator
    whole, rest = divmod(above, below)
    match form:
        case "frac":
            return f"{sign}\\frac{{{above}}}{{{below}}}"
        case "dfrac":
            return f"\\dfrac{{{sign}{3 * above}}}{{{3 * below}}}"
        case "slash":
            return f"{sign}{above}/{below}"
        case "mixed" if whole and rest:
            return f"{sign}{whole}\\frac{{{rest}}}{{{below}}}"
        case "spaced" if whole and rest:
            return f"{sign}{whole} {rest}/{below}"
        case "brackets":
            return f"\\left({sign}\\frac{{{above}}}{{{below}}}\\right)"
        case "decimal" if 10**9 % below == 0:
            return f"{sign}{above / below:.10f}"
        case "repeating" if 9999 % below == 0:
            return f"{sign}{whole}.\\overline{{{rest * 9999 // below:04d}}}"
        case "unicode":
            return f"{sign}{above}".replace("-", "\u2212") + f"\u2044{below}"
    return f"{sign}\\tfrac{{{above}}}{{{below}}}"


NOTATIONS = st.sampled_from("frac dfrac slash mixed spaced brackets decimal repeating unicode tfrac".split())  # noqa: SIM905
AROUND = st.sampled_from(
    ["{}", "${}$", " {} .", "x = {}", "\\displaystyle {}", "{}\\text{{ cm}}", "{}\\%", "\\boxed{{{}}}"]
)


@given(ENTRIES, NOTATIONS, NOTATIONS, AROUND)
def test_a_rational_number_is_itself_in_any_notation_and_no_other(value: Fraction, a: str, b: str, around: str) -> None:
    said = around.format(written(value, a))
    assert same(said, written(value, b)) is True
    for other in {value + 1, -value, value * 10, value + Fraction(1, 7), Fraction(value.denominator, 13)} - {value}:
        assert same(said, written(other, b)) is False


def matrix(rows: Sequence[Sequence[Fraction]], form: str, notation: str = "frac") -> str:
    """A matrix in LaTeX, or as lists."""
    cells = [[written(cell, notation) for cell in row] for row in rows]
    if form == "lists":
        return "[" + ", ".join(f"[{', '.join(row)}]" for row in cells) + "]"
    if form == "array":
        inside = " \\\\ ".join(" & ".join(row) for row in cells)
        return f"\\left[\\begin{{array}}{{{'c' * len(rows[0])}}} {inside} \\\\ \\end{{array}}\\right]"
    end, between = (" \\\\ ", " & ") if form != "pmatrix" else ("\\\\", "&")
    return f"\\begin{{{form}}}{end.join(between.join(row) for row in cells)}\\end{{{form}}}"


MATRICES = st.tuples(st.integers(1, 3), st.integers(1, 3)).flatmap(
    lambda shape: st.lists(
        st.lists(ENTRIES, min_size=shape[1], max_size=shape[1]), min_size=shape[0], max_size=shape[0]
    )
)
FORMS = st.sampled_from(["pmatrix", "bmatrix", "matrix", "array"])


@given(MATRICES, FORMS, FORMS, NOTATIONS, st.data())
def test_a_matrix_is_its_entries_in_their_places(rows: Any, a: str, b: str, notation: str, data: st.DataObject) -> None:
    said = matrix(rows, a, notation)
    assert same(said, matrix(rows, b)) is True
    if len(rows) > 1:
        assert same(matrix(rows, "lists", notation), matrix(rows, b)) is True
    flat = [cell for row in rows for cell in row]
    moved, width = data.draw(st.permutations(flat)), len(rows[0])
    others = [
        [moved[i : i + width] for i in range(0, len(moved), width)],  # permuted
        [list(column) for column in zip(*rows)],  # transposed
        [flat],
        [[cell] for cell in flat],  # reshaped
        [*rows, rows[0]],
        rows[:-1],
        [[*rows[0][:-1], rows[0][-1] + 1], *rows[1:]],
    ]
    for other in others:
        if other and other != rows:
            assert same(matrix(other, b), said) is False
    for text in (", ".join(map(str, flat)), "".join(map(str, flat)), f"({', '.join(map(str, flat))})", str(sum(flat))):
        assert len(flat) == 1 or same(text, said) is False


@given(st.integers(2, 3), st.data())
def test_a_transposed_matrix_and_a_multiple_of_one_are_worked_out(size: int, data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.lists(st.integers(-9, 9), min_size=2, max_size=2), min_size=size, max_size=size))
    turned = [list(column) for column in zip(*rows)]
    assert same(f"{matrix(turned, 'pmatrix')}^T", matrix(rows, "pmatrix")) is not False
    assert (
        same(f"2{matrix(rows, 'pmatrix')}", matrix([[2 * cell for cell in row] for row in rows], "bmatrix"))
        is not False
    )


def in_base(value: int, base: int) -> str:
    digits = ""
    while value:
        value, digit = divmod(value, base)
        digits = "0123456789ABCDEF"[digit] + digits
    return digits or "0"


@given(st.integers(2, 10**6), st.integers(2, 16), st.integers(2, 16), st.data())
def test_digits_have_a_base(value: int, base: int, another: int, data: st.DataObject) -> None:
    assume(base != 10)
    digits = in_base(value, base)
    form = st.sampled_from(["{}_{}", "{}_{{{}}}", "({})_{{{}}}", "{}_{{({})}}", "{} \\text{{ base }} {}", "0{}_{{{}}}"])
    said = data.draw(form).format(digits, base)
    assume(digits[0].isdigit() or "0{" not in said)
    assert same(said, f"{digits}_{{{base}}}") is True
    assert base == another or same(f"{digits}_{{{another}}}", said) is False
    assert same(f"{in_base(value + 1, base)}_{base}", said) is False
    assert same(str(value), said) is False or digits == str(value)
    assert same(said, digits) is False  # a number without a base is decimal


LISTS = st.lists(st.integers(-20, 20), min_size=2, max_size=5)


@given(LISTS, LISTS, st.sampled_from([", ", ",", "; ", " \\text{ or } ", " and "]))
def test_a_list_is_its_items_each_as_often_as_it_is_there(a: list[int], b: list[int], between: str) -> None:
    true = ", ".join(map(str, a))
    assert same(between.join(map(str, reversed(a))), true) is True
    assert same(f"\\{{{between.join(map(str, reversed(a)))}\\}}", true) is True
    assert same(between.join(map(str, b)), true) is (Counter(a) == Counter(b))
    repeated = [*a, a[0]]
    for other in (repeated, a[1:], [*a[1:], a[1]] if a[0] != a[1] else repeated):
        assert same(between.join(map(str, other)), true) is False
    assert same(f"({true})", true) is False and same(true, f"({true})") is False


@given(LISTS, LISTS)
def test_a_tuple_has_an_order_and_an_interval_has_ends(a: list[int], b: list[int]) -> None:
    true = f"({', '.join(map(str, a))})"
    assert same(f"\\left({','.join(map(str, a))}\\right)", true) is True
    assert same(f"\\langle {', '.join(map(str, a))} \\rangle", true) is True
    assert same(f"({', '.join(map(str, b))})", true) is (a == b)
    assert same(f"({', '.join(map(str, a[::-1]))})", true) is (a == a[::-1])
    ends = [f"{left}{a[0]}, {a[1]}{right}" for left in "([" for right in ")]"]
    for one in ends:
        assert [same(one, other) for other in ends] == [one == other for other in ends]


@given(st.integers(1000, 10**9), st.sampled_from([",", "{,}", ",\\!", "\\,", "\u2009"]), st.data())
def test_thousands_are_parted_in_threes_and_by_no_space(value: int, mark: str, data: st.DataObject) -> None:
    assert same(f"{value:,}".replace(",", mark), str(value)) is True
    digits = str(value)
    cut = data.draw(st.integers(1, len(digits) - 1))
    for between in (", ", ";", " ", ",\\ ", ":", "\\\\ ", " & "):
        assert same(digits[:cut] + between + digits[cut:], str(value)) is False
    if (len(digits) - cut) % 3 or len(digits) - cut > 3:
        assert same(f"{digits[:cut]},{digits[cut:]}", str(value)) is False


@given(st.text(st.sampled_from("0123456789 ,.;:()[]{}\\&|^_+-*/=<>!%$'xyiefT\u00bd\u221a\u00b2\n"), max_size=30))
def test_any_text_is_read_or_told_to_be_unreadable_and_equals_itself_alone(text: str) -> None:
    try:
        read(text)
    except Unreadable:
        assert same(text, "18") is False
    for other in ("18", "(1, 2)", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}"):
        if same(text, other):
            assert set(other) & set("0123456789") <= set(text) | set("1289"), text


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"\boxed 5", "5"),
        (r"so \boxed5.", "5"),
        (r"$\boxed 5$", "5"),
        (r"\boxed -12 or so", "-12"),
        (r"\boxed 1,234.", "1,234"),
        (r"\boxed x", "x"),
        (r"\boxed\frac12.", r"\frac12"),
        (r"\boxed \frac{1}{2}$", r"\frac{1}{2}"),
        (r"\boxed\pi", r"\pi"),
        (r"\fbox{5}", "5"),
        (r"\boxed {5}", "5"),
        ("\\boxed\n{5}", "5"),
        (r"\framebox{5}", "5"),
        (r"\boxed{5} and \boxed", None),
        (r"\boxed{5} and \boxed{6", None),
        (r"\boxed{5} and \boxed .", None),
        ("\\boxed{5} and \\boxed \n 6", None),
        (r"\boxedx", None),
        (r"\boxed 5 eggs", "5"),
        (r"\boxed 5, so it is", "5"),
        (r"\(\boxed 5\)", "5"),
        (r"\boxed 5^2", None),  # the answer goes on
        (r"\boxed 1.5^2", None),
        (r"\boxed 5x", None),
        (r"\boxed 5/2", None),
        (r"\boxed 5 + 1", None),
        (r"\boxed 5, 6", None),
        (r"\boxed 5 6", None),
        (r"\boxed 10_2", None),
        (r"\boxed 5\cdot 2", None),
        (r"\boxed 5\frac12", None),
        (r"\boxed x_1", None),
        (r"\boxed\sqrt{2}x", None),
    ],
)
def test_a_box_holds_a_group_or_what_stands_next_to_it(text: str, inside: str | None) -> None:
    found = last_boxed(text)
    assert (None if found is None else found[0]) == inside
