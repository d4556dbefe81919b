"""Runs whose answers are drawn from a part of the vocabulary, or end by their text."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet
import pytest

from runs import configuration, metrics, mistake, succeed

Output = pytest.CaptureFixture[str]


@pytest.mark.parametrize("cut", [{"top_p": 0.9}, {"top_k": 5, "temperature": 0.8}, {"min_p": 0.5}])
def test_the_trainer_scores_what_the_sampler_drew_from(tmp_path: Path, capsys: Output, cut: dict[str, float]) -> None:
    """Two updates a step: recomputed old log-probs, and those inside the update, are under the same support."""
    train = {"steps": 2, "prompts_per_step": 2, "samples_per_prompt": 4, "sequences_per_update": 4}
    path = configuration(tmp_path, rollout={"max_response_tokens": 8} | cut, train=train)
    succeed(capsys, "train", path)
    lines = metrics(tmp_path / "run")[1:]
    assert len(lines) == 2
    for line in lines:
        assert line["training/rollout_probs_diff_max"] <= 1e-4
        assert line["actor/entropy"] < 4.5  # of 100 tokens it would be near 4.6: the untrained model is flat


def test_answers_of_a_run_end_at_stop_strings(tmp_path: Path, capsys: Output) -> None:
    rollout = {"max_response_tokens": 12, "stop": ["1", "2", "3", "a", "b", "c", "d", "e"], "stop_regex": "[A-Z]$"}
    succeed(capsys, "train", configuration(tmp_path, rollout=rollout))
    rows = pyarrow.parquet.read_table(tmp_path / "run/rollouts/step-000002.parquet").to_pylist()
    ended = [r["response"] for r in rows if r["finish_reason"] == "stop" and "<|end|>" not in r["tokens"]]
    assert ended and all(text[-1] in "123abcde" or text[-1].isupper() for text in ended)
    assert all(not set(r["response"][:-1]) & set("123abcdeXYZ") for r in rows)


def test_asking_with_filters_and_stops(tmp_path: Path, capsys: Output) -> None:
    model = str(Path(__file__).resolve().parents[2] / "recipes/carry/task.py:tiny_qwen3")
    ask = ["generate", model, "1+1=", "--max-tokens", "8", "--seed", "3"]
    greedy = succeed(capsys, *ask)
    for narrow in (["--top-k", "1"], ["--top-p", "0.0001"], ["--min-p", "1"]):
        assert succeed(capsys, *ask, "--temperature", "1", *narrow) == greedy
    assert succeed(capsys, *ask, "--temperature", "1") != greedy
    text = greedy.partition("  [cut")[0]
    assert succeed(capsys, *ask, "--stop", text[2]) == text[: text.index(text[2]) + 1] + "\n"
    assert "top_p is 2.0" in mistake(capsys, *ask, "--temperature", "1", "--top-p", "2")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"stop_regex": "(a"}, "rollout.stop_regex '(a' is not a regular expression"),
        ({"stop": [""]}, "rollout.stop holds an empty text"),
    ],
)
def test_configurations_that_cannot_work(
    tmp_path: Path, capsys: Output, wrong: dict[str, object], message: str
) -> None:
    assert message in mistake(capsys, "check", configuration(tmp_path, rollout=wrong))
