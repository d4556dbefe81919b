"""Mutations make what they say: right answers that are right, wrong ones that are wrong, each once."""

from __future__ import annotations

from decimal import Decimal

import pytest

from hybridflow.rewards.audit.cases import CASES
from hybridflow.rewards.audit.mutations import LATEX, MUTATIONS, OTHERS, TEXT, KnownCase, responses

EIGHTEEN = KnownCase("What is 9 + 9?", "18", "9 + 9 = 18\n#### 18", "18", "81", same=("18.",), different=("1.8",))
PRICE = KnownCase("What do 40 cost?", "1,080", "#### 1,080", "1,080", "7")
COLD = KnownCase("How cold?", "-5", "#### -5", "-5", "5")
HALF = KnownCase("Half of 1?", "\\frac{1}{2}", "\\boxed{\\frac{1}{2}}", "\\frac{1}{2}", "2")
LIST = KnownCase("Name it.", {"target": ["a", "b"]}, "It is <answer>a</answer>", "a", "c")
COLUMN = KnownCase(
    "?", "m", "\\boxed{\\begin{pmatrix} 2 \\\\ 3 \\end{pmatrix}}", "\\begin{pmatrix} 2 \\\\ 3 \\end{pmatrix}", "5"
)
PAIR, ROOTS = KnownCase("?", "p", "(1, 2)", "(1, 2)", "3"), KnownCase("?", "l", "1, 1, 2", "1, 1, 2", "3")
BINARY = KnownCase("?", "b", "101_2", "101_2", "3")
DOCUMENT = KnownCase("Write it.", None, "{}", right_responses=("{ }",), wrong_responses=("[]",))


def made(name: str, case: KnownCase) -> list[str]:
    return list(MUTATIONS[name].make(case))


@pytest.mark.parametrize(
    ("name", "case", "expected"),
    [
        ("18.0 for 18", EIGHTEEN, ["9 + 9 = 18\n#### 18.0", "9 + 9 = 18\n#### 18.00"]),
        ("thousands separators", KnownCase("?", "1080", "#### 1080", "1080", "7"), ["#### 1,080"]),
        ("without separators", PRICE, ["#### 1080"]),
        ("a currency", COLD, ["#### -$5"]),
        ("a plus sign", COLD, []),
        ("full-width digits", COLD, ["#### -\uff15"]),
        ("a minus sign of unicode", COLD, ["#### \u22125"]),
        ("\\dfrac, \\tfrac", HALF, ["\\boxed{\\dfrac{1}{2}}", "\\boxed{\\tfrac{1}{2}}"]),
        ("x = before it", HALF, []),
        ("a marker without an answer after it", COLD, ["#### -5\n#### ", "#### -5\n#### \n", "#### -5\n####  ?"]),
        (
            "separators elsewhere",
            EIGHTEEN,
            [f"9 + 9 = 18\n#### {said}" for said in ("1,8", "1, 8", "1 8", "1;8", "1 & 8", "1\\\\ 8")],
        ),
        ("another base", EIGHTEEN, [f"9 + 9 = 18\n#### {said}" for said in ("18_7", "18_{7}", "(18)_{16}")]),
        ("another base", BINARY, []),
        ("a matrix permuted", COLUMN, [COLUMN.response.replace("2 \\\\ 3", "3 \\\\ 2")] * 2),
        (
            "a matrix reshaped",
            COLUMN,
            [COLUMN.response.replace("2 \\\\ 3", said) for said in ("2 & 3", "2 & 3", "2", "23")],
        ),
        (
            "a tuple in another order or form",
            PAIR,
            ["(2, 1)", "(2, 1)", "[1, 2]", "[1, 2)", "(1, 2]", "\\{1, 2\\}", "1, 2"],
        ),
        (
            "an item more or less often",
            ROOTS,
            ["1, 1, 2, 1", "1, 2", "1, 1", "1, 2", "2, 1, 2", "1, 1, 1"],
        ),
        ("digits of another base", BINARY, ["101_3", "101_8", "101_10", "101_16", "101"]),
        ("said twice", COLD, ["#### -5\n\n#### -5"]),
        ("the right answer, then the wrong one", COLD, ["#### -5\n#### 5"]),
        ("right or wrong", COLD, ["#### -5 or 5", "#### -5, 5"]),
        ("no answer", COLD, ["#### ", "####  ", "#### ", "#### " * 100]),
        ("CRLF line ends", EIGHTEEN, ["9 + 9 = 18\r\n#### 18\r\n"]),
        ("another way to write it", EIGHTEEN, ["9 + 9 = 18\n#### 18."]),
        ("looks alike", EIGHTEEN, ["9 + 9 = 18\n#### 1.8"]),
    ],
)
def test_a_mutation_by_hand(name: str, case: KnownCase, expected: list[str]) -> None:
    assert made(name, case) == expected


def test_other_numbers_are_other_numbers() -> None:
    for case in (
        EIGHTEEN,
        PRICE,
        COLD,
        KnownCase("?", "0", "#### 0", "0", "1"),
        KnownCase("?", "1.5", "#### 1.5", "1.5", "1"),
    ):
        said = [text.rpartition("#### ")[2] for text in made("other numbers", case)]
        assert len(said) >= 3 and len(set(said)) == len(said)
        numbers = [Decimal(text.replace(",", "")) for text in said if text.count(".") < 2 and "-" not in text[1:]]
        assert numbers and case.number not in numbers
    assert {"19", "17", "-18", "180", "1.8", "81", "1"} <= {
        t.rpartition("#### ")[2] for t in made("other numbers", EIGHTEEN)
    }


def test_megabytes_are_megabytes_and_made_on_demand_only() -> None:
    large = [name for name, mutation in MUTATIONS.items() if mutation.large]
    assert len(large) >= 7
    for name in large:
        assert max(map(len, made(name, EIGHTEEN))) >= 100_000, name
    light = responses([EIGHTEEN], 0, ("text", "answer", "number"), heavy=False)
    assert max(len(text) for _, _, text in light) < 100_000
    assert not set(large) & {name for name, _, _ in light}


def test_responses_begin_with_the_right_and_the_wrong_answer_and_have_each_text_once() -> None:
    cases = [EIGHTEEN, PRICE, COLD]
    for index, case in enumerate(cases):
        found = responses(cases, index, ("text", "answer", "number"), heavy=False)
        assert [text for _, _, text in found[:2]] == [case.response, case.wrong_response]
        texts = [text for _, _, text in found]
        assert len(set(texts)) == len(texts) > 100
        assert [text for name, _, text in found if name == OTHERS] == [c.response for c in cases if c is not case]


def test_answers_of_rows_with_the_same_ground_truth_are_not_wrong() -> None:
    twin = KnownCase("What is 6 * 3?", "18", "6 * 3 = 18\n#### 18", "18", "63")
    assert OTHERS not in {name for name, _, _ in responses([EIGHTEEN, twin], 0, ("text", "answer"))}


def test_a_document_is_never_asked_for_its_answer() -> None:
    found = responses([DOCUMENT], 0, ("text", "answer", "number", "latex"))
    assert {name for name, _, _ in found} <= {mutation.name for mutation in TEXT}
    assert ("another right response", "right", "{ }") in found and ("the wrong answer", "wrong", "[]") in found


def test_a_ground_truth_that_is_an_object_is_quoted_in_every_form() -> None:
    assert made("the ground truth as an object", LIST)[:3] == [
        "{'target': ['a', 'b']}", "{'target': ['a', 'b']}", '{"target": ["a", "b"]}',
    ]  # fmt: skip


def test_latex_mutations_change_spelling_only() -> None:
    for mutation in (mutation for mutation in LATEX if mutation.expected == "right"):
        for text in mutation.make(HALF):
            assert text.startswith("\\boxed{") and text.count("{") == text.count("}")


@pytest.mark.parametrize("name", sorted(CASES))
def test_the_cases_of_a_shipped_reward_fit_their_mutations(name: str) -> None:
    case_set = CASES[name]
    assert set(case_set.by_design) <= {*MUTATIONS, OTHERS}
    for index, case in enumerate(case_set.cases):
        assert case.response != case.wrong_response
        assert len(responses(case_set.cases, index, case_set.groups, heavy=False)) > 40
