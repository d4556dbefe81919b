"""Short answers: exact match and F1, held against SQuAD's definitions worked out by hand."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridflow.rewards.verifiable.qa import exact_match, f1


@pytest.mark.parametrize(
    ("answer", "truth", "right"),
    [
        ("The Paris", "paris", True),  # a golden score of verl's search-R1
        ("  U.S.  Army! ", "the US army", True),
        ("Paris", ["Rome", "Paris"], True),
        ("Paris", {"target": ["Rome", "Paris"]}, True),
        ("Paris", {"target": "Paris"}, True),
        ("1984", 1984, True),
        ("Paris or Rome", ["Rome", "Paris"], False),
        ("Paris, France", "Paris", False),
        ("", "Paris", False),
        ("an", "The", False),
        ("The", "the", True),
        ("???", "!!!", False),
    ],
)
def test_exact_match_ignores_case_articles_punctuation_and_spaces(answer: str, truth: object, right: bool) -> None:
    assert exact_match(f"<answer>{answer}</answer>", truth) == right
    assert exact_match(answer, truth, whole=True) == right
    assert exact_match(f"<answer>wrong</answer> <answer>{answer}</answer>", truth) == right
    assert exact_match(f"<answer>{answer}</answer> <answer>wrong</answer>", truth) == 0


@pytest.mark.parametrize("response", ["Paris", "<answer>Paris", "Paris</answer>", "</answer>Paris<answer>", "", " \n"])
def test_without_tags_there_is_no_answer(response: str) -> None:
    assert exact_match(response, "Paris") == f1(response, "Paris") == 0


@pytest.mark.parametrize(
    ("answer", "truth", "value"),
    [
        ("Paris, France", "Paris", 2 / 3),  # precision 1/2, recall 1
        ("Paris", "Paris in France", 1 / 2),  # precision 1, recall 1/3
        ("a b b c", "b b d", 4 / 6),  # "a" is an article: precision 2/3, recall 2/3
        ("Paris", ["Rome", "the city of Paris", "Paris France"], 2 / 3),
        ("no", "no way", 0.0),  # yes and no are right or wrong as a whole
        ("yes", "yes", 1.0),
        ("Rome", "Paris", 0.0),
        ("Paris " * 50, "Paris", 2 / 51),
    ],
)
def test_f1_is_that_of_words(answer: str, truth: object, value: float) -> None:
    assert f1(f"<answer>{answer}</answer>", truth) == pytest.approx(value)


@pytest.mark.parametrize("truth", [None, "", [], {"target": []}, {"answer": "Paris"}, [""], {"target": None}])
def test_without_a_right_answer_there_is_no_score(truth: object) -> None:
    for reward in (exact_match, f1):
        with pytest.raises(ValueError, match="needs a ground_truth"):
            reward("<answer>Paris</answer>", truth)
        with pytest.raises(ValueError, match="needs a ground_truth"):
            reward("", truth)


@given(st.text(min_size=1).filter(str.strip), st.text(min_size=1).filter(str.strip))
def test_exact_match_means_an_f1_of_one(said: str, true: str) -> None:
    assert exact_match(said, said, whole=True) == f1(said, said, whole=True) == 1
    assert 0 <= f1(said, true, whole=True) <= 1
    assert exact_match(said, true, whole=True) <= f1(said, true, whole=True)


@pytest.mark.parametrize("text", ["<answer>", "</answer>", "a ", "the.", " ", "<answer>a</answer>"])
def test_a_million_characters_take_no_time(text: str) -> None:
    for reward in (exact_match, f1):
        start = time.process_time()
        assert reward(text * (10**6 // len(text)), "Paris") == 0
        assert time.process_time() - start < 0.1
