"""check tries the reward: on the ground truth, on nothing, and on the forms that right answers have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runs import configuration, mistake, succeed

Output = pytest.CaptureFixture[str]
ROW = {"prompt": "1+1=", "ground_truth": "2", "data_source": "mine"}
ADVICE = "so nothing shows here that any response can earn more"


def check(
    folder: Path, capsys: Output, rows: list[dict[str, Any]], *overrides: str, code: str = "", **reward: Any
) -> str:
    """What check says of these rows and this reward."""
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "own.py").write_text(code)
    section = {"pool": {"processes": 0}, **({"function": f"{folder}/own.py:score"} if code else {}), **reward}
    file = configuration(folder, reward=section, data={"train": f"{folder}/rows.jsonl", "eval": None})
    return succeed(capsys, "check", file, *overrides)


@pytest.mark.parametrize(
    ("row", "reward", "expected"),
    [
        ({"data_source": "openai/gsm8k", "ground_truth": "72"}, {"function": "by_source"},
         ["scores 0", "written as 'Let me think.\\n#### 72' it scores 1: a right response needs such a form"]),
        ({}, {"function": "gsm8k"}, ["scores 0", "#### 2' it scores 1"]),
        ({"answer": "so it is #### 2"}, {"function": "gsm8k"}, ["its column 'answer', 'so it is #### 2' it scores 1"]),
        ({}, {"function": "math"}, ["written as", "it scores 1"]),
        ({}, {"function": "math_dapo"}, ["written as", "it scores 1"]),
        ({}, {"function": "qa_em"}, ["<answer>2</answer>' it scores 1"]),
        ({}, {"function": "format"}, ["<think>Let me think.</think>", "it scores 1"]),
        ({}, {"function": "gsm8k_flexible"}, ["scores 1\n"]),
        ({"ground_truth": "B"}, {"function": "multiple_choice"}, ["scores 1\n"]),
        ({}, {"function": "format", "kwargs": {"tags": ["plan"]}}, [ADVICE, "and 6 other forms of it", "audit-reward"]),
        ({}, {"code": "def score(response):\n    return 0.0\n"}, [ADVICE, "no more than an empty response (0)"]),
        ({}, {"code": "def score(response):\n    return -len(response)\n"}, [ADVICE]),
        ({}, {"code": "def score(response):\n    return 1.0\n"}, [ADVICE]),
        ({}, {"code": "def score(response, ground_truth):\n    return 0.5 * (response == ground_truth)\n"},
         ["scores 0.5\n"]),
        ({}, {"code": "def score(response):\n    return float(ord(response[0]))\n"},
         ["the reward fails on an empty response, and models give some", "IndexError"]),
        ({"ground_truth": {"target": ["2"]}}, {"function": "qa_em"}, ["<answer>2</answer>' it scores 1"]),
        ({"ground_truth": None}, {"code": "def score(response):\n    return 0.0\n"},
         ["has no ground truth; an empty response scores 0"]),
        ({"ground_truth": None, "solution": "5"}, {"code": "def score(response):\n    return float(response[0])\n"},
         ["has no ground truth; its column 'solution', given as the response, scores 5"]),
    ],
)  # fmt: skip
def test_check_says_in_which_form_an_answer_is_worth_more_than_nothing(
    row: dict[str, Any], reward: dict[str, Any], expected: list[str], tmp_path: Path, capsys: Output
) -> None:
    said = check(tmp_path, capsys, [ROW | row], **reward)
    assert [e for e in expected if e not in said] == [], said
    assert (ADVICE in said) == (ADVICE in expected), said


VERL = {"data_source": "openai/gsm8k", "prompt": [{"role": "user", "content": "1+1="}],
        "reward_model": {"style": "rule", "ground_truth": "2"}, "ability": "math", "extra_info": {}}  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "said", "unsaid"),
    [
        ([], ["algorithm.aggregation=seq-mean-token-mean (verl: token-mean)", "clip_dual unset (verl: 3.0)",
              "optim.weight_decay=0 on matrices only (verl: 0.01 on all)", "checkpoint.keep=2 (verl: all)",
              "activation_checkpointing=false (verl: on)", "counts responses", "(verl: -1)"],
         ["critic", "kl_loss", "lam="]),
        (["algorithm.preset=dapo", "algorithm.clip_dual=3", "model.activation_checkpointing=true"],
         ["checkpoint.keep"], ["aggregation", "clip_dual", "activation_checkpointing"]),
        (["algorithm.preset=ppo", "critic={}", "train.samples_per_prompt=1"],
         ["the critic's lr is optim.lr=0.001 (verl: 1e-5)", "algorithm.lam=0.95 (verl: 1.0)"], ["kl_loss"]),
        (["algorithm.kl_loss_coef=0.01", "algorithm.kl_loss_estimator=k3"], ["kl_loss_estimator=k3, not clamped"], []),
    ],
)  # fmt: skip
def test_check_tells_what_differs_from_verl_where_rows_are_verls(
    overrides: list[str], said: list[str], unsaid: list[str], tmp_path: Path, capsys: Output
) -> None:
    found = check(tmp_path, capsys, [VERL], *overrides, function="by_source")
    part = found[found.index("advice: these rows have verl's form") :].splitlines()[:3]
    assert [e for e in said if e not in "\n".join(part)] == [], part
    assert [e for e in unsaid if e in "\n".join(part)] == [], part


def test_other_rows_are_not_compared_with_verl(tmp_path: Path, capsys: Output) -> None:
    assert "verl" not in check(tmp_path, capsys, [ROW], function="gsm8k_flexible")


@pytest.mark.parametrize("where", ["'boxed' in response", "not response", "response == '4'"])
def test_components_that_only_some_answers_have_may_be_named(where: str, tmp_path: Path, capsys: Output) -> None:
    function = f"def score(response):\n    return {{'score': 0.0}} | ({{'acc': 1.0}} if {where} else {{}})\n"
    (tmp_path / "parts.py").write_text(function)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "2+2=", "ground_truth": "4"}\n' * 8)
    data, reward = {"train": str(tmp_path / "rows.jsonl"), "eval": None}, {"function": f"{tmp_path}/parts.py:score"}
    config = configuration(tmp_path, data=data, reward=reward)
    for override in ("filter.metric=acc", "algorithm.reward_weights={acc: 2}"):
        gdpo = ["algorithm.advantage=gdpo"] if "weights" in override else []
        assert "scores 0" in succeed(capsys, "check", config, override, *gdpo)
        said = mistake(capsys, "check", config, override.replace("acc", "ac"), *gdpo)
        assert "names 'ac', which" in said and "'acc'" in said.partition("fix: ")[2]
