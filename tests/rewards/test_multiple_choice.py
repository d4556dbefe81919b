"""Multiple choice: the letter that is stated last, in a form that states one."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridflow.rewards.verifiable.multiple_choice import score

FORMS = (
    r"\boxed{%s}",
    r"\boxed{\text{(%s)}}",
    r"so $\boxed{ %s }$.",
    "Answer: %s",
    "**Answer:** %s",
    "**Answer**: (%s)",
    "The answer is %s.",
    "the answer is **%s**",
    "The answer is option (%s)",
    "Answer: %s) Paris",
    "so it is (%s).",
    "%s",
    "Two and two.\n%s.",
    "%s) Paris",
    r"\boxed{**%s**}",
    "The answer is (%s.).",
)


@given(st.sampled_from("ABCD"), st.sampled_from("ABCD"), st.sampled_from(FORMS), st.sampled_from(FORMS))
def test_the_last_statement_counts_in_every_form(first: str, last: str, before: str, form: str) -> None:
    response = before % first + "\nNo, wait.\n" + form % last
    assert score(response, last) == 1
    assert first == last or score(response, first) == 0


@pytest.mark.parametrize(
    "response",
    [
        "",
        " \n",
        "Answer: B or C",
        "Answer: C or B",
        "Answer: C, D",
        "Answer: (C) and (D)",
        "Answer: C/D",
        "Answer: CD",
        "Answer: Cat",
        "the answer is c",
        r"\boxed{C, D}",
        r"\boxed{CD}",
        "C or D",
        "C is it, I think",
        "A\nB\nC\nD",
        "(A) (B) (C) (D)",
        "Answer: C\nAnswer: D",
        "The options are (C) and more.",
        "Paris",
        'It says "The right answer is C." and I do not know.',
    ],
)
def test_no_statement_or_one_of_two_letters_is_wrong(response: str) -> None:
    assert score(response, "C") == 0


def test_an_article_is_not_a_letter() -> None:
    assert score("The answer is a matter of taste", "A") == 0
    assert score("The answer is a matter of taste. (B)", "B") == 1


@pytest.mark.parametrize("truth", ["C", "c", "(C)", "C.", 2])
def test_the_right_answer_is_a_letter_or_its_place(truth: str | int) -> None:
    assert (score("Answer: C", truth), score("Answer: B", truth)) == (1, 0)


def test_there_may_be_more_letters() -> None:
    assert score("Answer: J", "J", choices="ABCDEFGHIJ") == 1
    assert score("Answer: J", "C") == 0


@pytest.mark.parametrize(
    ("truth", "said"),
    [(None, "needs a ground_truth"), ("", "needs a ground_truth"), ("E", "'E' is none of the choices ABCD")],
)
def test_a_right_answer_that_is_no_choice_is_refused(truth: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        score("Answer: C", truth)
    with pytest.raises(ValueError, match=r"4 is none of the choices ABCD"):
        score("", 4)


def test_letters_of_another_width_are_letters() -> None:
    assert score("Answer: " + chr(0xFF23), "C") == 1


@pytest.mark.parametrize("text", ["(", "answer ", " ", "*", "A", "A) ", "(A", "\n", r"\boxed{"])
def test_a_million_characters_take_no_time(text: str) -> None:
    start = time.process_time()
    assert score(text * (10**6 // len(text)), "C") == 0
    assert time.process_time() - start < 0.1
