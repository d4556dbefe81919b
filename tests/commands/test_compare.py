"""Two models on the same prompts: pairs, the test that fits the rewards, and what was asked of one only."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from hybridflow.commands.compare import compare, comparison_lines
from hybridflow.config.locate import load_function
from hybridflow.evaluation.statistics import sign_test
from hybridflow.tracking.rollouts import EVALUATION, write_rollouts

from runs import configuration, mistake, succeed
from tiny import CARRY

Output = pytest.CaptureFixture[str]


def evaluation(
    folder: Path,
    rewards: Sequence[Sequence[float]],
    *,
    template: str = "{}",
    settings: dict[str, Any] | None = None,
    sequences: int = 1,
    **changed: Any,
) -> str:
    """The folder of an evaluation: a prompt for each list of rewards, so many sequences in each response."""
    rows = [
        {
            "step": 0, "draw": draw, "sample": sample, "data_source": "sums", "prompt": template.format(f"{draw}+1="),
            "question": f"{draw}+1=", "response": "", "vote": "", "reward": reward, "advantage": None,
            "finish_reason": "stop", "ground_truth": str(draw + 1), "token_ids": [1], "tokens": ["a"], "logps": [0.0],
            "sequence": sequence,
        } | changed
        for draw, answers in enumerate(rewards)
        for sample, reward in enumerate(answers)
        for sequence in range(sequences)
    ]  # fmt: skip
    write_rollouts(folder / "answers.parquet", rows, EVALUATION)
    (folder / "evaluation.json").write_text(json.dumps({"settings": settings} if settings else {}))
    return str(folder)


SETTINGS: dict[str, Any] = {
    "run": {"seed": 0, "folder": "runs/a", "threads": None},
    "model": {"path": "runs/one", "packing": True},
    "data": {"eval": "rows.jsonl", "system_prompt": None},
    "reward": {"function": "gsm8k", "kwargs": {"strict": True}, "pool": {"processes": 1}},
    "rollout": {"max_response_tokens": 8, "stop": [], "max_cache_tokens": 1000},
    "eval": {"temperature": 0.0, "samples_per_prompt": 1},
}


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("eval.temperature", 1.0, "eval.temperature was 0.0 for A and 1.0 for B"),
        ("eval.samples_per_prompt", 4, "eval.samples_per_prompt was 1 for A and 4 for B"),
        ("rollout.max_response_tokens", 16, "rollout.max_response_tokens was 8 for A and 16 for B"),
        ("rollout.stop", ["\n"], "rollout.stop was [] for A and ['\\n'] for B"),
        ("data.system_prompt", "Think.", "data.system_prompt was unset for A and Think. for B"),
        ("data.eval", "others.jsonl", "data.eval was rows.jsonl for A and others.jsonl for B"),
        ("reward.kwargs.strict", False, "reward.kwargs.strict was True for A and False for B"),
        ("run.seed", 1, "run.seed was 0 for A and 1 for B"),
        ("run.folder", "runs/b", None),
        ("model.path", "runs/two", None),
        ("reward.pool.processes", 4, None),
        ("rollout.max_cache_tokens", 10, None),
    ],
)
def test_evaluations_that_were_made_differently_say_so(key: str, value: Any, told: str | None, tmp_path: Path) -> None:
    other = json.loads(json.dumps(SETTINGS))
    *path, last = key.split(".")
    section = other
    for name in path:
        section = section[name]
    section[last] = value
    a = evaluation(tmp_path / "a", [[1.0], [0.0]], settings=SETTINGS)
    b = evaluation(tmp_path / "b", [[1.0], [1.0]], settings=other)
    warned = [line for line in comparison_lines(compare(a, b)) if line.startswith("warning")]
    assert warned == ([] if told is None else [f"warning: they were evaluated differently: {told}"])


def test_right_and_wrong_are_held_together_by_the_exact_sign_test(tmp_path: Path) -> None:
    a = [1] * 10 + [1] * 2 + [0] * 9 + [0] * 4
    b = [1] * 10 + [0] * 2 + [1] * 9 + [0] * 4
    result = compare(
        evaluation(tmp_path / "a", [[float(x)] for x in a]),
        evaluation(tmp_path / "b", [[float(x)] for x in b], template="<|user|>{}"),  # another chat template
    )
    found = result["sources"]["sums"]
    assert (result["prompts"], result["only_in_a"], result["only_in_b"]) == (25, 0, 0)
    assert (found["a_better"], found["b_better"], found["equal"]) == (2, 9, 14)
    assert found["p"] == sign_test(2, 9) == pytest.approx(2 * (1 + 11 + 55) / 2**11)
    assert (found["mean_a"], found["mean_b"], found["difference"]) == pytest.approx((12 / 25, 19 / 25, 7 / 25))
    low, high = found["interval"]
    assert 0.04 <= low <= 0.08 and 0.48 <= high <= 0.56  # 7/25 -+ 1.96 * sqrt(mean of squares - mean^2) / 5
    said = "\n".join(comparison_lines(result))
    assert "B - A = +0.2800" in said and "p = 0.0654 (McNemar's exact test)" in said
    assert "B is better on 9 prompts, A on 2, equal on 14" in said and "warning" not in said
    agent = evaluation(tmp_path / "agent", [[float(x)] for x in b], sequences=3)  # each counts once
    assert compare(str(tmp_path / "a"), agent)["sources"] == result["sources"]


def test_several_answers_are_held_together_by_flipping_signs(tmp_path: Path) -> None:
    a, b = [[0.0, 1.0], [0.0, 0.0], [1.0, 1.0]], [[1.0, 1.0], [0.5, 1.0], [1.0, 1.0]]
    found = compare(evaluation(tmp_path / "a", a), evaluation(tmp_path / "b", b))["sources"]["sums"]
    assert found["difference"] == pytest.approx((0.5 + 0.75) / 3)
    assert (found["p"], found["test"]) == (0.5, "paired permutation test, exact")  # of 4 flips 2 are as far out


def test_prompts_of_one_side_are_counted_and_equal_ones_paired_in_order(tmp_path: Path) -> None:
    a = evaluation(tmp_path / "a", [[1.0], [0.0], [1.0]])
    b = evaluation(tmp_path / "b", [[1.0]] * 5)
    result = compare(a, b)
    assert (result["prompts"], result["only_in_a"], result["only_in_b"]) == (3, 0, 2)
    assert "warning: 0 prompts were asked only of A and 2 only of B" in "\n".join(comparison_lines(result))
    same = {"question": "again", "ground_truth": "1"}
    twice = compare(
        evaluation(tmp_path / "c", [[1.0], [0.0]], **same), evaluation(tmp_path / "d", [[1.0], [0.0]], **same)
    )
    assert twice["prompts"] == 2 and twice["sources"]["sums"]["equal"] == 2


def test_two_evaluations_with_nothing_in_common(tmp_path: Path, capsys: Output) -> None:
    a, b = evaluation(tmp_path / "a", [[1.0]]), evaluation(tmp_path / "b", [[1.0]], question="other")
    assert f"{a} and {b} have no prompt in common" in mistake(capsys, "eval", a, b)


def test_models_are_evaluated_first_as_the_configuration_says(tmp_path: Path, capsys: Output) -> None:
    for name, seed in [("one", 0), ("two", 1)]:
        for part in load_function(f"{CARRY}:tiny_qwen3")(seed=seed):
            part.save_pretrained(tmp_path / name)
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    said = mistake(capsys, "eval", one, two)
    assert f"{one} is not the folder of an evaluation" in said
    assert "fix: hybridflow eval A B --config eval.yaml" in said
    config = configuration(tmp_path, "eval", eval={"max_rows": 6})
    printed = succeed(capsys, "eval", one, two, "eval.samples_per_prompt=2", "eval.temperature=1", "--config", config,
                      "--json")  # fmt: skip
    result = json.loads(printed)
    assert result == json.loads((tmp_path / "run/comparison.json").read_text())
    found = result["sources"]["carry"]
    assert found["prompts"] == 6 and found["a_better"] + found["b_better"] + found["equal"] == 6
    for name, model in [("a", one), ("b", two)]:
        alone = json.loads((tmp_path / f"run/{name}/evaluation.json").read_text())
        assert alone["model"] == model
        assert alone["metrics"]["val-core/carry/reward/mean@2"] == pytest.approx(found[f"mean_{name}"])
    again = json.loads(succeed(capsys, "eval", tmp_path / "run/a", tmp_path / "run/b", "--json"))
    assert again["sources"] == result["sources"]
    mixed = json.loads(succeed(capsys, "eval", tmp_path / "run/a", one, "--config", config, "--json"))
    assert mixed["sources"]["carry"]["prompts"] == 6
    assert mixed["differences"] == {"eval.samples_per_prompt": [2, 1], "eval.temperature": [1.0, 0.0]}
    assert (tmp_path / "run/b/before-1/evaluation.json").is_file()  # of the first comparison


def test_overrides_without_a_configuration_and_a_configuration_without_models(tmp_path: Path, capsys: Output) -> None:
    a, b = (evaluation(tmp_path / name, [[1.0]]) for name in "ab")
    assert "'run.seed=1' changes a configuration, and none is given" in mistake(capsys, "eval", a, b, "run.seed=1")
    config = configuration(tmp_path, "eval")
    assert "'run.seed' is not an override" in mistake(capsys, "eval", config, "run.seed")
    (tmp_path / "a-model").mkdir()
    (tmp_path / "a-model/config.json").touch()
    said = mistake(capsys, "eval", tmp_path / "a-model")
    assert "is a folder" in said and f"hybridflow eval eval.yaml model.path={tmp_path / 'a-model'}" in said
    assert "--config says how to evaluate two models" in mistake(capsys, "eval", config, "--config", config)
