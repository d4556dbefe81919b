"""Rewards that fail, hang, are slow or are killed while a run trains: exactly what the policy names changes."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hybridflow.config.load import load_config
from hybridflow.tracking.events import read_events
from hybridflow.tracking.rollouts import read_rollouts
from hybridflow.trainers.rl.loop import estimate, next_groups, train
from hybridflow.trainers.rl.run import RlRun, open_run

from runs import assert_same_tensors, configuration, metrics, mistake, succeed

# What an answer is worth, and which answers are trouble, follow from the answer alone.
REWARD = """
import os, time

def worth(response):
    return sum(map(ord, response)) % 101 / 101

def trouble(response):
    return len(response) % 4 if sum(map(ord, response)) % 5 == 0 else None

def clean(response):
    return worth(response)

def replaced(response):
    return worth(response) if trouble(response) is None else 0.25

def broken(response):
    kind = trouble(response)
    if kind == 0:
        raise ValueError("cannot read this")
    if kind == 1:
        return float("nan")
    if kind == 2:
        return [1.0, 2.0]
    if kind == 3:
        time.sleep(60)
    return worth(response)
"""
PLACE: dict[str, Any] = {}
exec(REWARD, PLACE)


def file_of(folder: Path, function: str, **sections: dict[str, Any]) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "trouble.py").write_text(REWARD)
    reward = {"function": f"{folder}/trouble.py:{function}"} | sections.pop("reward", {})
    train = {"steps": 3, "prompts_per_step": 4, "samples_per_prompt": 4, "sequences_per_update": 8}
    sections = {"train": train, "data": {"eval": None}, "rollout": {"max_response_tokens": 6}} | sections
    return configuration(folder, reward=reward, **sections)


def steps(folder: Path) -> list[dict[str, Any]]:
    return [line for line in metrics(folder / "run") if line["step"]]


def opened(folder: Path, function: str, **sections: dict[str, Any]) -> RlRun:
    return open_run(load_config(file_of(folder, function, **sections)))


def test_value_changes_the_failed_answers_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy = {"on_failure": "value", "failure_value": 0.25, "pool": {"timeout": 1}}
    succeed(capsys, "train", file_of(tmp_path / "a", "broken", reward=policy))
    succeed(capsys, "train", file_of(tmp_path / "b", "replaced"))
    assert_same_tensors(*(tmp_path / name / "run/model/model.safetensors" for name in "ab"))
    for line in steps(tmp_path / "a"):
        answers = read_rollouts(tmp_path / f"a/run/rollouts/step-{line['step']:06d}.parquet")
        kinds = [PLACE["trouble"](a["response"]) for a in answers]
        assert line["reward/failures"] == sum(kind is not None for kind in kinds)
        for name, expected in [("raised", {0}), ("nonsense", {1, 2}), ("timeout", {3})]:
            assert line.get(f"reward/failures/{name}", 0) == sum(kind in expected for kind in kinds)
    assert sum(line["reward/failures"] for line in steps(tmp_path / "a")) > 3
    assert all(line["reward/failures"] == 0 for line in steps(tmp_path / "b"))


def test_mask_leaves_out_the_failed_answers_and_nothing_else(tmp_path: Path) -> None:
    policy = {"on_failure": "mask", "pool": {"timeout": 1}}
    with opened(tmp_path / "a", "broken", reward=policy) as run, opened(tmp_path / "b", "clean") as whole:
        (groups, _), (same, _) = next_groups(run, 1), next_groups(whole, 1)
        batch, _ = estimate(run, groups)
        for group, other in zip(groups, same, strict=True):
            for t, o in zip(group.trajectories, other.trajectories, strict=True):
                assert (t.failure is not None) == (PLACE["trouble"](t.response) is not None)
                assert t.token_ids == o.token_ids and (t.failure is not None or t.reward == o.reward)
        left = {g.draw: [t for t in g.trajectories if t.failure is None] for g in groups}
        learned = [(draw, t) for draw, ts in left.items() if len(ts) > 1 for t in ts]
        assert [(d, t.sample) for d, t in learned] == list(zip(batch["group_B"].tolist(), batch["sample_B"].tolist()))
        assert 0 < len(learned) < 16
        for i, (draw, t) in enumerate(learned):
            reward = torch.tensor([other.reward for other in left[draw]])
            expected = (t.reward - reward.mean()) / (reward.std() + 1e-6)
            own_T = batch.rows("advantage_T")[i][batch.rows("loss_mask_T")[i]]
            torch.testing.assert_close(own_T, expected.expand(len(own_T)), atol=1e-4, rtol=1e-4)


STRANGE = """
def score(response, ground_truth):
    kind = sum(map(ord, response)) % 8
    if response != ground_truth and kind < 6:
        return [3e38, 1e300, float("inf"), float("nan"), {"score": 1.0, "acc": 1e39}, None][kind]
    if response != ground_truth and kind == 6:
        return {}[response]  # not there
    return len(response) / 8
"""


@pytest.mark.parametrize("policy", ["mask", "value"])
def test_a_run_whose_rewards_fail_ends_with_its_report_and_says_where_they_did(
    policy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "strange.py"
    file.write_text(STRANGE)
    train = {"steps": 2, "prompts_per_step": 8}
    reward = {"function": f"{file}:score", "on_failure": policy}
    path = configuration(tmp_path, train=train, reward=reward, data={"eval": None})
    succeed(capsys, "train", path)
    lines = steps(tmp_path)
    assert sum(line["reward/failures/raised"] for line in lines) > 0
    assert sum(line["reward/failures/nonsense"] for line in lines) > 0
    assert all(torch.isfinite(t).all() for t in load_file(tmp_path / "run/model/model.safetensors").values())
    assert (tmp_path / "run/report.html").is_file()
    told = [e["text"] for e in read_events(tmp_path / "run/events.jsonl") if e["kind"] == "advice"]
    told = [text for text in told if "the reward" in text and "on_failure" in text]
    assert len(told) == 2, told  # each kind of failure once
    (raised,) = [text for text in told if "raised" in text]
    assert "raised KeyError: " in raised and f"({file}, line 7, in score: return {{}}[response]" in raised
    assert raised.endswith(f"reward.on_failure is {policy}") and "of the training data" in raised


@pytest.mark.parametrize("policy", ["mask", "fail"])
def test_the_first_failing_call_names_the_line_and_the_key_only_where_it_is_not_set(
    policy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wrong.py").write_text("def score(response):\n    return 1 / 0\n")
    reward = {"function": f"{tmp_path}/wrong.py:score", "on_failure": policy}
    said = mistake(capsys, "check", configuration(tmp_path, reward=reward))
    assert f"raised ZeroDivisionError: division by zero ({tmp_path}/wrong.py, line 2, in score: return 1 / 0)" in said
    assert ("reward.on_failure" in said) == (policy == "fail")


def test_drop_group_leaves_out_whole_groups_and_nothing_else(tmp_path: Path) -> None:
    policy = {"on_failure": "drop_group", "pool": {"timeout": 1}}
    with opened(tmp_path / "a", "broken", reward=policy) as run, opened(tmp_path / "b", "clean") as whole:
        (groups, counts), (same, _) = next_groups(run, 1), next_groups(whole, 1)
    clean = [g for g in same if all(PLACE["trouble"](t.response) is None for t in g.trajectories)]
    assert 0 < len(clean) < len(same)
    assert groups == clean
    assert counts["reward/dropped_groups"] == len(same) - len(clean)


def test_fail_ends_the_run_with_the_row_and_loses_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = mistake(capsys, "train", file_of(tmp_path, "broken", reward={"pool": {"timeout": 1}}))
    assert "row " in said and "of the training data: the reward" in said
    event = read_events(tmp_path / "run/events.jsonl")[-1]
    assert event["kind"] == "failed" and said.startswith(f"error: {event['text'].removeprefix('UserError: ')}\n")
    assert "reward.on_failure (drop_group, mask, value)" in said
    config = load_config(file_of(tmp_path, "replaced"))
    assert config.reward.on_failure == "fail"
    # Mended, the same command goes on with what was scored.
    succeed(capsys, "train", file_of(tmp_path, "replaced"))
    assert len(steps(tmp_path)) == 3


def test_a_reward_that_fails_on_all_answers_of_a_step_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "late.py").write_text(
        "def score(response, ground_truth):\n    return 1.0 if response == ground_truth else None\n"
    )
    reward = {"function": f"{tmp_path}/late.py:score", "on_failure": "mask"}
    said = mistake(capsys, "train", file_of(tmp_path, "clean", reward=reward))
    assert "the reward failed on the responses of all 4 groups of a step" in said


def workers() -> list[int]:
    """The reward processes that this one has started."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            command = (process / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if parent == os.getpid() and b"pool.worker" in command:
            found.append(int(process.name))
    return found


# It says since when it works. Only processes are struck that have moved on from their first call, which may be one that
# another process died with: a call that two processes died with is a failure, and so are two that die as they start.
SLOW = """
import os, time
from pathlib import Path

def score(response):
    since = Path(__file__).parent / f"works-{{os.getpid()}}"
    if not since.exists():
        since.touch()
    time.sleep({seconds})
    return sum(map(ord, response)) % 101 / 101
"""


@pytest.mark.slow
def test_processes_that_are_killed_or_slow_change_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, seconds in [("plain", 0), ("slow", 0.02), ("killed", 0.08)]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "slow.py").write_text(SLOW.format(seconds=seconds))
        reward = {"function": f"{tmp_path}/{name}/slow.py:score", "pool": {"processes": 1 if name == "plain" else 2}}
        file = file_of(tmp_path / name, "clean", reward=reward)
        killed, ended = [], threading.Event()

        def strike(killed: list[int] = killed, ended: threading.Event = ended, folder: Path = tmp_path / name) -> None:
            while not ended.wait(0.6):
                for since in folder.glob("works-*"):
                    pid = int(since.name.removeprefix("works-"))
                    if pid in workers() and time.time() - since.stat().st_mtime > 0.5:
                        os.kill(pid, signal.SIGKILL)
                        killed.append(pid)
                        break

        striker = threading.Thread(target=strike)
        config = load_config(file)
        if name == "killed":
            striker.start()
        try:
            train(config)
        finally:
            ended.set()
        if name == "killed":
            striker.join()
            assert len(set(killed)) >= 2
    for name in ("slow", "killed"):
        assert_same_tensors(*(tmp_path / n / "run/model/model.safetensors" for n in ("plain", name)))
        for a, b in zip(steps(tmp_path / "plain"), steps(tmp_path / name), strict=True):
            assert {k: v for k, v in a.items() if k.startswith(("critic/", "reward/"))} == {
                k: v for k, v in b.items() if k.startswith(("critic/", "reward/"))
            }
    deadline = time.monotonic() + 5
    while workers() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert workers() == []
