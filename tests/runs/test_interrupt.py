"""Stopping in order: Ctrl-C, SIGTERM, a wall-clock limit; and a disk that fills up."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hybridflow.checkpoint.store import saved_steps
from hybridflow.cli.main import main
from hybridflow.tracking.events import read_events

import commands
from runs import assert_same_tensors, configuration, metrics, succeed

Output = pytest.CaptureFixture[str]
STEPS = 5
# A reward that takes its time: `pause` is an expression of seconds, in which `calls` counts the answers scored.
SLOW_REWARD = """
import time
from pathlib import Path
begun = Path(__file__).parent / "run/metrics.jsonl"
calls = 0
def score(response, ground_truth):
    global calls
    calls += 1
    time.sleep({pause})
    return sum(map(ord, response)) % 101 / 101
"""


def slow_configuration(folder: Path, command: str, pause: str) -> str:
    if command == "sft":  # no reward to slow down: many steps, each a large batch
        return configuration(folder, "sft", train={"steps": 400, "sequences_per_update": 64, "stop_below_loss": 1e-9})
    (folder / "slow.py").write_text(SLOW_REWARD.format(pause=pause))
    reward, data = {"function": str(folder / "slow.py:score")}, {"eval": None}
    return configuration(folder, reward=reward, data=data, train={"steps": STEPS})


def lines(run: Path) -> int:
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


PLACED = ["placement.pools={all: 2}", "engine.strategy=fsdp2"]


@pytest.mark.parametrize(
    ("command", "number", "word", "more"),
    [
        ("train", signal.SIGINT, "Ctrl-C", []),
        pytest.param("train", signal.SIGTERM, "SIGTERM", PLACED, marks=pytest.mark.slow),
        ("sft", signal.SIGTERM, "SIGTERM", []),
    ],
)
def test_a_signal_stops_a_run_in_order_and_the_same_command_goes_on(
    command: str, number: signal.Signals, word: str, more: list[str], tmp_path: Path, capsys: Output
) -> None:
    config, run = slow_configuration(tmp_path, command, "0.1"), tmp_path / "run"
    arguments = [command, config, "optim.betas=[0.9, 0.95]", *more]
    command_line = commands.start(arguments, tmp_path)
    try:
        while lines(run) < 3 and command_line.poll() is None:
            time.sleep(0.02)
        command_line.signal(number)
        status = command_line.wait(60)
    finally:
        command_line.kill()
    said, complained = command_line.said, command_line.complained
    assert status == 130, complained
    assert "stopping: saving a checkpoint first (once more to end at once)" in complained
    step = metrics(run)[-1]["step"]
    assert saved_steps(run / "checkpoints")[-1] == step >= 2
    assert f"stopped after step {step}; to resume: hybridflow {shlex.join(arguments)}" in said
    assert not (run / "model").exists()
    events = [e for e in read_events(run / "events.jsonl") if e["kind"] not in ("advice", "warning", "weights")]
    assert [e["kind"] for e in events] == ["stopped"]
    assert events[0]["text"].endswith(f": {word}")

    slow_configuration(tmp_path, command, "0")
    end = STEPS if command == "train" else step + 2
    succeed(capsys, *arguments, f"train.steps={end}")
    assert [m["step"] for m in metrics(run)] == list(range(command == "sft", end + 1))
    assert (run / "model/model.safetensors").is_file()


def test_a_stopped_run_ends_as_one_that_was_not(tmp_path: Path, capsys: Output) -> None:
    ends = []
    # The second process makes a step (calls up to 4 of its reward process), and is stopped in those after it.
    for limits in (["run.max_minutes=1e-9", "run.max_minutes=0.02", "run.max_minutes=null"], []):
        folder = tmp_path / f"with-{len(limits)}-limits"
        folder.mkdir()
        config = slow_configuration(folder, "train", "0.35 * (5 <= calls <= 8)" if limits else "0")
        for limit in limits[:-1]:
            assert main(["train", config, limit]) == 130
            said = capsys.readouterr().out
            stopped = read_events(folder / "run/events.jsonl")[-1]
            assert stopped["kind"] == "stopped"
            assert "minutes (run.max_minutes) was reached" in stopped["text"]
            assert f"to resume: hybridflow train {config} {limit}" in said
        ends.append(folder / "run")
        if limits:
            assert 0 < metrics(ends[0])[-1]["step"] < STEPS
        succeed(capsys, "train", config, *limits[-1:])
    assert_same_tensors(*(e / "model/model.safetensors" for e in ends))


def test_two_signals_end_at_once(tmp_path: Path) -> None:
    config, run = slow_configuration(tmp_path, "train", "3 * begun.exists()"), tmp_path / "run"
    # Its words are read from a pipe, as they come: the second signal must be there before the checkpoint is saved.
    process = subprocess.Popen([sys.executable, "-m", "hybridflow", "train", config], stderr=subprocess.PIPE, text=True)
    try:
        while lines(run) < 1 and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        while "once more to end at once" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        complained = process.communicate(timeout=30)[1]
    finally:
        process.kill()
    assert process.returncode == 130
    assert complained.endswith("interrupted\n") and "Traceback" not in complained
    assert saved_steps(run / "checkpoints") == []


# A disk of a few megabytes if this machine lets us mount one, else a limit on the size of a file.
DISK = """
import os, resource, subprocess, sys
from pathlib import Path
from hybridflow.cli.main import main

kind, folder, config = sys.argv[1], Path(sys.argv[2]), sys.argv[3]

def mount(options):
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], check=True)

def full(yes):
    if kind == "tmpfs":
        free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
        if yes:
            (folder / "ballast").write_bytes(b"0" * (free - 2_000_000))
        else:
            (folder / "ballast").unlink()
    else:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000 if yes else hard, hard))

if kind == "tmpfs":
    mount("size=60m")
statuses = [main(["train", config, "train.steps=1"])]
full(True)
statuses.append(main(["train", config, "train.steps=2", "run.resume=auto"]))
left = sorted(p.name for p in (folder / "checkpoints").iterdir())
statuses.append(main(["export", str(folder), str(folder / "exported")]))
full(False)
statuses.append(main(["train", config, "train.steps=2"]))
print("SUMMARY", statuses, left, sorted(p.name for p in folder.iterdir() if "export" in p.name))
"""


def can_mount() -> bool:
    if not shutil.which("unshare") or not shutil.which("mount"):
        return False
    probe = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"]
    return subprocess.run(probe, capture_output=True).returncode == 0


def test_a_full_disk_leaves_the_checkpoint_before_and_the_run_goes_on_once_there_is_room(tmp_path: Path) -> None:
    config = configuration(tmp_path, data={"eval": None})
    (tmp_path / "run").mkdir()
    (tmp_path / "disk.py").write_text(DISK)
    kind = "tmpfs" if can_mount() else "limit"
    enter = ["unshare", "-rm"] if kind == "tmpfs" else []
    done = subprocess.run(
        [*enter, sys.executable, tmp_path / "disk.py", kind, tmp_path / "run", config],
        capture_output=True,
        text=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert "SUMMARY [0, 1, 1, 0] ['step-000001'] []" in done.stdout, done.stdout + done.stderr
    cause = "No space left on device" if kind == "tmpfs" else "File too large"
    said = done.stderr.partition("error: ")[2]
    assert said.startswith("the checkpoint of step 2 could not be saved: ") and cause in said
    assert "why: the checkpoint of step 1 still stands" in said
    assert f"fix: make room on the disk of {tmp_path / 'run/checkpoints'} and run the same command again" in said
    assert f"the model could not be written to {tmp_path / 'run/exported'}: " in said
