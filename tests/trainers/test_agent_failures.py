"""Trajectories that fail for another reason than the model: masked, dropped with their group, or the end of the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hybridflow.config.load import load_config
from hybridflow.errors import UserError
from hybridflow.tracking.rollouts import read_rollouts
from hybridflow.trainers.rl.loop import train

from runs import configuration, metrics

WORLD = """
import threading
from collections import Counter
from hybridflow import Observation

lock, begun = threading.Lock(), Counter()

class World:
    def __init__(self, failing=0, seeded=True):
        self.failing, self.seeded = failing, seeded

    def reset(self, row, seed):
        with lock:
            self.number = begun[seed]
            begun[seed] += 1
        self.turns = 0
        return "1+1=" if self.seeded else f"{self.number}+1="

    def step(self, action):
        self.turns += 1
        if self.number < self.failing and self.turns == 2:
            raise OSError("the server is away")
        return Observation("+1=", reward=sum(map(ord, action.text)) % 8 / 8, done=self.turns == 2)

    def close(self):
        raise OSError("closed by the server")
"""


def run(folder: Path, on_failure: str = "mask", **kwargs: Any) -> Path:
    (folder / "world.py").write_text(WORLD)
    agent = {"environment": f"{folder}/world.py:World", "tasks": 6, "max_turn_tokens": 4, "max_observation_tokens": 16}
    sections: dict[str, Any] = {
        "agent": agent | {"environment_kwargs": kwargs, "on_failure": on_failure},
        "reward": {"function": "environment"},
        "rollout": {"max_response_tokens": 12},
        "data": {"train": None, "eval": None, "max_prompt_tokens": 32},
        "train": {"steps": 1, "prompts_per_step": 2, "samples_per_prompt": 3},
    }
    return train(load_config(configuration(folder, **sections)))


def test_a_failed_trajectory_trains_nothing_and_is_counted(tmp_path: Path) -> None:
    path = run(tmp_path, failing=1)
    (line,) = [m for m in metrics(path) if m["step"] == 1]
    rows = read_rollouts(path / "rollouts/step-000001.parquet")
    failed = [row for row in rows if row["finish_reason"] == "failed"]
    assert line["agent/failed"] == 2 and len(failed) == 2 and len(rows) == 6
    assert all(row["reward"] is None and row["advantage"] is None for row in failed)
    rewards = [row["reward"] for row in rows if row["finish_reason"] == "done"]
    assert len(rewards) == 4 and line["critic/score/mean"] == pytest.approx(sum(rewards) / 4)
    assert line["actor/grad_norm"] > 0
    told = (path / "events.jsonl").read_text()
    assert "a trajectory failed:" in told and "the server is away" in told
    assert "could not be closed" in told  # which costs no trajectory


@pytest.mark.parametrize(
    ("on_failure", "kwargs", "what", "why", "fix"),
    [
        ("fail", {"failing": 1}, r"row \d of the training data: a trajectory failed: OSError: the server is away",
         "the environment, or what it needs, is at fault, not the model", "agent.on_failure=mask trains on the others"),
        ("drop_group", {"failing": 1}, "a trajectory failed in all 2 groups of a step: OSError: the server is away",
         "agent.on_failure=drop_group leaves nothing to learn from", "agent.on_failure=mask trains on the others"),
        ("mask", {"failing": 2}, "4 trajectories of a step failed, 4 of them with: OSError: the server is away",
         "those are most of them", "hybridflow check plays an episode"),
        ("mask", {"seeded": False}, r"row \d of the training data: the environment began 3 different episodes for the",
         "reset.row, seed. gets the same seed for each", "make every random choice of reset from its seed"),
    ],
)  # fmt: skip
def test_a_run_ends_and_names_the_cause(
    on_failure: str, kwargs: dict[str, Any], what: str, why: str, fix: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"(?s){what}.*{why}.*{fix}"):
        run(tmp_path, on_failure, **kwargs)
