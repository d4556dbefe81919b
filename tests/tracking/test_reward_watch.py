"""The advice on a reward that rises for the wrong reason: told when it is hacked, and never when the model learns."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from hybridflow.models.load import load_tokenizer
from hybridflow.tracking.events import read_events
from hybridflow.tracking.reward_watch import HORIZON, RESTS, RewardWatch

from runs import configuration, metrics, succeed
from tiny import CARRY

MEASURED = json.loads((CARRY.parents[2] / "benchmarks/results/reward_watch.json").read_text())["results"]
Metrics = dict[str, float]
NAMES = {
    "length": "response_length/mean",
    "cut": "response_length/clip_ratio",
    "entropy": "actor/entropy",
    "repeated": "rollout/seq_rep_2",
    "top": "rollout/top_answer_share",
    "pull": "rollout/length_reward_corr",
    "score": "critic/score/mean",
}


def steps(count: int = 60, seed: int = 0, **curves: Callable[[float], float] | float) -> list[Metrics]:
    """A run whose reward rises from 0.2 to 0.8 with noise; each curve is a function of how much of it is done."""
    rng = random.Random(seed)
    usual: dict[str, Any] = {"score": lambda t: 0.2 + 0.6 * t, "length": 100.0, "cut": 0.0, "entropy": 0.4}
    usual |= {"repeated": 0.1, "top": 0.05, "pull": 0.0}
    found = []
    for i in range(count):
        line = {"critic/score/min": 0.0, "critic/score/max": 1.0}
        for name, curve in (usual | curves).items():
            value = curve(i / (count - 1)) if callable(curve) else curve
            line[NAMES.get(name, name)] = value * (1 + 0.05 * rng.gauss(0, 1))
        found.append(line)
    return found


def said(run: Sequence[Metrics], watch: RewardWatch | None = None) -> list[str]:
    watch = watch or RewardWatch()
    return [text for text in map(watch.observe, run) if text is not None]


def to(start: float, end: float) -> Callable[[float], float]:
    return lambda t: start + (end - start) * t


# --- runs that were made ---


@pytest.mark.parametrize("seed", MEASURED["honest"])
def test_nothing_is_said_of_runs_that_learned_to_carry(seed: str) -> None:
    run = MEASURED["honest"][seed]["steps"]
    scores = [line["critic/score/mean"] for line in run if "critic/score/mean" in line]
    assert scores[-1] - scores[0] > 0.25 and len(run) == 41  # there was something to say, if it were wrong
    assert said(run) == []


@pytest.mark.parametrize("run", MEASURED["real"])
def test_nothing_is_said_of_a_real_model_that_learned_its_task(run: str) -> None:
    steps = MEASURED["real"][run]["steps"]
    scores = [line["critic/score/mean"] for line in steps if "critic/score/mean" in line]
    assert sum(scores[-3:]) - sum(scores[:3]) > 3 * 0.2 and len(steps) == 25
    assert said(steps) == []


@pytest.mark.parametrize(
    ("reward", "told"),
    [
        ("nines", "responses repeat themselves"),
        ("nines", "different prompts get the same final answer"),
        ("has_nine", "the limit cuts more responses"),
        ("starts_with_nine", "the limit cuts more responses"),
        ("large", "different prompts get the same final answer"),
        ("quick", "responses shrink"),
    ],
)
def test_it_is_said_of_runs_that_hacked_their_reward(reward: str, told: str) -> None:
    found = said(MEASURED["hacked"][reward]["steps"])
    assert any(told in text for text in found)
    assert found == list(MEASURED["hacked"][reward]["told"].values())


def hacked(folder: Path, model: PreTrainedModel, seed: int) -> str:
    """The configuration of a carry run whose reward is the share of nines among the characters."""
    model.save_pretrained(folder / "model")
    load_tokenizer(f"{CARRY}:tiny_qwen3").save_pretrained(folder / "model")
    reward = folder / "nines.py"
    reward.write_text("def nines(response): return response.count('9') / max(len(response), 1)\n")
    return configuration(
        folder,
        run={"seed": seed},
        model={"path": str(folder / "model")},
        data={"eval": None},
        reward={"function": f"{reward}:nines", "pool": {"processes": 0}},
        rollout={"max_response_tokens": 32},
        train={"steps": 40, "prompts_per_step": 8, "samples_per_prompt": 8, "sequences_per_update": 64},
        algorithm={"preset": "grpo"},
        eval={},
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_run_that_hacks_its_reward_says_so(
    seed: int, tmp_path: Path, trained_model: PreTrainedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which of the advices comes first, and when, is a matter of the processor's rounding; that one comes is not."""
    succeed(capsys, "train", hacked(tmp_path, trained_model, seed))
    told = [e["text"] for e in read_events(tmp_path / "run/events.jsonl") if e["kind"] == "advice"]
    assert any("the reward rises" in text for text in told)
    scores = [line["critic/score/mean"] for line in metrics(tmp_path / "run") if "critic/score/mean" in line]
    assert scores[0] < 0.1 and scores[-1] > 0.5  # most characters are nines: how soon all are is the processor's course


# --- what is said of what ---


@pytest.mark.parametrize(
    ("curves", "told"),
    [
        ({"cut": to(0, 0.8)}, "the limit cuts more responses (response_length/clip_ratio"),
        ({"length": to(100, 400), "pull": 0.95}, "responses grow (response_length/mean"),
        ({"length": to(400, 40), "pull": -0.95}, "responses shrink (response_length/mean"),
        (
            {"entropy": lambda t: 0.4 * 0.01**t, "score": lambda t: min(0.4, 0.1 + t)},
            "the policy stops exploring (actor/entropy",
        ),
        ({"repeated": to(0.1, 0.8)}, "responses repeat themselves (rollout/seq_rep_2"),
        ({"top": to(0.05, 0.7)}, "different prompts get the same final answer (rollout/top_answer_share"),
    ],
)
def test_the_number_that_disagrees_is_named_with_what_to_look_at(curves: dict[str, Any], told: str) -> None:
    found = said(steps(**curves))
    assert len(found) == 1  # once
    assert found[0].startswith("the reward rises (critic/score/mean 0.") and told in found[0]
    assert "read some of the best responses of this step" in found[0]
    assert said(steps(**curves | {"score": 0.3})) == []  # the same where the reward does not rise


@pytest.mark.parametrize(
    "curves",
    [
        {},
        {"length": to(100, 600), "pull": 0.2},  # longer reasoning, which is not paid as such
        {"length": to(1000, 150), "cut": to(0.9, 0.0), "pull": -0.9},  # it learns to end
        {"entropy": lambda t: 0.4 * 0.01**t, "score": to(0.3, 0.95)},  # it is sure, and right
        {"entropy": to(0.4, 0.1), "score": to(0.1, 0.5)},
        {"repeated": to(0.1, 0.3)},
        {"top": to(0.02, 0.2)},
        {"score": lambda t: 0.3 + 0.05 * t, "top": to(0.0, 1.0)},  # less than it moves anyway
        {"entropy": float("nan")},
    ],
)
def test_nothing_is_said_of_honest_runs(curves: dict[str, Any]) -> None:
    for seed in range(20):
        assert said(steps(seed=seed, **curves)) == []


def test_nothing_is_said_of_noise() -> None:
    for seed in range(50):
        rng = random.Random(seed)
        noise = {name: (lambda _, rng=rng: rng.random()) for name in NAMES}  # type: ignore[misc]
        assert said(steps(150, seed, **noise)) == []
    assert said(steps(9, top=to(0, 1))) == []  # too early to say


def test_a_part_that_gets_worse_while_the_sum_rises() -> None:
    def run(**parts: Callable[[float], float]) -> list[Metrics]:
        named = {f"reward/{name}/mean": curve for name, curve in parts.items()}
        bounds = {f"reward/{name}/{end}": x for name in parts for end, x in (("min", 0.0), ("max", 1.0))}
        return [line | bounds for line in steps(**named)]

    found = said(run(acc=to(0.6, 0.2), style=to(0.1, 0.9)), RewardWatch({"style": 1.0}))
    assert len(found) == 1
    assert "a part of it gets worse (reward/acc/mean 0.5" in found[0]
    assert "and reward/style/mean carries the rise (0.1" in found[0]
    weights = {"style": 1.0, "length": -0.5}
    assert said(run(style=to(0.1, 0.9), length=to(0.8, 0.1)), RewardWatch(weights)) == []  # its weight is negative
    assert "reward/length/mean" in said(run(style=to(0.1, 0.9), length=to(0.1, 0.8)), RewardWatch(weights))[0]
    assert said(run(acc=to(0.2, 0.6), style=to(0.1, 0.9)), RewardWatch({"style": 1.0})) == []
    assert said(run(errors=to(0.8, 0.1))) == []  # a number of the function's own, of which nobody knows the sign


# --- held-out reward ---


def evaluated(run: list[Metrics], held: Callable[[float], float], every: int = 5, half: float = 0.05) -> list[Metrics]:
    for i in range(every - 1, len(run), every):
        value = held(i / (len(run) - 1))
        run[i] |= {"val-core/gsm8k/reward/mean@1": value}
        run[i] |= {f"val-aux/gsm8k/reward/mean@1/ci_{end}": value + x for end, x in (("low", -half), ("high", half))}
    return run


def test_a_held_out_reward_that_falls_or_stays_behind() -> None:
    falls = said(evaluated(steps(), to(0.4, 0.1)))
    assert len(falls) == 1 and "while the held-out reward falls (val-core/gsm8k/reward/mean@1 0.3" in falls[0]
    stays = said(evaluated(steps(), to(0.2, 0.22)))
    assert len(stays) == 1 and "while the held-out reward stays (val-core/gsm8k/reward/mean@1 0.2" in stays[0]


@pytest.mark.parametrize(
    "held",
    [
        to(0.15, 0.75),
        lambda t: min(0.98, 0.3 + 4 * t),  # it has nothing left to gain
        lambda t: 0.3 if t < 0.3 else 0.95,  # greedy answers change all at once
        lambda t: 0.9 - 0.04 * t,  # within its interval
        lambda t: 0.2 + 0.6 * t + (0.15 if int(t * 60) % 2 else -0.15),
    ],
)
def test_a_held_out_reward_that_keeps_up_is_nothing_to_speak_of(held: Callable[[float], float]) -> None:
    assert said(evaluated(steps(), held)) == []


# --- once, and again ---


def test_it_is_said_again_only_after_it_was_gone() -> None:
    once = steps(60, top=to(0.0, 0.9))
    calm = steps(HORIZON + RESTS, score=0.1, top=0.0)
    assert len(said(once + once[-1:] * 10)) == 1
    assert len(said(once + calm + once)) == 2


def test_a_run_that_goes_on_knows_what_it_knew() -> None:
    run = steps(50, top=to(0.05, 0.9), repeated=to(0.1, 0.8))
    whole = said(run)
    assert len(whole) == 2
    for cut in range(1, len(run), 7):
        before = said(run[:cut])
        again = RewardWatch()
        said(run[:cut], again)  # shown the records, which say nothing anew
        assert before + said(run[cut:], again) == whole
