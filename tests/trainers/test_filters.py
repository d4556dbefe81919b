"""Which answers of a step are trained on: filters with refill, overlong answers, greedy baselines, components."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from hybridflow.checkpoint.journal import Journal
from hybridflow.config.load import load_config
from hybridflow.config.sections.algorithm import FilterSection
from hybridflow.protocols.groups import Group, Trajectory
from hybridflow.tracking.rollouts import read_rollouts
from hybridflow.trainers.rl.filters import passing
from hybridflow.trainers.rl.loop import estimate, next_groups
from hybridflow.trainers.rl.run import RlRun, open_run

from runs import assert_same_tensors, configuration, metrics, mistake, succeed

# Prompts whose result is even give every answer the same; the others tell answers apart.
REWARD = """
def score(response, ground_truth):
    value = 0.5 if int(ground_truth) % 2 == 0 else sum(map(ord, response)) % 101 / 101
    return {"score": value, "vowels": float(sum(c in "aeiou" for c in response)), "one": 1.0}
"""


def filtered(folder: Path, **sections: dict[str, Any]) -> str:
    file = folder / "parts.py"
    file.write_text(REWARD)
    sections = {"reward": {"function": f"{file}:score"}, "data": {"eval": None}} | sections
    return configuration(folder, **sections)


def opened(folder: Path, **sections: dict[str, Any]) -> RlRun:
    return open_run(load_config(filtered(folder, **sections)))


def is_even(run: RlRun, group: Group) -> bool:
    return int(run.data[group.row].ground_truth) % 2 == 0


def test_groups_of_equal_reward_are_replaced_by_later_prompts(tmp_path: Path) -> None:
    train = {"prompts_per_step": 4, "steps": 3}
    with opened(tmp_path, filter={"equal_rewards": True}, train=train) as run:
        (first, _), (second, _) = next_groups(run, 1), next_groups(run, 2)
        assert len(first) == len(second) == 4
        assert not any(is_even(run, g) for g in [*first, *second])
        # Every prompt was drawn once, in order; those between were of equal reward.
        draws = [g.draw for g in [*first, *second]]
        assert draws == sorted(draws)
        again = run.data.sampler(seed=3)
        rows = dict(again.take(draws[-1] + 1))
        assert [g.row for g in [*first, *second]] == [rows[d] for d in draws]
        skipped = [row for draw, row in rows.items() if draw not in draws]
        assert skipped and all(int(run.data[row].ground_truth) % 2 == 0 for row in skipped)


def test_what_was_dropped_is_counted_and_a_run_goes_on_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sections = {"filter": {"equal_rewards": True}, "checkpoint": {"every": 1}}
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    for folder in (whole, halves):
        folder.mkdir()
    succeed(capsys, "train", filtered(whole, **sections), "train.steps=4")
    succeed(capsys, "train", filtered(halves, **sections), "train.steps=2")
    succeed(capsys, "train", filtered(halves, **sections), "train.steps=4")
    assert_same_tensors(whole / "run/model/model.safetensors", halves / "run/model/model.safetensors")
    lines = metrics(whole / "run")[1:]
    assert all(m["training/groups"] == 2 and m["training/equal_reward_groups"] == 0 for m in lines)
    assert sum(m.get("training/filtered_groups/equal", 0) for m in lines) > 0
    assert any(m["training/num_gen_batches"] > 1 for m in lines)
    assert [m.get("training/filtered_groups/equal") for m in lines] == [
        m.get("training/filtered_groups/equal") for m in metrics(halves / "run")[1:]
    ]


def test_a_band_on_the_mean_of_a_component(tmp_path: Path) -> None:
    with opened(tmp_path, filter={"metric": "vowels", "max_mean": 0.9}) as run:
        groups, _ = next_groups(run, 1)
        assert all(sum(t.components["vowels"] for t in g.trajectories) / 2 <= 0.9 for g in groups)


def test_a_step_goes_on_with_what_there_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sections = {"filter": {"equal_rewards": True, "max_rounds": 1}, "train": {"prompts_per_step": 6, "steps": 2}}
    succeed(capsys, "train", filtered(tmp_path, run={"seed": 6}, **sections))
    found = [m["training/groups"] for m in metrics(tmp_path / "run")[1:]]
    assert len(found) == 2 and all(1 <= n <= 6 for n in found) and min(found) < 6


def test_nothing_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = mistake(capsys, "train", filtered(tmp_path, filter={"min_mean": 7.0, "max_rounds": 3}))
    assert "no group of 6 passed the filter: 6 too hard" in said and "filter.max_rounds=3" in said


def test_answers_that_were_cut_are_left_out_and_single_ones_counted(tmp_path: Path) -> None:
    """An untrained model ends an answer of 24 tokens now and then."""
    train = {"prompts_per_step": 8, "samples_per_prompt": 4}
    rollout = {"max_response_tokens": 24}
    with opened(tmp_path, filter={"overlong": True}, train=train, rollout=rollout) as run:
        groups, _ = next_groups(run, 1)
        batch, measured = estimate(run, groups)
        whole = [[t for t in g.trajectories if t.finish_reason == "stop"] for g in groups]
        assert len(batch) == sum(len(answers) for answers in whole if len(answers) > 1) > 0
        assert measured["training/overlong_answers"] == 32 - sum(map(len, whole)) > 0
        assert measured["training/single_answer_groups"] == sum(len(answers) == 1 for answers in whole)


def test_a_step_without_a_whole_answer_trains_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = filtered(tmp_path, filter={"overlong": True}, rollout={"max_response_tokens": 1})
    succeed(capsys, "train", path)
    lines = metrics(tmp_path / "run")[1:]
    assert [m["training/overlong_answers"] for m in lines] == [4, 4]
    assert all("actor/grad_norm" not in m and m["response_length/clip_ratio"] == 1 for m in lines)
    assert [r["advantage"] for r in read_rollouts(tmp_path / "run/rollouts/step-000001.parquet")] == [None] * 4
    succeed(capsys, "report", tmp_path / "run")


def test_the_last_tokens_before_the_limit_cost(tmp_path: Path) -> None:
    reward = {"function": f"{tmp_path / 'parts.py'}:score", "overlong_buffer": 6, "overlong_penalty": 0.5}
    with opened(tmp_path, reward=reward, train={"samples_per_prompt": 16}, rollout={"max_response_tokens": 12}) as run:
        groups, _ = next_groups(run, 1)
        batch, _ = estimate(run, groups)
    answers = [t for g in groups for t in g.trajectories]
    expected = [t.reward - 0.5 * max(0, len(t.token_ids) - 6) / 6 for t in answers]
    summed_B = torch.zeros(len(batch)).index_add_(0, batch.sequence_of(), batch["reward_T"])
    torch.testing.assert_close(summed_B, torch.tensor(expected))
    assert len({len(t.token_ids) for t in answers}) > 1


def test_a_greedy_answer_is_the_baseline_and_is_journaled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = filtered(tmp_path, algorithm={"preset": "remax"}, train={"samples_per_prompt": 1, "prompts_per_step": 3})
    asked = []
    with open_run(load_config(path)) as run:
        groups, _ = next_groups(run, 1)
        batch, _ = estimate(run, groups)
        for g, reward, advantage_T in zip(groups, batch["reward_B"].tolist(), batch.rows("advantage_T")):
            assert g.baseline is not None
            torch.testing.assert_close(advantage_T[-1].item(), reward - g.baseline)
            asked.append((run.data[g.row].messages[0]["content"], run.data[g.row].ground_truth, g.baseline))
        kept = Journal(run.folder.path / "journal").read(1)
        assert [kept[g.draw].baseline for g in groups] == [g.baseline for g in groups]
    # The baseline is the reward of what the same untrained model answers greedily.
    namespace: dict[str, Any] = {}
    exec(REWARD, namespace)
    succeed(capsys, "train", path)
    for record in read_rollouts(tmp_path / "run/rollouts/step-000001.parquet"):
        assert record["advantage"] == pytest.approx(
            record["reward"] - next(b for _, truth, b in asked if str(truth) == record["ground_truth"])
        )


def test_components_are_measured_and_weighed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    algorithm = {"preset": "gdpo", "reward_weights": {"vowels": 2.0, "one": 1.0}}
    succeed(capsys, "train", filtered(tmp_path, algorithm=algorithm))
    lines = metrics(tmp_path / "run")[1:]
    assert all(m["reward/one/mean"] == 1 and m["reward/vowels/max"] >= m["reward/vowels/mean"] for m in lines)


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"algorithm": {"preset": "gdpo"}}, ["gdpo advantage works on the components", "has none"]),
        ({"filter": {"metric": "vowel"}}, ["filter.metric names 'vowel'", "does not return"]),
        ({"filter": {"min_mean": 0.5, "max_mean": 0.5}}, ["min_mean 0.5 is not below max_mean 0.5"]),
        ({"filter": {"equal_rewards": True}, "train": {"steps": None, "epochs": 1}}, ["give train.steps"]),
        ({"algorithm": {"preset": "distillation"}}, ["against a teacher: name it in model.reference"]),
        ({"reward": {"overlong_buffer": 9}}, ["overlong_buffer is 9, more than rollout.max_response_tokens 8"]),
    ],
)
def test_mistakes(
    sections: dict[str, Any], expected: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = mistake(capsys, "train", configuration(tmp_path, **sections))
    assert [e for e in expected if e not in said] == [], said
    assert not (tmp_path / "run").exists()


# As many rewards are written: what is measured depends on the branch; one component comes with the second step only.
SOMETIMES = """
from pathlib import Path

def score(response, ground_truth):
    calls = Path(__file__).with_name("calls")
    calls.write_text(calls.read_text() + "." if calls.exists() else ".")
    found = {"score": len(response) % 3}
    if len(response) % 2 or response == ground_truth:  # the right answer, which the start tries, has it
        found["acc"] = sum(map(ord, response)) % 7 / 7
    if len(calls.read_text()) > 33:
        found["late"] = 1.0
    return found
"""


@pytest.mark.parametrize(
    "sections",
    [
        {"algorithm": {"preset": "gdpo"}},
        {"filter": {"metric": "acc", "max_mean": 0.9}},
    ],
    ids=["learned", "filtered"],
)
def test_a_component_that_comes_and_goes_is_of_the_answers_that_have_it(
    sections: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = configuration(tmp_path, train={"steps": 3, "samples_per_prompt": 8}, data={"eval": None}, **sections)
    (tmp_path / "reward.py").write_text(SOMETIMES)
    succeed(capsys, "train", path)
    lines = metrics(tmp_path / "run")[1:]
    for step, line in enumerate(lines, start=1):
        answers = read_rollouts(tmp_path / f"run/rollouts/step-{step:06d}.parquet")
        having = [sum(map(ord, a["response"])) % 7 / 7 for a in answers if len(a["response"]) % 2]
        assert 0 < len(having) < len(answers)
        assert line["reward/acc/mean"] == pytest.approx(sum(having) / len(having))
        assert "filter" in sections or line["actor/grad_norm"] > 0
        if step == 3:
            assert line["reward/late/mean"] == 1
    assert "reward/late/mean" not in lines[0]


def test_a_group_is_filtered_by_the_answers_that_have_the_component() -> None:
    looked = FilterSection(metric="acc", min_mean=0.5)

    def group(*accs: float | None) -> Group:
        parts = [{} if acc is None else {"acc": acc} for acc in accs]
        return Group(0, 0, [], [Trajectory(i, [], "stop", "", 1.0, c) for i, c in enumerate(parts)])

    dropped: Counter[str] = Counter()
    groups = [group(1.0, None), group(None, 0.0, 0.0), group(None, None), group(0.0, 1.0)]
    assert passing(groups, looked, dropped) == [groups[0], groups[3]]
    assert dropped == {"too hard": 1, "no acc": 1}
