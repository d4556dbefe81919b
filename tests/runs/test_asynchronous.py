"""Checkpoints that are written while the next step runs: the same as others, and as safe."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from hybridflow.checkpoint.store import read_checkpoint, saved_steps, step_folder
from hybridflow.cli.main import main
from hybridflow.tracking.events import read_events

import commands
from runs import configuration, metrics, mistake, succeed

Output = pytest.CaptureFixture[str]
ASYNCHRONOUS = "checkpoint.asynchronous=true"


def measured(folder: Path) -> list[dict[str, object]]:
    lines = metrics(folder / "run")
    return [{k: v for k, v in m.items() if not k.startswith(("timing_s", "perf"))} for m in lines]


def files(checkpoint: Path) -> dict[str, bytes]:
    return {str(p.relative_to(checkpoint)): p.read_bytes() for p in checkpoint.rglob("*") if p.is_file()}


@pytest.mark.parametrize("command", ["train", "sft"])
def test_they_are_the_same_files_and_the_newest_are_kept(command: str, tmp_path: Path, capsys: Output) -> None:
    sections = {"critic": {"optim": {"lr": 1e-3}}, "algorithm": {"preset": "ppo"}} if command == "train" else {}
    ends = []
    for asynchronous in ("false", "true"):
        folder = tmp_path / asynchronous
        folder.mkdir()
        config = configuration(folder, command, train={"steps": 4}, **sections)  # type: ignore[arg-type]
        succeed(capsys, command, config, "checkpoint.every=1", f"checkpoint.asynchronous={asynchronous}")
        checkpoints = folder / "run/checkpoints"
        assert saved_steps(checkpoints) == [3, 4]
        assert sorted(p.name for p in checkpoints.iterdir()) == ["step-000003", "step-000004"]
        assert list((folder / "run").glob("journal/*")) == (
            [folder / "run/journal/step-000004.jsonl"] if command == "train" else []
        )
        for step in (3, 4):
            read_checkpoint(step_folder(checkpoints, step))
        ends.append(([files(step_folder(checkpoints, step)) for step in (3, 4)], measured(folder)))
    assert ends[0] == ends[1]


def test_an_error_of_the_disk_is_told_and_what_was_saved_before_stands(tmp_path: Path, capsys: Output) -> None:
    config, checkpoints = configuration(tmp_path, "sft", train={"steps": 2}), tmp_path / "run/checkpoints"
    succeed(capsys, "sft", config, "checkpoint.every=1")
    checkpoints.joinpath(".partial-step-000003").write_text("in the way of the folder")
    said = mistake(capsys, "sft", config, "train.steps=4", "checkpoint.every=1", ASYNCHRONOUS)
    assert "the checkpoint of step 3 could not be saved" in said and "the checkpoint of step 2 still stands" in said
    assert saved_steps(checkpoints) == [1, 2]


def test_a_run_that_fails_keeps_the_checkpoint_that_was_on_its_way(tmp_path: Path, capsys: Output) -> None:
    config = configuration(tmp_path, train={"steps": 4})
    # The check scores a row of each data set; then every step has four answers.
    source = (tmp_path / "reward.py").read_text().replace("def score", "calls = [0]\ndef score")
    source = source.replace("    return", "    calls[0] += 1\n    assert calls[0] < 4 + 2 + 3 * 4\n    return")
    (tmp_path / "reward.py").write_text(source)
    assert main(["train", config, "checkpoint.every=1", "eval.before_training=false", ASYNCHRONOUS]) != 0
    steps = saved_steps(tmp_path / "run/checkpoints")
    assert steps and steps[-1] == metrics(tmp_path / "run")[-1]["step"]
    assert read_events(tmp_path / "run/events.jsonl")[-1]["kind"] == "failed"


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "sft"])
def test_a_run_killed_while_a_checkpoint_is_written_ends_bit_identical(
    command: str, tmp_path: Path, capsys: Output
) -> None:
    folders = [tmp_path / "whole", tmp_path / "killed"]
    for folder in folders:
        folder.mkdir()
    configs = [configuration(folder, command, train={"steps": 4}) for folder in folders]
    arguments = ["checkpoint.every=1", ASYNCHRONOUS]
    succeed(capsys, command, configs[0], *arguments)
    killed = commands.run([command, configs[1], *arguments], folders[1], HYBRIDFLOW_FAULT="kill@step3:save")
    assert killed.status == -signal.SIGKILL, killed.complained
    checkpoints = folders[1] / "run/checkpoints"
    assert saved_steps(checkpoints) == [1, 2] and (checkpoints / ".partial-step-000003").is_dir()
    assert metrics(folders[1] / "run")[-1]["step"] >= 3, "the step had gone on while its checkpoint was written"
    succeed(capsys, command, configs[1], *arguments)
    assert measured(folders[0]) == measured(folders[1])
    ends = [f / "run/checkpoints/step-000004" for f in folders]
    assert files(ends[0]) == files(ends[1])
