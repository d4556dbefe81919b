"""What a user can get wrong about rewards: each is told in words before any engine starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from hybridflow.config.locate import load_function
from hybridflow.rewards import http

from runs import configuration, mistake, succeed
from tiny import CARRY

Output = pytest.CaptureFixture[str]
ROWS = [{"prompt": f"1+{i}=", "ground_truth": str(i + 1), "data_source": "sums"} for i in range(4)]


def write(folder: Path, rows: list[dict[str, Any]], source: str = "", **reward: Any) -> str:
    """A configuration with these rows and this reward; a function of `source` is `mine.py:score`."""
    (folder / "mine.py").write_text(source)
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    if source:
        reward = {"function": f"{folder}/mine.py:score"} | reward
    config = configuration(folder, data={"train": f"{folder}/rows.jsonl", "eval": None})
    values = yaml.safe_load(Path(config).read_text()) | {"reward": reward}
    Path(config).write_text(yaml.safe_dump(values))
    return config


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        ({"function": "gsm8kk"}, ["'gsm8kk' is neither file.py:function", "did you mean 'gsm8k'?"]),
        ({"function": "model"}, ["the reward 'model' is named, but there is no section reward.model"]),
        ({"function": "gsm8k", "judge": {"url": "http://localhost:1/v1"}}, ["reward.judge is given, but nothing uses"]),
        ({"function": "judge", "judge": {}}, ["reward.judge.path: missing; or give reward.judge.url"]),
        ({"function": "gsm8k", "terms": {"a": {"function": "gsm8k"}}}, ["reward.terms takes the place of"]),
        ({"terms": {}}, ["terms is empty"]),
        ({"function": "gsm8k", "failure_value": -1}, ["failure_value is for reward.on_failure=value"]),
        ({"function": "gsm8k", "clip": [1, 0]}, ["reward.clip is [1.0, 0.0]: the first number must be below"]),
        ({"function": "gsm8k", "sources": {"a": "math"}}, ["reward.sources is for reward.function=by_source"]),
        ({"function": "code", "sandbox": {"backend": "fusion"}}, ["reward.sandbox.url is not set"]),
    ],
)
def test_a_section_that_says_two_things(
    reward: dict[str, Any], expected: list[str], tmp_path: Path, capsys: Output
) -> None:
    said = mistake(capsys, "train", write(tmp_path, ROWS, **reward))
    assert [e for e in expected if e not in said] == [], said
    assert not (tmp_path / "run").exists()


def test_a_source_that_nobody_knows(tmp_path: Path, capsys: Output) -> None:
    said = mistake(capsys, "train", write(tmp_path, [*ROWS[:3], ROWS[3] | {"data_source": "gsm9k"}]))
    assert "no reward is known for data_source" in said and "reward.sources" in said
    said = mistake(capsys, "train", write(tmp_path, [{k: v for k, v in r.items() if k != "data_source"} for r in ROWS]))
    assert "rows have no data_source, and reward.function is by_source" in said
    assert not (tmp_path / "run").exists()
    config = write(tmp_path, [r | {"data_source": "gsm8k"} for r in ROWS])
    assert "the first row's ground truth '1' given as the response scores 0" in succeed(capsys, "check", config)
    said = succeed(capsys, "check", config, "reward.sources={gsm8k: gsm8k_flexible}")
    assert "the first row's ground truth '1' given as the response scores 1" in said


def test_every_source_is_tried_on_a_row_of_its_own(tmp_path: Path, capsys: Output) -> None:
    rows = [r | {"data_source": source} for r, source in zip(ROWS, ["gsm8k", "gsm8k", "math", "mine"])]
    (tmp_path / "own.py").write_text("def score(response): return 7.0")
    config = write(tmp_path, rows, function="by_source", sources={"mine": f"{tmp_path}/own.py:score"})
    said = succeed(capsys, "check", config)
    assert "the first row's of mine ground truth '4' given as the response scores 7" in said
    (tmp_path / "own.py").write_text("def score(response): return 1 / 0")
    said = mistake(capsys, "check", config)
    assert "the first row of mine: the reward" in said and "raised ZeroDivisionError" in said


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def score(response): return [0.0, 1.0]", ["not a finite number", "steps"]),
        ("def score(response): return {'scores': 1.0}", ["without 'score'"]),
        ("def score(response, ground_truth): return float(ground_truth['answer'])", ["raised TypeError"]),
        ("import time\ndef score(response): time.sleep(60)", ["took longer than", "reward.pool.timeout"]),
        ("import os\ndef score(response): os._exit(3)", ["lost its process"]),
        ("def score(response):\n    return len(bytearray(1 << 40))", ["MemoryError"]),
    ],
)
def test_a_function_that_cannot_score(source: str, expected: list[str], tmp_path: Path, capsys: Output) -> None:
    said = mistake(capsys, "train", write(tmp_path, ROWS, source, pool={"timeout": 2}))
    assert [e for e in expected if e not in said] == [], said
    assert "why: " in said or "fix: " in said
    assert not (tmp_path / "run").exists()


def test_an_argument_that_it_does_not_take(tmp_path: Path, capsys: Output) -> None:
    source = "def score(response, ground_truth, strict=True): return 1.0"
    said = mistake(capsys, "train", write(tmp_path, ROWS, source, kwargs={"strickt": False}))
    assert "'strickt'" in said and "did you mean 'strict'?" in said


def test_rows_without_ground_truth(tmp_path: Path, capsys: Output) -> None:
    config = write(tmp_path, [{"prompt": "1+1=", "data_source": "gsm8k"}])
    assert "ground_truth" in mistake(capsys, "train", config)
    config = write(tmp_path, [{"prompt": "1+1=", "data_source": "math", "ground_truth": ""}])
    assert "needs a ground_truth" in mistake(capsys, "train", config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("reward", "what"),
    [
        ({"function": "http://127.0.0.1:9/score"}, "the reward server cannot be used"),
        ({"function": "judge", "judge": {"url": "http://127.0.0.1:9/v1"}}, "127.0.0.1:9"),
        (
            {"function": "code", "sandbox": {"backend": "fusion", "url": "http://127.0.0.1:9"}},
            "the Sandbox Fusion server http://127.0.0.1:9 does not run programs",
        ),
    ],
    ids=["server", "judge", "sandbox"],
)
def test_a_server_that_is_not_there(
    reward: dict[str, Any], what: str, tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "BACK_OFF", 0.01)  # before the sandbox server is tried again
    rows = [{**row, "ground_truth": {"inputs": ["1"], "outputs": ["2"]}} for row in ROWS]
    said = mistake(capsys, "train", write(tmp_path, rows, **reward, pool={"retries": 0, "timeout": 5}))
    assert what in said and "127.0.0.1:9" in said and "fix: " in said
    assert not (tmp_path / "run").exists()


def test_a_reward_model_without_a_classification_head(tmp_path: Path, capsys: Output) -> None:
    model, tokenizer = load_function(f"{CARRY}:tiny_qwen3")()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    config = write(tmp_path, ROWS, function="model", model={"path": str(tmp_path / "model")})
    said = mistake(capsys, "train", config)
    assert "Qwen3ForCausalLM" in said and "fix: " in said
    assert not (tmp_path / "run").exists()


def test_verls_function_works_as_it_is(tmp_path: Path, capsys: Output) -> None:
    source = (
        "def score(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    assert data_source == 'sums' and extra_info['index'] == 3\n"
        "    return {'score': float(solution_str == ground_truth), 'acc': solution_str == ground_truth, 'pred': 'x'}\n"
    )
    config = write(tmp_path, [r | {"extra_info": {"index": 3}} for r in ROWS], source)
    assert "given as the response scores 1 (components: acc)" in succeed(capsys, "check", config)
    succeed(capsys, "train", config)
