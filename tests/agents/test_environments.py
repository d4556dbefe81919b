"""Environments of users: what they may return, what `hybridflow check` finds by playing them, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hybridflow.agents.observations import observation_of, state_number
from hybridflow.agents.tools import toolbox
from hybridflow.config.locate import load_function
from hybridflow.errors import UserError
from hybridflow.protocols.environments import Observation

from runs import configuration, metrics, mistake, succeed

PAGE = Path(__file__).parents[2] / "docs/agents.md"
Output = pytest.CaptureFixture[str]

# Sums that the environment makes by itself: reset says the first one, and each right result brings the next.
WORLD = """
import asyncio, os, random, threading, time
from hybridflow import Observation

class Sums:
    made = 0

    def __init__(self, count=3, fault=""):
        self.count, self.fault, self.number = count, fault, Sums.made
        Sums.made += 1

    async def reset(self, row, seed):
        await asyncio.sleep(9 if self.fault == "some" and self.number == 9 else 0)
        if self.fault == "reset" or (self.fault == "some" and self.number == 8):
            raise OSError("the server is away")
        self.random = random.Random(None if self.fault == "seed" else 3 if self.fault == "same" else seed)
        self.done = 0
        return self.say() * (9 if self.fault == "long" else 1)

    def say(self):
        self.a, self.b = self.random.randrange(100, 1000), self.random.randrange(100, 1000)
        return f"{self.a}+{self.b}="

    def step(self, action):
        self.done += 1
        if self.fault == "dies":
            os._exit(7)
        if self.fault == "leak":
            threading.Thread(target=time.sleep, args=(2,), name="left", daemon=True).start()
        reward = {"reward": "a lot", "nan": float("nan")}.get(self.fault, float(str(self.a + self.b) in action.text))
        said = str(time.perf_counter_ns()) if self.fault == "step" else self.say()
        return {"messages": said, "reward": reward, "done": self.done == self.count, "anchor": (self.a, self.b)}

    def close(self):
        if self.fault == "some" and self.number == 10:
            raise OSError("it is closed")

async def later(count=3, fault=""):
    return Sums(count, fault)

class Stepless:
    def reset(self, row, seed): return "1+1="
    def close(self): pass

class Other(Sums):
    def step(self, action, reward): return "1"

def play(episode): pass
"""


def sums(folder: Path, **agent: Any) -> str:
    """A run on the tasks of an environment, without rows and without a ground truth."""
    (folder / "world.py").write_text(WORLD)
    section = {"environment": f"{folder}/world.py:Sums", "tasks": 6, "max_turns": 4, "max_observation_tokens": 16}
    return configuration(
        folder,
        data={"train": None, "eval": None, "max_prompt_tokens": 16},
        reward={"function": "environment"},
        rollout={"max_response_tokens": 12},
        agent=section | agent,
    )


def test_an_environment_with_tasks_of_its_own_trains_and_what_fails_costs_its_own_trajectory(
    tmp_path: Path, capsys: Output
) -> None:
    """Check makes five environments, the evaluation two. Of the eight of the step one raises, one is too slow, and one
    cannot be closed.
    """
    given = {"count": 2, "fault": "some"}
    later = f"{tmp_path}/world.py:later"
    config = sums(tmp_path, environment=later, environment_kwargs=given, eval_tasks=2, call_timeout=1)
    sizes = ["train.steps=1", "train.samples_per_prompt=4", "train.sequences_per_update=8"]
    said = succeed(capsys, "train", config, *sizes)
    assert "training data the environment's tasks: 6 rows, of which the environment makes prompts" in said
    assert "world.py:later: two episodes with one seed are the same (2 turns, done); reset takes" in said
    assert "advice: its first" not in said and "behind; close() has to" not in said
    start, step = metrics(tmp_path / "run")
    assert start["step"] == 0 and step["agent/failed"] == 2
    events = (tmp_path / "run/events.jsonl").read_text()
    assert "OSError: the server is away" in events and "Sums.reset took longer than 1 seconds" in events
    assert "an environment could not be closed" in events and "OSError: it is closed" in events


def test_the_environment_and_the_tools_of_the_page_are_such(tmp_path: Path, capsys: Output) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    guess = next(block for block in blocks if "class Guess" in block)
    (tmp_path / "guess.py").write_text(guess)
    config = sums(tmp_path, environment=f"{tmp_path}/guess.py:Guess", max_turns=8)
    said = succeed(capsys, "check", config, "data.max_prompt_tokens=80")
    assert "guess.py:Guess: two episodes with one seed are the same (8 turns, not done); reset takes" in said
    assert "behind" not in said and "  it begins with 'Guess my number, from 1 to 99." in said
    (tmp_path / "tools.py").write_text(
        "".join(block for block in blocks if "(self, line" in block or "calculate" in block)
    )
    found = toolbox([(name, load_function(f"{tmp_path}/tools.py:{name}")) for name in ("calculate", "Notes")])
    assert [schema["function"]["name"] for schema in found.schemas] == ["calculate", "write"]
    inherits = guess.replace("class Guess:", "class Guess(Environment):").replace("def step", "def move")
    (tmp_path / "other.py").write_text(inherits.replace("import Obs", "import Environment, Obs"))
    assert "Guess has no step(action)" in mistake(
        capsys, "check", sums(tmp_path, environment=f"{tmp_path}/other.py:Guess")
    )


def test_an_environment_in_a_process_is_tried_there(tmp_path: Path, capsys: Output) -> None:
    said = mistake(capsys, "check", sums(tmp_path, processes=1, environment_kwargs={"fault": "dies"}))
    assert "Sums fails: ProcessDied: the process of step ended with exit code 7" in said


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        ("step", "after turn 1 they differ, although the model did the same: messages"),
        ("leak", "an episode leaves 3 threads (left, left, left) behind; close() has to free what it holds"),
        ("same", "its first 4 tasks all begin alike; their difference has to come from row or seed"),
    ],
)
def test_check_tells_what_an_environment_does_wrong(fault: str, found: str, tmp_path: Path, capsys: Output) -> None:
    assert f"advice: {found}" in succeed(capsys, "check", sums(tmp_path, environment_kwargs={"fault": fault}))


@pytest.mark.parametrize(
    ("agent", "said"),
    [
        ({"fault": "seed"}, "Sums begins two episodes with one seed differently: messages"),
        ({"fault": "reset"}, "Sums fails: OSError: the server is away"),
        ({"fault": "reward"}, "Sums.step after turn 1 returned the reward 'a lot'"),
        ({"fault": "nan"}, "Sums.step after turn 1 returned the reward nan"),
        ({"fault": "long"}, "tokens, and data.max_prompt_tokens is 16: "),
        ({"size": 3}, "Sums cannot be made: got an unexpected keyword argument 'size'"),
        ("Sum", "has no function 'Sum'"),
        ("Stepless", "Stepless has no step(action)"),
        ("Other", "step of the environment"),
        ("play", "play cannot be made: missing a required argument: 'episode'"),
    ],
)
def test_an_environment_that_cannot_be_used_is_refused(
    agent: str | dict[str, Any], said: str, tmp_path: Path, capsys: Output
) -> None:
    named = {"environment": f"{tmp_path}/world.py:{agent}"} if isinstance(agent, str) else {}
    given = {"environment_kwargs": agent} if isinstance(agent, dict) else {}
    found = mistake(capsys, "check", sums(tmp_path, **named, **given))
    assert said in found and "fix:" in found
    assert not (tmp_path / "run/run").exists()


@pytest.mark.parametrize(
    ("agent", "said"),
    [
        ({"environment": "gone.py:Sums"}, "no file gone.py (for gone.py:Sums)"),
        ({"play": "world.py:play"}, "world.py:play cannot be called"),
        ({"max_tokens": 500}, "one sequence can have"),
    ],
)
def test_a_file_a_loop_and_a_budget_that_cannot_be_used(
    agent: dict[str, Any], said: str, tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = sums(tmp_path, **agent)
    monkeypatch.chdir(tmp_path)
    assert said in mistake(capsys, "check", config, "train.tokens_per_microbatch=120")


def test_what_an_environment_may_return() -> None:
    said = [{"role": "user", "content": "left"}]
    assert observation_of("left", "W.step") == Observation(said)
    assert observation_of(said[0], "W.step") == observation_of(said, "W.step") == Observation(said)
    given = {"messages": "left", "reward": torch.tensor(0.5), "done": np.True_, "anchor": (np.int64(1) + 0, 2)}
    with pytest.raises(UserError, match="an object has another one each time"):
        observation_of(given | {"anchor": object()}, "W.step")
    full = observation_of(given | {"anchor": [1, 2], "info": {"score": np.float32(2)}}, "W.step")
    assert full == Observation(said, 0.5, True, "[1, 2]", {"score": 2.0})
    assert state_number("1") != state_number(1) and 0 <= state_number("[1, 2]") < 2**63
    assert observation_of(Observation("left", anchor=np.int64(4)), "W.step").anchor == 4  # type: ignore[arg-type]
    for wrong, match in [
        (None, "W.step returned NoneType"),
        (("left", 1.0, False), "W.step returned tuple"),
        ([{"content": "left"}], "W.step returned list"),
        ({"message": "left"}, "did you mean 'messages'"),
        (Observation(said, info={"score": "high"}), "info whose 'score' is 'high'"),
    ]:
        with pytest.raises(UserError, match=match):
            observation_of(wrong, "W.step")
