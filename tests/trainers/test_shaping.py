"""What the configuration does to rewards before anything is learnt from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hybridflow.batch import Batch
from hybridflow.config.kinds.rl import RlConfig
from hybridflow.config.load import load_config
from hybridflow.trainers.rl.loop import estimate, next_groups
from hybridflow.trainers.rl.run import open_run
from hybridflow.trainers.rl.shaping import Moments, shaped_rewards, token_rewards

from runs import configuration, metrics, succeed


def batch(rewards: list[float], lengths: list[int], **columns: Any) -> Batch:
    rows = {"loss_mask_T": [[False] + [True] * n for n in lengths], "reward_B": rewards}
    rows["trajectory_B"] = list(range(len(rewards)))
    return Batch.from_rows(rows | columns)


def config_of(folder: Path, **reward: Any) -> RlConfig:
    return load_config(configuration(folder, reward=reward))  # answers of at most 8 tokens


def test_rewards_are_cut_then_shortened_then_scaled(tmp_path: Path) -> None:
    config = config_of(tmp_path, clip=[-1, 1], length_coef=-0.8, overlong_buffer=4, overlong_penalty=0.4)
    rewards, lengths = [3.0, -3.0, 0.5, 0.0], [2, 8, 6, 4]
    found_B = shaped_rewards(batch(rewards, lengths), config, Moments()).reward_B
    expected = [1 - 0.2, -1 - 0.8 - 0.4, 0.5 - 0.6 - 0.2, -0.4]
    assert found_B.tolist() == pytest.approx(expected)
    config = config_of(
        tmp_path, clip=[-1, 1], length_coef=-0.8, overlong_buffer=4, overlong_penalty=0.4, normalize="step"
    )
    shaped = shaped_rewards(batch(rewards, lengths), config, Moments())
    assert shaped.moments == Moments(), "they are of steps that count on"
    plain_B = torch.tensor(expected)
    torch.testing.assert_close(shaped.reward_B, (plain_B - plain_B.mean()) / plain_B.std(correction=0))


def test_running_moments_are_those_of_all_rewards_so_far(tmp_path: Path) -> None:
    config, moments = config_of(tmp_path, normalize="running"), Moments()
    torch.manual_seed(0)
    steps = [3 + 2 * torch.randn(n) for n in (1, 5, 40)]
    for i, reward_B in enumerate(steps):
        found = batch(reward_B.tolist(), [2] * len(reward_B), baseline_B=(reward_B + 1).tolist())
        given_B = found["baseline_B"].clone()
        shaped = shaped_rewards(found, config, moments)
        moments, shaped_B = shaped.moments, shaped.reward_B
        assert torch.equal(found["baseline_B"], given_B) and shaped.baseline_B is not None
        so_far_B = torch.cat(steps[: i + 1]).double()
        if i:  # one reward alone has no deviation
            expected_B = (reward_B - so_far_B.mean()) / so_far_B.std(correction=0)
            torch.testing.assert_close(shaped_B.double(), expected_B.double(), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(
                shaped.baseline_B - shaped_B, torch.ones(1).expand(len(shaped_B)) / so_far_B.std(correction=0).float()
            )
    assert moments.count == 46


def test_a_run_that_goes_on_knows_all_rewards_so_far(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ends = []
    for name, steps in [("whole", [4]), ("parts", [2, 4])]:
        folder = tmp_path / name
        folder.mkdir()
        for count in steps:
            reward = {"normalize": "running"}
            file = configuration(folder, reward=reward, train={"steps": count}, checkpoint={"every": 1})
            succeed(capsys, "train", file)
        ends.append(
            [{k: v for k, v in m.items() if k.startswith(("critic/", "actor/"))} for m in metrics(folder / "run")]
        )
    assert ends[0] == ends[1]
    assert ends[0][-1]["critic/rewards/mean"] != ends[0][-1]["critic/score/mean"]


def test_rewards_of_steps_lie_on_their_tokens_and_the_rest_on_the_last() -> None:
    rows = batch([1.5, 2.0], [3, 2], step_reward_T=[[0, 0.25, 0, 0.5], [0, 0.0, 0.0]])
    assert token_rewards(rows).tolist() == [0, 0.25, 0, 0.5 + 0.75, 0, 0, 2.0]
    assert token_rewards(rows, torch.tensor([0.0, 1.0])).tolist() == [0, 0.25, 0, 0.5 - 0.75, 0, 0, 1.0]


STEPS = """
def score(response):
    ends = [i + 1 for i in range(len(response)) if i % 2]
    return {"score": 0.5, "steps": [(end, ord(response[end - 1]) / 100) for end in ends]}
"""


def test_rewards_of_steps_reach_the_tokens_that_end_them(tmp_path: Path) -> None:
    (tmp_path / "steps.py").write_text(STEPS)
    config = config_of(tmp_path, function=f"{tmp_path}/steps.py:score")
    with open_run(config) as run:
        groups, _ = next_groups(run, 1)
        batch, _ = estimate(run, groups)
        checked = 0
        for i, t in enumerate(t for g in groups for t in g.trajectories):
            expected = [0.0] * len(t.token_ids)
            for end in range(2, len(t.response) + 1, 2):
                first = next(m for m in range(len(t.token_ids) + 1) if len(run.source.decode(t.token_ids[:m])) >= end)
                expected[first - 1] += ord(t.response[end - 1]) / 100
                checked += 1
            assert t.reward == pytest.approx(0.5 + sum(expected))
            expected[-1] += 0.5
            own_T = batch.rows("reward_T")[i][batch.rows("loss_mask_T")[i]]
            assert own_T.tolist() == pytest.approx(expected)
        assert checked > 6
