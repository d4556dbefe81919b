"""Trackers besides metrics.jsonl: they work, and when one does not, training goes on."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hybridflow.config.sections.run import TrackSection
from hybridflow.tracking.events import read_events
from hybridflow.tracking.jsonl import read_metrics
from hybridflow.tracking.trackers import Trackers


def make(folder: Path, **which: bool) -> Trackers:
    config = TrackSection.model_validate({"console": False, **which})
    return Trackers(folder, config, resolved_config={"optim": {"lr": 1e-4}}, total_steps=6, title="train")


def reward(step: int) -> dict[str, float]:
    return {"critic/score/mean": step / 16}


def assert_off_with_one_warning(folder: Path, name: str, stderr: str, *said: str) -> None:
    warnings = [e["text"] for e in read_events(folder / "events.jsonl") if e["kind"] == "warning"]
    assert len(warnings) == 1 and warnings[0].startswith(f"{name}: ")
    assert stderr.count("warning:") == 1
    for words in said:
        assert words in warnings[0] and words in stderr


# --- TensorBoard ---


def scalars(folder: Path) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(e.step, e.value) for e in events.Scalars("critic/score/mean")]


def test_tensorboard_reads_back(tmp_path: Path):
    with make(tmp_path, tensorboard=True) as trackers:
        for step in range(4):
            trackers.log(step, reward(step))
    assert scalars(tmp_path) == [(step, step / 16) for step in range(4)]


def test_tensorboard_of_a_resumed_run_is_one_curve(tmp_path: Path):
    killed = make(tmp_path, tensorboard=True)
    for step in range(6):
        killed.log(step, reward(step))  # and no close
    with make(tmp_path, tensorboard=True) as resumed:
        resumed.metrics.truncate_after(3)
        resumed.start(done_steps=3)
        for step in (4, 5, 6):
            resumed.log(step, {"critic/score/mean": 0.5 + step / 16})
    assert [step for step, _ in scalars(tmp_path)] == [0, 1, 2, 3, 4, 5, 6]
    assert dict(scalars(tmp_path))[4] == 0.75
    assert [m["step"] for m in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3, 4, 5, 6]
    killed.close()


def test_an_unwritable_tensorboard_folder_leaves_training_going(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    with make(tmp_path, tensorboard=True) as trackers:
        for step in range(5):
            trackers.log(step, reward(step))
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 5
    assert_off_with_one_warning(tmp_path, "tensorboard", capsys.readouterr().err, "FileExistsError")


@pytest.mark.parametrize(("name", "package"), [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")])
def test_a_missing_package_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, package: str
):
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with make(tmp_path, **{name: True}) as trackers:
        for step in range(3):
            trackers.log(step, reward(step))
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3
    assert_off_with_one_warning(tmp_path, name, capsys.readouterr().err, f"pip install 'hybridflow[{name}]'")


# --- Weights & Biases ---


@pytest.fixture
def wandb_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    import wandb

    wandb.teardown()  # it reads its environment once per process
    for name in ("WANDB_API_KEY", "WANDB_RUN_ID", "WANDB_DIR", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))
    yield monkeypatch
    wandb.teardown()


WANDB_SCRIPT = """
import sys
from pathlib import Path
from hybridflow.config.sections.run import TrackSection
from hybridflow.tracking.trackers import Trackers
folder, first, end = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
config = TrackSection(console=False, wandb=True)
with Trackers(folder, config, resolved_config={"optim": {"lr": 0.0123}}, total_steps=6, title="train") as trackers:
    for step in range(first, end):
        trackers.log(step, {"critic/score/mean": step / 16})
"""


def test_wandb_offline_writes_a_run_and_a_resumed_run_continues_its_id(tmp_path: Path):
    for first, end in ((0, 3), (3, 6)):  # a process each, as a run and its resumption are
        command = [sys.executable, "-c", WANDB_SCRIPT, str(tmp_path), str(first), str(end)]
        subprocess.run(command, env={**os.environ, "WANDB_MODE": "offline"}, check=True, timeout=60)
    assert [e["kind"] for e in read_events(tmp_path / "events.jsonl")] == ["wandb", "wandb"]
    run_id = (tmp_path / "wandb-id.txt").read_text().strip()
    files = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert [file.name for file in files] == [f"run-{run_id}.wandb"] * 2
    first_part, second_part = (file.read_bytes() for file in files)
    assert b"0.0123" in first_part  # the configuration
    for step in range(1, 6):
        assert str(step / 16).encode() in (first_part if step < 3 else second_part)


@pytest.mark.parametrize(("mode", "said"), [("nonsense", "WANDB_MODE|mode"), ("online", "API key|log in|login")])
def test_a_wandb_that_cannot_start_leaves_training_going(
    tmp_path: Path, wandb_environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], mode: str, said: str
):
    wandb_environment.setenv("WANDB_MODE", mode)
    with make(tmp_path, wandb=True) as trackers:
        for step in range(4):
            trackers.log(step, reward(step))
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 4
    stderr = capsys.readouterr().err
    assert_off_with_one_warning(tmp_path, "wandb", stderr)
    assert any(words in stderr for words in said.split("|"))


# --- the record itself ---


def test_a_metrics_file_that_cannot_be_written_stops_the_run(tmp_path: Path):
    (tmp_path / "metrics.jsonl").mkdir()
    with make(tmp_path, tensorboard=True) as trackers, pytest.raises(IsADirectoryError):
        trackers.log(1, reward(1))


def test_closing_twice_is_fine(tmp_path: Path):
    trackers = make(tmp_path, tensorboard=True)
    trackers.log(1, reward(1))
    trackers.close()
    trackers.close(failed=True)
    assert not (tmp_path / "events.jsonl").exists()


def test_advice_is_an_event_and_a_line_for_whoever_watches(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with make(tmp_path, console=True) as trackers:
        trackers.start()
        trackers.advise("raise the limit")
    with make(tmp_path) as silent:
        silent.advise("again")
    assert [(e["kind"], e["text"]) for e in read_events(tmp_path / "events.jsonl")] == [
        ("advice", "raise the limit"), ("advice", "again")
    ]  # fmt: skip
    printed = capsys.readouterr()
    assert printed.out == "advice: raise the limit\n" and printed.err == ""
