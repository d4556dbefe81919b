"""Runs in which a model acts: killed in any phase, slowed down or stopped, they end as one that was left alone."""

from __future__ import annotations

import functools
import json
import re
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from safetensors.torch import load_file

import acting
from hybridflow.checkpoint.journal import Journal
from hybridflow.protocols.groups import Group

import commands

ACTING = acting.__file__
TOOLS: dict[str, Any] = {"agent": {"tools": [f"{ACTING}:look", f"{ACTING}:Clock"], "max_turns": 4}}
STEPS: dict[str, Any] = {
    "agent": {"environment": f"{ACTING}:Hall", "tasks": 12, "eval_tasks": 2, "history": "steps", "window": 1},
    "data": {"train": None, "eval": None},
    "reward": {"function": "environment"},
    "algorithm": {"preset": "gigpo"},
}
GREEDY: dict[str, Any] = {
    "agent": {"environment": f"{ACTING}:Hall"},
    "algorithm": {"preset": "remax"},
    "filter": {"max_mean": 0.6, "max_rounds": 6},
}


def configuration(folder: Path, kind: dict[str, Any]) -> Path:
    values: dict[str, dict[str, Any]] = {
        "run": {"folder": str(folder / "run"), "seed": 3, "threads": 1, "device": "cpu"},
        "model": {"path": f"{ACTING}:model"},
        "data": {"train": f"{ACTING}:rows", "eval": f"{ACTING}:rows", "max_prompt_tokens": 64},
        "reward": {"function": f"{ACTING}:score"},
        "rollout": {"max_response_tokens": 24},
        "agent": {"max_turn_tokens": 4, "max_observation_tokens": 32},
        "train": {"steps": 2, "prompts_per_step": 3, "samples_per_prompt": 3},
        "optim": {"lr": 1e-3},
        "eval": {"max_rows": 2},
        "checkpoint": {"every": 1},
        "track": {"console": False},
    }
    for name, section in kind.items():
        values[name] = values.get(name, {}) | section
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def start(folder: Path, kind: dict[str, Any], diary: str, **environment: str) -> commands.Command:
    folder.mkdir(exist_ok=True)
    config = configuration(folder, kind)
    return commands.start(["train", str(config)], folder, DIARY=str(folder / diary), **environment)


def run(folder: Path, kind: dict[str, Any], diary: str, **environment: str) -> int:
    command = start(folder, kind, diary, **environment)
    try:
        status = command.wait(250)
    finally:
        command.kill()
    assert status in (0, -signal.SIGKILL), f"exit {status}\n{command.said}\n{command.complained}"
    return status


def assert_same_end(folder: Path, reference: Path) -> None:
    """Metrics, rollouts and weights are the same, bit for bit; but not times."""
    lines = [
        [
            {k: v for k, v in json.loads(line).items() if not k.startswith(("timing_s/", "perf/"))}
            for line in (f / "run/metrics.jsonl").read_text().splitlines()
        ]
        for f in (folder, reference)
    ]
    assert lines[0] == lines[1]
    for pattern in ("rollouts/*.parquet", "evaluations/*.parquet"):
        names = sorted(p.relative_to(reference) for p in (reference / "run").glob(pattern))
        assert names
        for name in names:
            assert pq.read_table(folder / name).equals(pq.read_table(reference / name)), name
    for file in ("checkpoints/step-000002/optimizer.safetensors", "model/model.safetensors"):
        ours, theirs = load_file(folder / "run" / file), load_file(reference / "run" / file)
        assert ours.keys() == theirs.keys()
        assert all(ours[n].equal(theirs[n]) for n in ours), file


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a run that nobody interrupts, made once."""

    @functools.cache
    def made(kind: str) -> Path:
        folder = tmp_path_factory.mktemp("reference")
        assert run(folder, globals()[kind], "diary.txt") == 0
        trained = pq.read_table(folder / "run/rollouts").to_pylist()
        assert max(len(r["turns"]) for r in trained) > 1 or max(r["sequence"] for r in trained) > 1
        return folder

    return made


def lines(path: Path, kind: str) -> Counter[str]:
    """How often each line of a kind stands in a diary."""
    return Counter(line for line in acting.diary(path) if line.startswith(f"{kind} "))


def called(groups: list[Group], kind: str) -> Counter[str]:
    """The lines that the tools wrote for the trajectories of groups."""
    found: Counter[str] = Counter()
    for message in (m for g in groups for t in g.trajectories for m in t.messages):
        for call in message.get("tool_calls") or []:
            function = call["function"]
            arguments = function["arguments"]
            number = (json.loads(arguments) if isinstance(arguments, str) else arguments)["number"]
            found[f"{function['name']} {number}"] += 1
    return Counter({line: n for line, n in found.items() if line.startswith(f"{kind} ")})


def answered(journal: Path, without: set[int]) -> Counter[str]:
    """The lines of calls of `look` whose answers were on disk, but for those of some draws."""
    found: Counter[str] = Counter()
    for path in journal.glob("calls-*.jsonl"):
        for line in path.read_text().splitlines():
            place, answer = json.loads(line.partition(" ")[2])
            number = re.search(r"(\d+) is", answer.get("text", ""))
            if number is not None and place[1] not in without and "it is" not in answer["text"]:
                found[f"look {number[1]}"] += 1
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        pytest.param("TOOLS", {"HYBRIDFLOW_FAULT": "kill@step1:group:1"}, id="in generation"),
        pytest.param("TOOLS", {"KILL": "look 9"}, id="in a call"),
        pytest.param("TOOLS", {"HYBRIDFLOW_FAULT": "kill@step1:call:30"}, id="between a call and its answer on disk"),
        pytest.param("TOOLS", {"HYBRIDFLOW_FAULT": "kill@step1:answered:3"}, id="behind an answer on disk"),
        pytest.param("TOOLS", {"KILL": "score 5"}, id="in scoring"),
        pytest.param("TOOLS", {"HYBRIDFLOW_FAULT": "kill@step1:save"}, id="in saving"),
        pytest.param("STEPS", {"KILL": "step 20"}, id="in step of an environment"),
        pytest.param("GREEDY", {"HYBRIDFLOW_FAULT": "kill@step1:group:4"}, id="in a further round, against greedy"),
    ],
)
def test_a_run_that_acts_ends_bit_identical_after_a_kill_and_makes_no_answered_call_again(
    kind: str, fault: dict[str, str], whole: Callable[[str], Path], tmp_path: Path
) -> None:
    reference, folder = whole(kind), tmp_path / "work"
    assert run(folder, globals()[kind], "first.txt", **fault) == -signal.SIGKILL
    groups = list(Journal(folder / "run/journal").read(1).values())
    assert not list((folder / "run/journal").glob("*2.jsonl")), "the fault is to befall the first step"
    kept = answered(folder / "run/journal", {g.draw for g in groups})
    assert run(folder, globals()[kind], "second.txt") == 0
    assert_same_end(folder, reference)
    # The first step was killed: the second process does all that the journal does not have. A tool without a state
    # is not called where its answer is on disk; others are called for all trajectories but those of journaled groups.
    everything, second = reference / "diary.txt", folder / "second.txt"
    assert lines(second, "look") == lines(everything, "look") - called(groups, "look") - kept
    assert lines(second, "tick") == lines(everything, "tick") - called(groups, "tick")
    turns = [len(s.turns) for g in groups for own in (*(t.sequences for t in g.trajectories), g.greedy) for s in own]
    assert lines(second, "step").total() == lines(everything, "step").total() - (sum(turns) if kind != "TOOLS" else 0)
    if "group" in fault.get("HYBRIDFLOW_FAULT", ""):
        assert groups
    if "answered" in fault.get("HYBRIDFLOW_FAULT", ""):
        assert kept


@pytest.mark.slow
def test_a_run_does_not_depend_on_how_long_tools_take(whole: Callable[[str], Path], tmp_path: Path) -> None:
    for kind in ("TOOLS", "STEPS"):
        assert run(tmp_path / kind, globals()[kind], "diary.txt", DELAYS="5") == 0
        assert_same_end(tmp_path / kind, whole(kind))


@pytest.mark.slow
def test_a_run_stops_in_order_while_a_tool_hangs_and_resumes(whole: Callable[[str], Path], tmp_path: Path) -> None:
    hanging = whole("TOOLS") and "look 30"  # in the second step
    command = start(tmp_path, TOOLS, "diary.txt", HANG=hanging)
    try:
        while len([line for line in acting.diary(tmp_path / "diary.txt") if line.startswith("look")]) < 30:
            assert command.poll() is None, command.complained
            time.sleep(0.02)
        began = time.monotonic()
        command.signal(signal.SIGINT)
        assert command.wait(60) == 130
    finally:
        command.kill()
    assert time.monotonic() - began < 20  # the call's own limit is 30 seconds
    assert "stopped after step 1; to resume" in command.said and "Traceback" not in command.complained
    assert run(tmp_path, TOOLS, "diary.txt") == 0
    assert_same_end(tmp_path, whole("TOOLS"))
