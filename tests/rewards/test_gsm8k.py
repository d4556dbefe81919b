"""The reward of GSM8K, on its own data too where they are."""

from __future__ import annotations

import json
import random
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from hybridflow.config.load import load_config
from hybridflow.config.sections import EvalConfig
from hybridflow.rewards import math
from hybridflow.rewards.gsm8k import flexible, strict

GSM8K = Path(__file__).resolve().parents[3] / "shared/data/gsm8k"


@pytest.mark.parametrize(
    ("response", "truth", "strictly", "flexibly"),
    [
        ("#### 1,000", 1000, 1, 1),
        ("the answer is 10", "10", 0, 1),
        ("18 - 3 = 15\n#### 15", "15", 1, 1),
        ("#### 15 eggs", "15", 1, 1),
        ("#### 15.", "15", 1, 1),
        ("#### 15.0", "15", 1, 1),
        ("#### -3", "-3", 1, 1),
        ("#### 3", "-3", 0, 0),
        ("#### 15\n#### 16", "15", 0, 0),
        ("#### 15 of 16", "15", 0, 0),
        ("#### 15, 16", "15", 0, 0),
        ("#### 15.-15", "15", 0, 1),
        ("#### 5.-15", "-15", 0, 0),
        ("####  +15", "15", 1, 1),
        ("it is -$15", "-15", 0, 1),
        ("it is 30 - 15", "15", 0, 1),
        ("it is 30-15", "-15", 0, 0),
        ("####15", "15", 0, 1),
        ("#### $15", "15", 0, 1),
        ("#### fifteen", "15", 0, 0),
        ("#### 1.2.3", "15", 0, 0),
        ("#### ,", "15", 0, 0),
        ("", "15", 0, 0),
        ("#### 15" + " " * 293, "15", 1, 1),
        ("#### 15" + " " * 294, "15", 0, 1),  # the last 300 characters count
        ("#### 15" + " " * 300, "15", 0, 0),
        ("#### 1000", "1,000", 1, 1),
        ("#### " + chr(0x2212) + chr(0xFF11) + chr(0xFF15), "-15", 1, 1),  # a minus sign and full-width digits
        ("#### 15", "10 + 5 = 15\n#### 15", 1, 1),  # GSM8K's own answer as ground truth
        ("#### 15" * 10**5, "15", 1, 1),
        ("9." * 10**6, "15", 0, 0),
    ],
)
def test_an_answer_is_worth_one_or_nothing(response: str, truth: Any, strictly: int, flexibly: int) -> None:
    assert (strict(response, truth), flexible(response, truth)) == (strictly, flexibly)


@pytest.mark.parametrize(
    ("truth", "said"),
    [
        (None, "needs a ground_truth"),
        ("", "needs a ground_truth"),
        ("fifteen", "'fifteen' is not a number"),
        ("nan", "'nan' is not a number"),
        (["15"], "compares with a text or a number"),
    ],
)
def test_a_right_answer_that_is_no_number_is_refused(truth: Any, said: str) -> None:
    for reward in (strict, flexible):
        for response in ("#### 15", ""):
            with pytest.raises(ValueError, match=said):
                reward(response, truth)


@pytest.mark.skipif(not GSM8K.is_dir(), reason="GSM8K is not there")
def test_all_of_gsm8ks_own_answers_are_right_and_those_of_other_problems_only_if_equal() -> None:
    rows = [json.loads(line) for part in ("train", "test") for line in (GSM8K / f"{part}.jsonl").open(encoding="utf-8")]
    answers = [row["answer"] for row in rows]
    truths = [answer.split("#### ")[1] for answer in answers]
    numbers = [Fraction(truth.replace(",", "")) for truth in truths]
    assert len(answers) == 8792
    others = random.Random(0).sample(range(8792), 8792)
    for reward in (strict, flexible):
        assert all(reward(answer, truth) == 1 for answer, truth in zip(answers, truths))
        assert all(reward(answers[j], truths[i]) == (numbers[i] == numbers[j]) for i, j in enumerate(others))
    boxed = [answer.replace("#### ", "\\boxed{") + "}" for answer in answers]
    assert all(math.score(answer, truth) == {"score": 1.0, "undecided": 0.0} for answer, truth in zip(boxed, truths))
    assert all(math.score(boxed[j], truths[i])["score"] == (numbers[i] == numbers[j]) for i, j in enumerate(others))


def test_a_folder_of_that_name_does_not_hide_a_built_in_reward(tmp_path: Path) -> None:
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "eval.yaml").write_text(
        "run: {folder: x}\nmodel: {path: m}\ndata: {eval: t.jsonl}\nreward: {function: gsm8k}\n"
    )
    assert load_config(EvalConfig, tmp_path / "eval.yaml").reward.function == "gsm8k"
