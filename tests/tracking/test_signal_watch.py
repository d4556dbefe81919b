"""A run whose reward tells no answer from another: whether a step teaches, and when that is said."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from hybridflow.algorithms.advantage.registry import advantage_columns
from hybridflow.config.pieces.tables import ADVANTAGES
from hybridflow.protocols.generation import Result
from hybridflow.protocols.groups import Group, Trajectory, one_turn
from hybridflow.tracking.events import read_events
from hybridflow.tracking.signal_watch import ALIKE, GROUPS_ALIKE, LEAST, MOST, TEACHES, SignalWatch, teaches
from hybridflow.trainers.rl.batches import batch_of
from hybridflow.trainers.rl.shaping import token_rewards

from runs import configuration, metrics, succeed

WITHIN = sorted(name for name, needs in ADVANTAGES.items() if needs.needs_group)
ACROSS = sorted(name for name, needs in ADVANTAGES.items() if not needs.needs_group and name != "distillation")


def groups_of(*rewards: Sequence[float], **more: Sequence[Any]) -> list[Group]:
    """Groups of these rewards; `more` are further attributes of the answers, over all groups."""
    count, groups = 0, []
    for draw, values in enumerate(rewards):
        answers = []
        for i, reward in enumerate(values):
            columns = {name: column[count] for name, column in more.items()}
            length = 1 + count % 3
            sequence = one_turn([1], Result(0, [1] * length, [0.0] * length, "stop", []), 9)
            sequence.step_rewards = columns.pop("step_rewards", [])
            answers.append(Trajectory(i, [sequence], "stop", "a", reward, **columns))
            count += 1
        groups.append(Group(draw, draw, [1], answers))
    return groups


@pytest.mark.parametrize("advantage", WITHIN)
def test_answers_are_held_against_those_to_the_same_prompt(advantage: str) -> None:
    assert teaches(groups_of([0, 1], [0, 0]), advantage)
    for rewards in ([[0, 0], [0, 0]], [[1, 1], [1, 1]], [[0, 0], [1, 1]], [[0.5], [0.25]]):
        assert teaches(groups_of(*rewards), advantage) is False


@pytest.mark.parametrize("advantage", ACROSS)
def test_single_answers_are_held_against_those_of_the_step(advantage: str) -> None:
    assert teaches(groups_of([0], [1]), advantage) and teaches(groups_of([0, 0], [1, 1]), advantage)
    assert teaches(groups_of([0], [0], [0]), advantage) is False
    assert teaches(groups_of([2.5, 2.5], [2.5, 2.5]), advantage) is False


def test_whatever_else_tells_answers_apart_counts_and_what_hides_it_does_too() -> None:
    assert teaches(groups_of([1, 1], step_rewards=[[(0, 1.0)], [(0, 0.5)]]), "gigpo")
    parts = [{"format": 1.0}, {"format": 0.0}]
    assert teaches(groups_of([1, 1], components=parts), "gdpo") and not teaches(
        groups_of([1, 1], components=parts), "grpo"
    )
    assert not teaches(groups_of([5, 7]), "grpo", (-1, 1)) and teaches(groups_of([0, 7]), "grpo", (-1, 1))
    held = groups_of([1], [1])
    held[0].baseline, held[1].baseline = 0.0, 1.0
    assert teaches(held, "remax")
    assert teaches(groups_of([1, 0], failure=[None, "it raised"]), "grpo") is False
    assert teaches(groups_of([1, 0], failure=["it raised"] * 2), "grpo") is None
    assert teaches([], "grpo") is None and teaches(groups_of([1, 0]), "distillation") is None


@pytest.mark.parametrize("advantage", ["grpo", "rloo", "opo", "gpg", "maxrl"])
def test_a_step_teaches_exactly_where_some_advantage_is_not_zero(advantage: str) -> None:
    draw = random.Random(advantage)
    seen = set()
    for _ in range(40):
        groups = groups_of(*([draw.choice([0.0, 0.0, 1.0]) for _ in range(3)] for _ in range(draw.choice([1, 2]))))
        batch = batch_of(groups)
        batch["reward_T"] = token_rewards(batch)
        columns = advantage_columns(advantage, batch, {"normalize_by_std": True})
        seen.add(taught := teaches(groups, advantage))
        assert taught == bool(columns["advantage_T"].abs().max() > 0), [g.trajectories for g in groups]
    assert seen == {True, False}


def said(steps: Sequence[tuple[float, float] | None]) -> dict[int, str]:
    """What is said after which step: None is one that teaches, else its least and highest reward."""
    watch, found = SignalWatch(), {}
    for step, ends in enumerate(steps, start=1):
        low, high = ends or (0.0, 1.0)
        text = watch.observe({TEACHES: float(ends is None), "critic/score/min": low, "critic/score/max": high})
        if text is not None:
            found[step] = text
    return found


def test_it_is_said_once_after_a_few_steps_and_again_only_where_something_was_learned() -> None:
    zero, mixed = (0.0, 0.0), (0.0, 1.0)
    assert list(said([zero] * 14)) == [ALIKE]
    assert list(said([mixed] * 14)) == [GROUPS_ALIKE]
    assert list(said([zero, zero, mixed, zero, zero, zero])) == [GROUPS_ALIKE]
    assert list(said([None] * 4 + [(1.0, 1.0)] * 9 + [None] + [zero] * 3)) == [4 + ALIKE, 17]


def test_nothing_is_said_where_rewards_vary_now_and_then() -> None:
    draw = random.Random(0)
    for _ in range(200):
        steps: list[tuple[float, float] | None] = []
        while len(steps) < 30:
            steps += [(0.0, 0.0)] * draw.randrange(ALIKE) + [None]
        assert not said(steps)
    assert SignalWatch().observe({"actor/loss": 1.0}) is None  # records of before


def test_a_run_of_one_step_speaks_of_one_step() -> None:
    watch = SignalWatch()
    watch.observe({TEACHES: 0.0, LEAST: 0.0, MOST: 1.0})
    assert (watch.summary() or "").startswith("nothing was learned in the only step: all responses to a prompt had")


def test_the_advice_names_the_reward_and_what_to_look_at() -> None:
    assert "every response had reward 0. Compare a few responses" in said([(0.0, 0.0)] * 3)[3]
    assert "every response had reward -1" in said([(-1.0, -1.0)] * 3)[3]
    assert (
        "every response had reward 1. If that is the highest reward, these rows are solved" in said([(1.0, 1.0)] * 3)[3]
    )
    assert "all responses to a prompt had the same reward" in said([(0.0, 1.0)] * 5)[5]


@pytest.mark.parametrize(
    ("source", "more", "expected"),
    [
        ("0", {}, "every response had reward 0"),
        (
            "0",
            {"algorithm": {"preset": "ppo"}, "critic": {}, "train": {"steps": 4, "samples_per_prompt": 1}},
            "reward 0",
        ),
        ("sum(map(ord, response)) % 101 / 101", {}, None),
        ("0", {"train": {"steps": 2}}, "every response had reward 0"),  # too short to be told before its end
    ],
)
def test_a_run_that_cannot_learn_says_so_on_the_console_in_its_events_and_at_its_end(
    source: str, more: dict[str, Any], expected: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "same.py").write_text(f"def score(response, ground_truth):\n    return {source}\n")
    sections = {
        "reward": {"function": str(tmp_path / "same.py:score"), "pool": {"processes": 0}}, "train": {"steps": 4},
        "data": {"eval": None}, "track": {"console": True}, "rollout": {"max_response_tokens": 4},
    } | more  # fmt: skip
    printed = succeed(capsys, "train", configuration(tmp_path, **sections))
    events = [e["text"] for e in read_events(tmp_path / "run/events.jsonl") if "nothing was learned" in e["text"]]
    advised = [line for line in printed.splitlines() if "nothing was learned" in line]
    steps = metrics(tmp_path / "run")[-1]["step"]
    if expected is None:
        assert not advised and not events
    else:
        assert len(events) == (steps >= ALIKE) and len(advised) == len(events) + 1
        assert all(expected in line and line.startswith("advice: ") for line in advised)
        assert advised[-1] in printed.splitlines()[-3:]
    taught = [m.get("training/reward_teaches") for m in metrics(tmp_path / "run")]
    assert set(taught) - {None} == {float(expected is None)}
