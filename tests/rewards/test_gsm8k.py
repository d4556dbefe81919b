"""The reward of GSM8K, on its own data too where they are."""

from __future__ import annotations

import json
import random
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridflow.config.kinds.eval import EvalConfig
from hybridflow.config.load import load_config
from hybridflow.rewards.verifiable import math
from hybridflow.rewards.verifiable.gsm8k import flexible, strict

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
        ("#### 18\n#### $20", "18", 0, 0),  # the last marker decides, or there is no answer
        ("#### 18\n#### 20", "18", 0, 0),
        ("#### 18\n####20", "18", 0, 0),
        ("#### 18\n####", "18", 0, 1),
        ("#### 18\n####\n", "18", 0, 1),
        ("#### 18\n#### twenty", "18", 0, 1),
        ("#### 18\n####\n20", "18", 0, 0),
        ("#### 18 ####", "18", 0, 1),
        ("#### \n18", "18", 0, 1),
        ("#### 15" * 10**5, "15", 1, 1),
        ("9." * 10**6, "15", 0, 0),
    ],
)
def test_an_answer_is_worth_one_or_nothing(response: str, truth: Any, strictly: int, flexibly: int) -> None:
    assert (strict(response, truth), flexible(response, truth)) == (strictly, flexibly)


RIGHT_18 = [
    "18",
    "18.0",
    "18.",
    "+18",
    "018",
    "18.00.",
    "18,",
    "18 eggs",
    "18 eggs per day.",
    "18%",
    "18 km/h",
    "18cm",
    "18 m",
] + ["18 (in all)", "18**", "18 a day", "18 - done", "18!", "\u0661\u0668", "\uff11\uff18", "18\u00a0eggs", "18\u20ac"]
WRONG_18 = (
    ["1,8", "18,00", "1.8", "1,800", ",18", "1 8", "18 0", "-18", "--18", "18 million", "18k", "18 K", "18x", "18 x"]
    + [
        "18 or 19",
        "18 or twenty",
        "18 hundred",
        "18/4",
        "18/x",
        "18 / 4",
        "18 = x",
        "18^2",
        "18^x",
        "18e2",
        "18E2",
        "18:30",
    ]
    + [
        "18\u00bd",
        "18\u00b2",
        "18\u221a2",
        "18\u03c0x",
        "18 and a half",
        "18 squared",
        "18 dozen",
        "18 to 20",
        "18 minus two",
    ]
    + [
        "18 \u0662",
        "1.8.",
        "1,8,",
        "18+2",
        "18 + x",
        "18 thousand",
        "18 - 4",
        "18 19",
        "18,19",
        "18, 19",
        "18;19",
        "18..0",
    ]
    + ["0x12", "1_8", "XVIII", "{18}"]
)


def test_what_stands_beside_a_number_is_a_unit_or_makes_it_another() -> None:
    assert [said for said in RIGHT_18 if strict(f"#### {said}", "18") != 1] == []
    assert [said for said in WRONG_18 if strict(f"#### {said}", "18") != 0] == []


@given(st.integers(0, 10**12), st.data())
def test_commas_part_thousands_and_nothing_else(value: int, data: st.DataObject) -> None:
    digits = str(value)
    cuts = data.draw(st.sets(st.integers(0, len(digits)), max_size=4))
    said = "".join("," * (i in cuts) + digit for i, digit in enumerate(digits))
    right = said in (digits, f"{value:,}")
    assert strict(f"#### {said}", value) == flexible(f"it is {said}", value) == right


@given(st.decimals(0, 10**9, places=2), st.sampled_from(["{}", "-{}", "{}.", "{} cm", "{}0"]), st.sampled_from("#\n "))
def test_whatever_comes_before_the_last_marker_is_no_answer(value: Decimal, form: str, between: str) -> None:
    said = form.format(value)
    true = -value if said.startswith("-") else value
    assert strict(f"#### {value + 1}{between}#### {said}", str(true)) == 1
    assert strict(f"#### {said}{between}#### {true + 1}", str(true)) == 0
    assert strict(f"#### {said}{between}####{true + 1}", str(true)) == 0


@pytest.mark.parametrize(
    ("response", "truth", "score"),
    [
        ("it is 1/2", "0.5", 1),
        ("it is 1/2", "2", 0),
        ("it is 1.5e3", "3", 0),
        ("it is 10^3", "3", 0),
        ("at 12:30", "30", 0),
        ("it is 3,4", "34", 0),
        ("it is 3,4", "4", 0),
        ("it is 3, 4", "4", 1),
        ("18, no: \u0662\u0660", "18", 0),
        ("it is -\u20ac15", "-15", 1),
        ("it is \u20ac1,500.", "1500", 1),
        ("so <<9*2=18>>18", "18", 1),
        ("(5)-15", "15", 1),
    ],
)
def test_the_last_number_is_read_whole(response: str, truth: str, score: int) -> None:
    assert flexible(response, truth) == score


@pytest.mark.parametrize(
    ("truth", "said"), [(1e-05, "0.00001"), (1e16, "10,000,000,000,000,000"), (0.5, ".5"), ("$5", 5)]
)
def test_a_right_answer_may_be_any_number(truth: Any, said: Any) -> None:
    assert strict(f"#### {said}", truth) == 1


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
    assert load_config(tmp_path / "eval.yaml", kind=EvalConfig).reward.function == "gsm8k"
