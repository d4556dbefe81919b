"""The reward of GSM8K, and the table of built-in rewards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hybridflow.config.load import load_config, validate
from hybridflow.config.rewards import REWARDS as NAMES
from hybridflow.config.sections import EvalConfig
from hybridflow.errors import UserError
from hybridflow.rewards import REWARDS
from hybridflow.rewards.function import load_reward
from hybridflow.rewards.gsm8k import flexible, strict


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
        ("#### 15 of 16", "15", 1, 0),
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
    ],
)
def test_an_answer_is_worth_one_or_nothing(response: str, truth: Any, strictly: int, flexibly: int) -> None:
    assert (strict(response, truth), flexible(response, truth)) == (strictly, flexibly)


def test_built_in_rewards_go_by_name_and_the_configuration_knows_them() -> None:
    assert tuple(REWARDS) == NAMES
    reward = load_reward("gsm8k_flexible")
    assert reward(["it is 2", "it is 3"], ground_truth="2", prompt=[], row={}) == [1.0, 0.0]
    values = {"run": {"folder": "x"}, "model": {"path": "m"}, "data": {"eval": "t.jsonl"}}
    for name in NAMES:
        assert validate(EvalConfig, values | {"reward": {"function": name}}).reward.function == name
    with pytest.raises(UserError, match=r"'gsm8' is neither file.py:function nor a built-in .*; did you mean 'gsm8k'"):
        validate(EvalConfig, values | {"reward": {"function": "gsm8"}})


def test_a_folder_of_that_name_does_not_hide_a_built_in_reward(tmp_path: Path) -> None:
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "eval.yaml").write_text(
        "run: {folder: x}\nmodel: {path: m}\ndata: {eval: t.jsonl}\nreward: {function: gsm8k}\n"
    )
    assert load_config(EvalConfig, tmp_path / "eval.yaml").reward.function == "gsm8k"
