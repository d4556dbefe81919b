"""Evaluation: its numbers from its own answers, its noise apart from training's, and what it advises."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from hybridflow.cli.main import main
from hybridflow.evaluation import evaluate as module
from hybridflow.evaluation.evaluate import never_ended
from hybridflow.tracking.events import read_events
from hybridflow.tracking.rollouts import read_rollouts

from runs import assert_same_tensors, configuration, metrics, mistake, succeed

Output = pytest.CaptureFixture[str]
SAMPLED = ["eval.samples_per_prompt=4", "eval.temperature=1.5", "eval.every=1"]
TRAINING = ("actor/", "critic/", "response_length/", "training/")


def test_training_is_the_same_bit_for_bit_whatever_is_evaluated(tmp_path: Path, capsys: Output) -> None:
    runs = {"none": ["data.eval=null"], "greedy": ["eval.every=1"], "sampled": [*SAMPLED, "eval.top_k=20"]}
    for name, overrides in runs.items():
        (tmp_path / name).mkdir()
        succeed(capsys, "train", configuration(tmp_path / name), *overrides)
    none, *others = (tmp_path / name / "run" for name in runs)
    trained = [
        [{k: v for k, v in m.items() if k.startswith(TRAINING)} for m in metrics(run) if m["step"]]
        for run in (none, *others)
    ]
    assert len(trained[0]) == 2 and all(t == trained[0] for t in trained)
    for run in others:
        assert_same_tensors(run / "model/model.safetensors", none / "model/model.safetensors")
        assert [m["step"] for m in metrics(run) if any(n.startswith("val-core/") for n in m)] == [0, 1, 2]


# 1 where the answer begins with a capital letter or a digit: about one in three random answers.
TASK = """
def score(response):
    return float(response[:1].isupper() or response[:1].isdigit())

def first(response):
    return response[:1]

def rows():
    names = ["one", "two", "two"]
    return [{"data_source": n, "prompt": f"1+{i}=", "ground_truth": str(i)} for i, n in enumerate(names * 3)]
"""


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """An evaluation of 9 prompts of two sources, 4 answers each: evaluation.json, and the answers."""
    from hybridflow.cli.main import main

    folder = tmp_path_factory.mktemp("sampled")
    (folder / "task.py").write_text(TASK)
    config = configuration(
        folder, "eval", data={"eval": "task.py:rows"}, reward={"function": "task.py:score"},
        eval={"max_rows": None, "samples_per_prompt": 4, "temperature": 1.0, "answer": "task.py:first"},
    )  # fmt: skip
    assert main(["eval", config]) == 0
    return json.loads((folder / "run/evaluation.json").read_text()), read_rollouts(folder / "run/answers.parquet")


def test_the_numbers_of_a_sampled_evaluation_follow_from_its_answers(
    sampled: tuple[dict[str, Any], list[dict[str, Any]]],
) -> None:
    result, answers = sampled
    measured, expected = result["metrics"], {}
    for source, prompts in [("one", 3), ("two", 6)]:
        groups: dict[int, list[dict[str, Any]]] = {}
        for a in answers:
            if a["data_source"] == source:
                groups.setdefault(a["draw"], []).append(a)
        assert [len(g) for g in groups.values()] == [4] * prompts
        assert any(0 < sum(a["reward"] for a in g) < 4 for g in groups.values()), "some prompts must be mixed"
        name = f"val-core/{source}/reward"
        expected[f"{name}/mean@4"] = mean([mean([a["reward"] for a in g]) for g in groups.values()])
        for k in (1, 2, 4):
            subsets = [list(combinations(g, k)) for g in groups.values()]
            passed = [mean([max(a["reward"] for a in s) for s in group]) for group in subsets]
            expected[f"{name}/pass@{k}"] = mean(passed)
            if k > 1:
                expected[f"{name}/maj@{k}/mean"] = mean([mean([majority(s) for s in group]) for group in subsets])
        lengths = [len(a["token_ids"]) for g in groups.values() for a in g]
        cut = [a["finish_reason"] == "length" for g in groups.values() for a in g]
        expected[f"val-aux/{source}/response_length/mean"] = mean(lengths)
        expected[f"val-aux/{source}/response_length/clip_ratio"] = mean(cut)
        expected[f"val-aux/{source}/reward_failures"] = 0
    ends = [n for n in measured if n.endswith(("/ci_low", "/ci_high"))]
    assert {n: v for n, v in measured.items() if n not in ends} == pytest.approx(expected)
    for name, found in result["intervals"].items():
        aside = name.replace("val-core", "val-aux")
        assert (found["low"], found["high"]) == (measured[f"{aside}/ci_low"], measured[f"{aside}/ci_high"])
        assert 0 <= found["low"] <= found["value"] == measured[name] <= found["high"] <= 1
    assert len(ends) == 2 * len(result["intervals"]) == 2 * 12


def mean(values: Any) -> float:
    return sum(values) / len(values)


def majority(answers: tuple[dict[str, Any], ...]) -> float:
    """By the first letter, ties by lot; answers of one letter are worth the same here."""
    letters = [a["response"][:1] for a in answers]
    most = max(map(letters.count, letters))
    return mean([a["reward"] for a, letter in zip(answers, letters) if letters.count(letter) == most])


def test_a_result_can_be_repeated_from_what_it_says(sampled: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    result, answers = sampled
    assert {"hybridflow", "torch", "transformers", "python"} == set(result["versions"])
    assert result["settings"]["eval"]["temperature"] == 1.0 and result["settings"]["run"]["seed"] == 3
    assert result["prompts"] == 9 and result["samples_per_prompt"] == 4 and result["seconds"] > 0
    assert len({tuple(a["token_ids"]) for a in answers if a["draw"] == 0}) == 4, "samples have noise of their own"
    assert {a["vote"] for a in answers} == {a["response"][:1] for a in answers}
    assert answers[0]["question"] == "1+0=" != answers[0]["prompt"]


def test_a_threshold_decides_what_passes_and_k_what_is_measured(tmp_path: Path, capsys: Output) -> None:
    config = configuration(tmp_path, "eval")
    overrides = ["eval.samples_per_prompt=4", "eval.temperature=1", "eval.k=[3]"]
    succeed(capsys, "eval", config, *overrides, "eval.success_threshold=0")
    found = json.loads((tmp_path / "run/evaluation.json").read_text())["metrics"]
    assert found["val-core/carry/reward/pass@3"] == 1
    assert {n for n in found if n.startswith("val-core")} == {
        f"val-core/carry/reward/{n}" for n in ("mean@4", "pass@3", "maj@3/mean")
    }
    succeed(capsys, "eval", config, *overrides)
    assert json.loads((tmp_path / "run/evaluation.json").read_text())["metrics"]["val-core/carry/reward/pass@3"] == 0


def test_answers_that_never_end_are_told_with_what_to_do(tmp_path: Path, capsys: Output) -> None:
    config = configuration(tmp_path, rollout={"max_response_tokens": 2})
    succeed(capsys, "train", config)
    told = [e["text"] for e in read_events(tmp_path / "run/events.jsonl") if e["kind"] == "advice"]
    assert [t.partition(":")[0] for t in told] == ["evaluation before training", "first step"]
    assert "'<|end|>' was never generated: 4 of 4 responses ended at the length limit of 2 tokens" in told[0]
    assert "raise rollout.max_response_tokens" in told[0] and "chat template" in told[0]
    said = succeed(capsys, "eval", configuration(tmp_path, "eval", rollout={"max_response_tokens": 2}))
    assert "advice: '<|end|>' was never generated: 4 of 4" in said


def test_one_answer_that_ends_is_enough() -> None:
    assert never_ended(["length", "length"], 8, "</s>") is not None
    assert never_ended(["length", "stop", "length"], 8, "</s>") is None
    assert never_ended(["length"], 8, "</s>") is None  # one answer says nothing
    assert never_ended([], 8, "</s>") is None


def test_a_long_evaluation_tells_how_far_it_is(tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECONDS_BETWEEN_NOTES", 0.0)
    from hybridflow.cli.main import main

    config = configuration(tmp_path, "eval", rollout={"max_cache_tokens": 64, "max_response_tokens": 8})
    assert main(["eval", config]) == 0
    printed = capsys.readouterr()
    assert "evaluation: 2 of 4 responses, about" in printed.err and "evaluation:" not in printed.out


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["eval.samples_per_prompt=4", "eval.temperature=1", "eval.k=[1,8]"],
         ["eval.k asks for pass@8, but eval.samples_per_prompt is 4", "raise eval.samples_per_prompt to 8"]),
        (["eval.k=[2]"], ["eval.k asks for pass@2, but eval.samples_per_prompt is 1"]),
        (["eval.samples_per_prompt=2"], ["eval.samples_per_prompt is 2, but eval.temperature is 0", "set eval.temper"]),
        (["eval.top_p=0"], ["eval.top_p"]),
        (["eval.answer=reward.py:scroe"], ["has no function 'scroe'", "did you mean 'score'?"]),
        (["eval.answer=reward.py:score"], ["eval.answer", "raised TypeError", "make it return the answer"]),
    ],
)  # fmt: skip
def test_what_cannot_be_evaluated_is_refused(
    overrides: list[str], expected: list[str], tmp_path: Path, capsys: Output
) -> None:
    said = mistake(capsys, "train", configuration(tmp_path), *overrides)
    assert [e for e in expected if e not in said] == [], said
    assert not (tmp_path / "run").exists()


def test_adapters_are_not_evaluated_without_their_weights(tmp_path: Path, capsys: Output) -> None:
    said = mistake(capsys, "eval", configuration(tmp_path, "eval"), "model.lora.rank=4")
    assert "model.lora is for training" in said and "hybridflow export RUN FOLDER" in said


def test_an_evaluation_that_was_in_the_folder_is_kept_and_compared(tmp_path: Path, capsys: Output) -> None:
    config, run = configuration(tmp_path, "eval", eval={"max_rows": 2}), tmp_path / "run"
    succeed(capsys, "eval", config)
    first = {name: (run / name).read_bytes() for name in ("evaluation.json", "answers.parquet")}
    succeed(capsys, "eval", config)  # the same again replaces it
    assert not (run / "before-1").exists()
    capsys.readouterr()
    for kept, limit in enumerate((4, 5), start=1):
        assert main(["eval", config, f"rollout.max_response_tokens={limit}"]) == 0
        said = capsys.readouterr().err
        folder = run / f"before-{kept}"
        assert f"is in {folder} now; to compare: hybridflow eval {folder} {run}" in said
    assert (run / "before-1/answers.parquet").read_bytes() == first["answers.parquet"]
    compared = succeed(capsys, "eval", run / "before-1", run)
    assert "they were evaluated differently: rollout.max_response_tokens was 8 for A and 5 for B" in compared
