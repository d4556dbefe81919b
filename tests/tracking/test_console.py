"""The progress display: what it says, and how it leaves a terminal."""

import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hybridflow.tracking.console import ProgressConsole, duration, held_out

SCRIPT = """
import os, signal, sys, time
from hybridflow.tracking.console import ProgressConsole
progress = ProgressConsole("train", 9)
for step in range(4):
    progress.log(step, {"critic/score/mean": 0.25 * step})
    time.sleep(0.05)
print("a line of the program")
time.sleep(0.3)
"""


def test_plain_lines_name_the_numbers_that_matter(capsys: pytest.CaptureFixture[str]):
    progress = ProgressConsole("train", 40)
    progress.log(0, {"val-core/carry/reward/mean@1": 0.335})
    progress.log(
        40,
        {"critic/score/mean": 0.9375, "actor/pg_loss": 0.0125, "response_length/mean": 29.4, "perf/throughput": 5300},
    )
    progress.close()
    first, last = capsys.readouterr().out.splitlines()
    assert first.split("  ") == ["train 0/40", "held-out 0.335 (at 0)"]
    for part in ("train 40/40", "reward 0.938", "held-out 0.335 (at 0)", "loss 0.0125", "length 29", "tokens/s 5,300"):
        assert part in last.split("  ")


def test_a_supervised_run_shows_its_loss(capsys: pytest.CaptureFixture[str]):
    ProgressConsole("sft", 500).log(1, {"train/loss": 2.5, "train/lr": 1e-3})
    assert capsys.readouterr().out.strip().split("  ")[:2] == ["sft 1/500", "loss 2.5000"]


@pytest.mark.parametrize("loss", [0.0, -0.0, -3e-9, 4.9e-5])
def test_a_policy_loss_that_is_nothing_is_left_out_and_what_tells_of_learning_is_there(
    loss: float, capsys: pytest.CaptureFixture[str]
):
    progress = ProgressConsole("train", 3)
    measured = {"actor/entropy": 1.25, "actor/grad_norm": 0.125, "actor/kl_loss": 0.0625}
    progress.log(1, {"actor/pg_loss": 0.5} | measured)
    progress.log(2, {"actor/pg_loss": loss} | measured)
    progress.log(3, {"critic/score/mean": 0.0})  # nothing to learn from, no update
    first, second, third = (line.split("  ") for line in capsys.readouterr().out.splitlines())
    assert third[:2] == ["train 3/3", "reward 0.000"] and not any(part.startswith("gradient") for part in third)
    assert "loss 0.5000" in first and not any(part.startswith("loss") for part in second)
    assert {"KL 0.0625", "entropy 1.250", "gradient 0.125"} <= set(second)


@pytest.mark.parametrize(("total", "every"), [(1, 1), (40, 1), (500, 1), (501, 2), (5000, 10)])
def test_a_log_file_has_every_step_or_says_which_it_has(total: int, every: int, capsys: pytest.CaptureFixture[str]):
    progress = ProgressConsole("sft", total)
    for step in range(1, total + 1):
        progress.log(step, {"train/loss": 1.0} | ({"val-core/a/reward/mean@1": 0.5} if step == 77 else {}))
    progress.close()
    lines = capsys.readouterr().out.splitlines()
    if every > 1:
        assert f"a line for every {every} steps, or second; metrics.jsonl has every step" in lines
    steps = [int(line.split()[1].partition("/")[0]) for line in lines if line.startswith("sft ")]
    assert set(range(every, total + 1, every)) | {77, total} - set(range(total + 1, 78)) <= set(steps)
    assert len(steps) == len(set(steps)) < 510


def test_the_last_step_of_a_run_that_stops_early_has_its_line(capsys: pytest.CaptureFixture[str]):
    progress = ProgressConsole("sft", 5000)
    for step in (1, 2):
        progress.log(step, {"train/loss": 1.0})
    progress.close()
    progress.close()
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()[1:]] == ["1/5000", "2/5000"]


def test_a_reward_model_shows_its_accuracies(capsys: pytest.CaptureFixture[str]):
    ProgressConsole("reward-model", 9).log(1, {"train/loss": 0.5, "train/accuracy": 0.75, "val/accuracy": 0.5})
    assert {"held-out 0.500 (at 1)", "accuracy 0.750"} <= set(capsys.readouterr().out.strip().split("  "))


def test_a_loss_that_is_not_finite_is_seen(capsys: pytest.CaptureFixture[str]):
    ProgressConsole("train", 3).log(3, {"actor/pg_loss": float("nan")})
    assert "loss nan" in capsys.readouterr().out


@pytest.mark.parametrize(
    "end",
    [
        "raise RuntimeError('boom')",
        "signal.raise_signal(signal.SIGINT)",
        "os.kill(os.getpid(), signal.SIGKILL)",
        "progress.close()",
    ],
    ids=["exception", "ctrl-c", "kill -9", "end"],
)
def test_on_a_terminal_the_cursor_is_visible_however_the_process_ends(end: str):
    output = on_a_terminal(SCRIPT + end)
    assert "3/9" in output and "reward" in output  # the live display was there
    assert "a line of the program" in output
    assert output.rfind("\x1b[?25h") > output.rfind("\x1b[?25l") >= 0
    if "SIGKILL" not in end:  # the next prompt has a line of its own
        assert re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output).endswith("\n")
    if "boom" in end:
        assert "RuntimeError: boom" in output


def on_a_terminal(script: str) -> str:
    """Runs a script on a pseudo-terminal; everything that it wrote there."""
    parent, child = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"}
    process = subprocess.Popen([sys.executable, "-c", script], stdout=child, stderr=child, env=environment)
    os.close(child)
    output = b""
    while True:
        try:
            part = os.read(parent, 65536)
        except OSError:  # Linux: the other side is closed
            break
        if not part:
            break
        output += part
    os.close(parent)
    process.wait(timeout=30)
    return output.decode(errors="replace")


def test_held_out_reward_is_found_by_source_and_nothing_else():
    metrics = {
        "val-core/openai/gsm8k/reward/mean@1": 0.5,
        "val-core/carry/acc/mean@4": 0.25,
        "val-core/carry/acc/best@4/mean": 0.9,
        "val-aux/carry/reward/mean@1": 0.1,
        "critic/score/mean": 0.2,
    }
    assert held_out(metrics) == {"openai/gsm8k": 0.5, "carry": 0.25}


def test_durations_are_readable():
    assert [duration(s) for s in (0.4, 59, 185, 3599.7, 7800)] == ["0 s", "59 s", "3:05 min", "1:00 h", "2:10 h"]


def test_a_closed_pipe_does_not_stop_the_training(tmp_path: Path):
    script = f"""
from pathlib import Path
from hybridflow.config.sections.run import TrackSection
from hybridflow.tracking.trackers import Trackers
trackers = Trackers(Path({str(tmp_path)!r}), TrackSection(), resolved_config={{}}, total_steps=50, title="train")
for step in range(51):
    trackers.log(step, {{"val-core/carry/reward/mean@1": 0.5}})
    if step == 0:
        input()
trackers.close()
Path({str(tmp_path / "finished")!r}).touch()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdin and process.stdout and process.stderr
    assert process.stdout.readline().startswith("train 0/50")
    process.stdout.close()  # as `| head -1` does
    process.stdin.write("\n")
    process.stdin.flush()
    errors = process.stderr.read()
    process.wait(timeout=30)
    assert (tmp_path / "finished").exists(), errors
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 51
    events = (tmp_path / "events.jsonl").read_text().splitlines()
    assert len(events) == 1 and "console" in events[0] and "BrokenPipeError" in events[0]
    assert errors.count("warning: console") == 1


def test_the_time_left_comes_from_the_pace_of_this_process(capsys: pytest.CaptureFixture[str]):
    now = time.monotonic()
    resumed = ProgressConsole("train", 40, done_steps=30, began=now - 50)
    resumed.log(31, {"val-core/carry/reward/mean@1": 0.5})  # 50 s for one step, nine to go
    assert "7:30 min left" in capsys.readouterr().out
    fresh = ProgressConsole("train", 40, began=now - 50)
    fresh.log(0, {"val-core/carry/reward/mean@1": 0.5})  # the evaluation before training says nothing about steps
    assert "left" not in capsys.readouterr().out
