"""Rewards: what the function's argument names ask for it gets, and what it returns is checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hybridflow.errors import UserError
from hybridflow.rewards.function import RewardFunction, load_reward

ROW = {"prompt": "1+1=", "ground_truth": "2", "level": 3}
CONTEXT: dict[str, Any] = {"ground_truth": "2", "prompt": [{"role": "user", "content": "1+1="}], "row": ROW}


def refused(function: Any, responses: list[str]) -> UserError:
    with pytest.raises(UserError) as caught:
        RewardFunction(function, "mine")(responses, **CONTEXT)
    return caught.value


def test_a_function_gets_what_its_arguments_name() -> None:
    seen: list[Any] = []

    def all_of_it(response: str, ground_truth: str, prompt: Any, row: Any) -> int:
        seen.append((response, ground_truth, prompt[0]["content"], row["level"]))
        return len(seen)

    assert RewardFunction(all_of_it, "mine")(["a", "b"], **CONTEXT) == [1.0, 2.0]
    assert seen == [("a", "2", "1+1=", 3), ("b", "2", "1+1=", 3)]
    assert RewardFunction(lambda response: response == "2", "mine")(["2", "3"], **CONTEXT) == [1.0, 0.0]
    assert RewardFunction(lambda response, bonus=0.5: bonus, "mine")(["2"], **CONTEXT) == [0.5]
    assert RewardFunction(lambda response, **rest: float(not rest), "mine")(["2"], **CONTEXT) == [1.0]


def test_a_group_is_scored_in_one_call() -> None:
    def ranks(responses: list[str], ground_truth: str) -> list[float]:
        return [sorted(responses).index(r) / len(responses) + len(ground_truth) for r in responses]

    assert RewardFunction(ranks, "mine")(["b", "c", "a", "d"], **CONTEXT) == [1.25, 1.5, 1.0, 1.75]


@pytest.mark.parametrize("value", [1, True, 0.5, -3, np.float32(0.5), np.int64(2), np.float64(0.25)])
def test_every_kind_of_number_will_do(value: Any) -> None:
    (score,) = RewardFunction(lambda response: value, "mine")(["x"], **CONTEXT)
    assert type(score) is float and score == value


@pytest.mark.parametrize(
    "value", [None, "1", float("nan"), float("inf"), -float("inf"), [1.0], 1j, np.float32("nan"), torch.tensor(1.0)]
)
def test_what_is_no_number_is_refused_with_the_answer(value: Any) -> None:
    error = refused(lambda response: value, ["good answer"])
    assert f"the reward mine returned {value!r} ({type(value).__name__}), not a finite number" in error.what
    assert "scoring 'good answer'" in error.why and "def score(response: str" in error.fix
    error = refused(lambda responses: [1.0, value], ["fine", "good answer"])
    assert f"returned {value!r}" in error.what and "scoring 'good answer'" in error.why


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ([1.0], "1 scores"),
        ([1.0] * 3, "3 scores"),
        ((), "0 scores"),
        (0.5, "a float"),
        ("12", "a str"),
        (None, "a NoneType"),
        ({0: 1.0, 1: 2.0}, "a dict"),
        (np.ones(2), "a ndarray"),
    ],
)
def test_a_group_needs_as_many_scores_as_answers(value: Any, found: str) -> None:
    error = refused(lambda responses: value, ["a", "b"])
    assert error.what == f"the reward mine was given 2 responses and returned {found}"
    assert "a list with one number for each response" in error.fix


def test_a_reward_that_raises_shows_the_answer_and_keeps_its_cause() -> None:
    error = refused(lambda response: {"a": 1.0}[response], ["a", "strange " + 300 * "x"])
    assert error.what == f"the reward mine raised KeyError: 'strange {300 * 'x'}'"
    assert error.why.startswith("it was scoring 'strange xxx") and error.why.endswith("against '2'")
    assert len(error.why) < 260
    assert isinstance(error.__cause__, KeyError)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (
            lambda answer: 1.0,
            "wants 'answer' (known: ground_truth, prompt, response, row) and does not take 'response'",
        ),
        (lambda response, ground_thruth: 1.0, "wants 'ground_thruth' (did you mean 'ground_truth'?)"),
        (lambda ground_truth: 1.0, "does not take 'response'"),
        (lambda responses, response: 1.0, "wants 'response' (did you mean 'responses'?)"),
        (lambda: 1.0, "does not take 'response'"),
    ],
)
def test_a_signature_that_is_none_is_refused_before_any_call(function: Any, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        RewardFunction(function, "mine")
    assert caught.value.what == f"the reward mine {expected}"
    assert "or def score(responses: list[str], ...)" in caught.value.fix


def test_a_reward_is_found_by_file_and_name(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def half(response):\n    return 0.5\n")
    assert load_reward(f"{tmp_path}/mine.py:half")(["x"], **CONTEXT) == [0.5]
    with pytest.raises(UserError, match="has no function 'hafl'") as caught:
        load_reward(f"{tmp_path}/mine.py:hafl")
    assert caught.value.fix == "did you mean 'half'?"
