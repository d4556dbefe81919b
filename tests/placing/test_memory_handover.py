"""Who has the memory of shared devices in which phase: the order of calls of real runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hybridflow.config.kinds.rl import RlConfig
from hybridflow.config.load import load_config
from hybridflow.engines.fsdp.engine import ShardedEngine
from hybridflow.engines.local import LocalEngine
from hybridflow.placing.group_rollout import GroupRollout
from hybridflow.publishing.publisher import Publisher
from hybridflow.rollout.inline.engine import InlineEngine
from hybridflow.runs.lifecycle import Interrupted
from hybridflow.trainers.rl.loop import train

from runs import configuration, metrics


class Record:
    """Notes calls of engines in their order, repetitions once, and insists that a sleeping engine is left alone.

    What publishing itself asks of them (a drill, a canary) is noted as "publish" alone.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        self.calls: list[str] = []
        self.awake, self.publishing = True, False
        real = Publisher.publish

        def publish(publisher: Publisher, version: int) -> dict[str, float]:
            self.note("publish")
            self.publishing = True
            try:
                return real(publisher, version)
            finally:
                self.publishing = False

        monkeypatch.setattr(Publisher, "publish", publish)

    def note(self, call: str) -> None:
        assert self.awake or call not in ("publish", "generate", "evaluate"), f"{call} while the engine sleeps"
        self.awake = call in ("wake", "close") or (
            self.awake and call != "sleep"
        )  # after the end the next one is awake
        if not self.publishing and self.calls[-1:] != [call]:
            self.calls.append(call)

    def listen(self, cls: type, method: str, name: Callable[..., str] | None = None) -> None:
        """To a method; `name` makes the note of its arguments."""
        real = getattr(cls, method)

        def call(engine: Any, *arguments: Any, **options: Any) -> Any:
            self.note(method if name is None else name(*arguments))
            return real(engine, *arguments, **options)

        self.monkeypatch.setattr(cls, method, call)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the trainer in this process and the inline engine are asked for."""
    record = Record(monkeypatch)
    for method in ("score", "update", "save", "load", "export"):
        record.listen(LocalEngine, method)
    for method in ("sleep", "wake", "abort", "close"):  # the engine itself refuses to sleep with something in flight
        record.listen(InlineEngine, method)
    record.listen(InlineEngine, "submit", lambda q: "generate" if q.noise.stream == "train" else "evaluate")
    return record.calls


def config(folder: Path, **sections: Any) -> RlConfig:
    rollout = {"max_response_tokens": 8, "sleep": "always"}
    given = {"rollout": rollout, "algorithm": {"old_logp": "recompute"}} | sections
    return load_config(configuration(folder, **given))


STEP = ["generate", "sleep", "score", "update", "wake", "publish"]


def test_one_has_the_memory_while_the_other_rests(tmp_path: Path, calls: list[str]) -> None:
    train(config(tmp_path, train={"steps": 3}, eval={"every": 2}, checkpoint={"every": 1}))
    assert calls == [
        *["publish", "evaluate"],
        *STEP,
        *["sleep", "save", "wake"],
        *STEP,
        *["evaluate", "sleep", "save", "wake"],
        *STEP,
        *["evaluate", "sleep", "save", "export", "close"],
    ]


def test_a_run_that_goes_on_takes_up_the_order(tmp_path: Path, calls: list[str]) -> None:
    sections = {"eval": {"before_training": False, "max_rows": 2}, "checkpoint": {"every": 1}}
    train(config(tmp_path, train={"steps": 1}, **sections))
    calls.clear()
    train(config(tmp_path, train={"steps": 2}, **sections))
    assert calls == ["load", "publish", *STEP, "evaluate", "sleep", "save", "export", "close"]


def test_a_run_that_is_stopped_while_it_generates_saves_without_the_engine(tmp_path: Path, calls: list[str]) -> None:
    """The signal comes while the first group of the second step is scored; the other one is in flight."""
    (tmp_path / "stopping.py").write_text(STOPPING)
    sections: dict[str, Any] = {"data": {"eval": None}}
    sections["reward"] = {"function": str(tmp_path / "stopping.py:score"), "pool": {"processes": 0}}
    sections["rollout"] = {"max_response_tokens": 8, "sleep": "always", "max_cache_tokens": 64}  # two answers at a time
    with pytest.raises(Interrupted):
        train(config(tmp_path, train={"steps": 3}, **sections))
    assert calls == ["publish", *STEP, "generate", "abort", "close", "save"]
    assert [m["step"] for m in metrics(tmp_path / "run")] == [0, 1]
    calls.clear()
    (tmp_path / "stopping.py").write_text(
        "def score(response, ground_truth):\n    return sum(map(ord, response)) % 101\n"
    )
    train(config(tmp_path, train={"steps": 3}, **sections))
    assert calls[:2] == ["load", "publish"] and calls[2:8] == STEP


STOPPING = """
import os, signal
calls = 0
def score(response, ground_truth):
    global calls
    calls += 1
    if calls == 6:
        os.kill(os.getpid(), signal.SIGTERM)
    return sum(map(ord, response)) % 101
"""


def test_models_rest_before_the_engine_wakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sharded actor whose optimizer state is offloaded, and a replica, in one pool."""
    record = Record(monkeypatch)
    for cls, method in ((ShardedEngine, "update"), (GroupRollout, "sleep"), (GroupRollout, "wake")):
        record.listen(cls, method)
    record.listen(ShardedEngine, "to", lambda where: f"to {where}")
    sections = {"placement": {"pools": {"all": 1}}, "engine": {"strategy": "fsdp2", "offload": ["optimizer"]}}
    train(config(tmp_path, train={"steps": 2}, data={"eval": None}, algorithm={}, **sections))
    step = ["to host", "sleep", "to device", "update", "wake", "publish"]
    assert record.calls[: 1 + 2 * len(step)] == ["publish", *step, *step]


@pytest.mark.parametrize("sleep", ["auto", "never"])
def test_on_a_cpu_nothing_sleeps_unasked(tmp_path: Path, calls: list[str], sleep: str) -> None:
    train(config(tmp_path, rollout={"max_response_tokens": 8, "sleep": sleep}, train={"steps": 1}))
    assert "sleep" not in calls and "wake" not in calls
