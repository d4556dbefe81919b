"""A run whose processes fail: one report says what failed first, nothing is left, and the same command goes on."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hybridflow.cli.main import main

import commands
from runs import assert_same_tensors, configuration

pytestmark = pytest.mark.slow

SECTIONS: dict[str, Any] = {
    "algorithm": {"preset": "ppo", "kl_loss_coef": 0.1},
    "critic": {"optim": {"lr": 3e-3}},
    "train": {"steps": 3, "prompts_per_step": 4, "samples_per_prompt": 2, "sequences_per_update": 4},
    "checkpoint": {"every": 1},
    "eval": {"before_training": False},
    "engine": {"strategy": "fsdp2"},
    "placement": {"pools": {"all": 2}, "timeout": 20},
}
PHASES = {
    "rollout": ["advance", "take_weights"],
    "actor": ["score", "update", "save"],
    "reference": ["score"],
    "critic": ["score", "update"],
}


def start(folder: Path, fault: str) -> commands.Command:
    """A run that ends; every process that it starts has the folder in its environment."""
    marks = {"HYBRIDFLOW_FAULT": fault, "HYBRIDFLOW_TEST_FOLDER": str(folder)}
    return commands.run(["train", configuration(folder, **SECTIONS)], folder, 120, **marks)


def left_behind(folder: Path) -> list[str]:
    """Command lines of processes that work in or for this folder, and have not ended within 20 seconds."""
    until = time.monotonic() + 20
    while found := list(working_for(folder)):
        if time.monotonic() > until:
            return found
        time.sleep(0.1)
    return []


def working_for(folder: Path) -> Iterator[str]:
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            environment, line = (entry / "environ").read_bytes(), (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if str(folder).encode() in environment + line:
            yield line.replace(b"\0", b" ").decode()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert main(["train", configuration(folder, **SECTIONS)]) == 0
    return folder / "run"


@pytest.mark.parametrize(("role", "method"), [(role, method) for role in PHASES for method in PHASES[role]])
def test_a_killed_process_is_named_and_the_run_goes_on(
    role: str, method: str, uninterrupted: Path, tmp_path: Path
) -> None:
    failed = start(tmp_path, f"kill:{role}.1@step2:{method}")
    assert time.time() - (tmp_path / "run/metrics.jsonl").stat().st_mtime < 60  # since the first step was done
    assert failed.status == 1 and "Traceback" not in failed.complained
    report = failed.complained[failed.complained.index("error: ") :]
    for part in (
        f"{role}.1",
        "killed by signal 9",
        f"phase: {method} of step 2",
        "memory then",
        "rows in hand",
        "fix:",
    ):
        assert part in report, report
    assert report.count("error: ") == 1
    events = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    assert any(e["kind"] == "failure" and "killed by signal 9" in e["text"] for e in events)
    assert left_behind(tmp_path) == []
    assert main(["train", configuration(tmp_path, **SECTIONS)]) == 0
    assert_same_tensors(tmp_path / "run/model/model.safetensors", uninterrupted / "model/model.safetensors")


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("raise:critic.1@step2:update", ["critic.1", "phase: update of step 2", "HYBRIDFLOW_FAULT"]),
        ("sleep:actor.1@step2:update", ["actor.1", "phase: update of step 2", "placement.timeout"]),
        ("drop-row:actor.1@step2:update", ["rank 1", "sequences were lost or added", "phase: update of step 2"]),
        ("oom:actor.0@step2:update", ["actor.0", "memory", "tokens_per_microbatch"]),
    ],
)
def test_the_first_cause_is_told(fault: str, said: list[str], tmp_path: Path) -> None:
    failed = start(tmp_path, fault)
    report = failed.complained[failed.complained.index("error: ") :]
    assert failed.status == 1 and "Traceback" not in failed.complained
    for part in said:
        assert part in report, report
    assert left_behind(tmp_path) == []


def test_a_killed_controller_leaves_no_worker(tmp_path: Path) -> None:
    assert start(tmp_path, "kill@step2:update").status == -9
    assert left_behind(tmp_path) == []


def test_two_runs_at_once(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    both = [
        commands.start(["train", configuration(tmp_path / name, **SECTIONS)], tmp_path / name)
        for name in ("one", "two")
    ]
    for command in both:
        assert command.wait(120) == 0, command.complained
    assert_same_tensors(*(tmp_path / name / "run/model/model.safetensors" for name in ("one", "two")))
