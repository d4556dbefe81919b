"""The best checkpoint: kept besides the newest, named in best.json, the same after going on, and exported."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from hybridflow.checkpoint.store import Best
from hybridflow.config.locate import load_function
from hybridflow.config.sections.run import CheckpointSection
from hybridflow.runs.best import best_of, better

import commands
from runs import assert_same_tensors, configuration, metrics, mistake, succeed
from tiny import CARRY

Output = pytest.CaptureFixture[str]
METRIC = "val-core/carry/reward/mean@1"
SETTINGS = [f"checkpoint.best={METRIC}", "checkpoint.keep=1", "eval.every=1", "optim.lr=1e-2"]


def saved(run: Path) -> list[int]:
    return sorted(int(p.name.removeprefix("step-")) for p in (run / "checkpoints").glob("step-*"))


def named(run: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((run / "checkpoints/best.json").read_text())
    return value


@pytest.mark.parametrize(("mode", "pick"), [("max", max), ("min", min)])
def test_the_best_step_is_kept_besides_the_newest(mode: str, pick: Any, tmp_path: Path, capsys: Output) -> None:
    succeed(capsys, "train", configuration(tmp_path), *SETTINGS, "train.steps=5", f"checkpoint.best_mode={mode}")
    values = {m["step"]: m[METRIC] for m in metrics(tmp_path / "run") if m["step"]}
    best = pick(values, key=lambda step: values[step])
    assert best != 5 and len(values) == 5, "the case is of use only if the last step is not the best"
    assert named(tmp_path / "run") == {"step": best, "metric": METRIC, "value": values[best]}
    assert saved(tmp_path / "run") == [best, 5]


def test_a_run_that_goes_on_finds_the_same_best(tmp_path: Path, capsys: Output) -> None:
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole, parts = (configuration(tmp_path / name) for name in ("whole", "parts"))
    succeed(capsys, "train", whole, *SETTINGS, "train.steps=5")
    succeed(capsys, "train", parts, *SETTINGS, "train.steps=3")
    (tmp_path / "parts/run/checkpoints/best.json").unlink()  # a kill after the checkpoint and before this
    succeed(capsys, "train", parts, *SETTINGS, "train.steps=5")
    runs = [tmp_path / name / "run" for name in ("whole", "parts")]
    assert named(runs[0]) == named(runs[1]) and saved(runs[0]) == saved(runs[1])
    assert_same_tensors(*(run / "model/model.safetensors" for run in runs))


def test_the_best_is_exported_and_a_run_of_all_weights_needs_no_model_to_begin_with(
    tmp_path: Path, capsys: Output
) -> None:
    model, tokenizer = load_function(f"{CARRY}:tiny_qwen3")(seed=1)
    model.save_pretrained(tmp_path / "begin")
    tokenizer.save_pretrained(tmp_path / "begin")
    config = configuration(tmp_path, model={"path": str(tmp_path / "begin")})
    said = succeed(capsys, "train", config, *SETTINGS, "train.steps=5")
    run, best = tmp_path / "run", named(tmp_path / "run")["step"]
    assert f"best: step {best}, {METRIC} " in said and f"hybridflow export {run} FOLDER --best" in said
    shutil.rmtree(tmp_path / "begin")
    done = json.loads(succeed(capsys, "export", run, tmp_path / "best", "--best", "--json"))
    assert done == {"folder": str(tmp_path / "best"), "step": best, "dtype": "float32"}
    saved_weights = run / f"checkpoints/step-{best:06d}/model/model.safetensors"
    assert_same_tensors(tmp_path / "best/model.safetensors", saved_weights)
    succeed(capsys, "export", run, tmp_path / "last")
    first, last = (load_file(tmp_path / name / "model.safetensors") for name in ("best", "last"))
    assert any(not first[n].equal(last[n]) for n in first)
    assert (tmp_path / "last/tokenizer.json").is_file()


def test_adapters_of_a_reinforcement_run_are_exported(tmp_path: Path, capsys: Output) -> None:
    config = configuration(tmp_path, model={"lora": {"rank": 2}})
    succeed(capsys, "train", config, *SETTINGS, "train.steps=2")
    succeed(capsys, "export", tmp_path / "run", tmp_path / "out")
    assert_same_tensors(tmp_path / "out/model.safetensors", tmp_path / "run/model/model.safetensors")


def test_a_run_that_names_no_best_has_none_to_export(tmp_path: Path, capsys: Output) -> None:
    succeed(capsys, "sft", configuration(tmp_path, "sft"))
    said = mistake(capsys, "export", tmp_path / "run", tmp_path / "out", "--best")
    assert "does not say which of its checkpoints is the best" in said and "checkpoint.best" in said


@pytest.mark.parametrize(
    ("command", "overrides", "expected"),
    [
        ("train", [f"checkpoint.best={METRIC}", "data.eval=null"], ["never measured", "data.eval names no evaluation"]),
        ("train", ["checkpoint.best=val-core/carry/reward/mean@4"], ["did you mean 'val-core/SOURCE/reward/mean@1'?"]),
        ("train", ["checkpoint.best=critic/score/mean"], ["is not a metric of the evaluation"]),
        ("train", ["checkpoint.best=val-core/cary/reward/mean@1"], [f"did you mean '{METRIC}'?"]),
        ("sft", ["checkpoint.best=train/loss"], ["supervised fine-tuning measures nothing held out"]),
    ],
)
def test_a_metric_that_is_never_measured_is_refused_before_the_start(
    command: str, overrides: list[str], expected: list[str], tmp_path: Path, capsys: Output
) -> None:
    said = mistake(capsys, command, configuration(tmp_path, command), *overrides)
    assert [e for e in expected if e not in said] == [], said
    assert not (tmp_path / "run").exists()


def test_only_evaluated_steps_with_a_better_finite_value_are_the_best() -> None:
    section = CheckpointSection(best=METRIC)
    assert better(section, {METRIC: 0.9}, 0, None) is None  # what the run begins with is no checkpoint of it
    assert better(section, {"actor/loss": 1.0}, 3, None) is None
    assert better(section, {METRIC: float("nan")}, 3, None) is None
    assert better(section, {METRIC: 0.5}, 3, None) == (best := Best(3, METRIC, 0.5))
    assert better(section, {METRIC: 0.5}, 4, best) is None  # of equal ones the earlier
    assert better(CheckpointSection(best=METRIC, best_mode="min"), {METRIC: 0.4}, 4, best) == Best(4, METRIC, 0.4)
    lines = [{"step": 0, METRIC: 0.9}, {"step": 1, METRIC: 0.3}, {"step": 2}, {"step": 3, METRIC: 0.8}]
    assert best_of(section, lines, {1, 3}) == Best(3, METRIC, 0.8)
    assert best_of(section, lines, {1, 2}) == Best(1, METRIC, 0.3)  # the checkpoint of 3 is gone


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["step2:record", "step2:save", "step2:saved", "step3:update", "step5:finish"])
def test_a_killed_run_finds_the_same_best(fault: str, tmp_path: Path, capsys: Output) -> None:
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole, killed = (configuration(tmp_path / name) for name in ("whole", "killed"))
    succeed(capsys, "train", whole, *SETTINGS, "train.steps=5")
    arguments = ["train", killed, *SETTINGS, "train.steps=5"]
    assert commands.run(arguments, tmp_path, HYBRIDFLOW_FAULT=f"kill@{fault}").status == -signal.SIGKILL
    succeed(capsys, "train", killed, *SETTINGS, "train.steps=5")
    runs = [tmp_path / name / "run" for name in ("whole", "killed")]
    assert named(runs[0])["step"] == 2
    assert named(runs[0]) == named(runs[1]) and saved(runs[0]) == saved(runs[1]) == [2, 5]
    for file in ("model/model.safetensors", "checkpoints/step-000002/model/model.safetensors"):
        assert_same_tensors(*(run / file for run in runs))
