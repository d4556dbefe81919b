"""Group-relative advantages."""

from __future__ import annotations

import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybridflow.algorithms.advantage.grpo import grpo

from golden import golden_batch

groups = st.lists(st.lists(st.floats(-10, 10), min_size=2, max_size=6), min_size=1, max_size=5)


@pytest.mark.parametrize(
    ("normalize", "expected"),
    [(True, [0.707106, -0.707106, 0.707105, -0.707105]), (False, [0.5, -0.5, 0.375, -0.375])],
)
def test_golden_numbers(normalize: bool, expected: list[float]) -> None:
    batch = golden_batch()
    advantage = grpo(batch["reward_B"], batch["group_B"], normalize_by_std=normalize)
    assert advantage.tolist() == pytest.approx(expected, abs=6e-7)


@given(groups, st.randoms(use_true_random=False), st.booleans())
def test_against_plain_python(groups: list[list[float]], random: object, normalize: bool) -> None:
    members = [(g * 13 - 5, reward) for g, rewards in enumerate(groups) for reward in rewards]
    random.shuffle(members)  # type: ignore[attr-defined]
    reward_N = torch.tensor([r for _, r in members], dtype=torch.float64)
    advantage_N = grpo(reward_N, torch.tensor([g for g, _ in members]), normalize_by_std=normalize)
    for (group, reward), advantage in zip(members, advantage_N.tolist()):
        others = [r for g, r in members if g == group]
        expected = reward - statistics.fmean(others)
        if normalize:
            expected /= statistics.stdev(others) + 1e-6
        assert advantage == pytest.approx(expected, abs=1e-7)


@given(st.floats(-1000, 1000, width=32), st.integers(2, 9), st.booleans())
def test_equal_rewards_are_worth_exactly_nothing(reward: float, size: int, normalize: bool) -> None:
    rewards, group = torch.tensor([reward] * size + [0.0, 1.0]), torch.tensor([0] * size + [1, 1])
    advantage = grpo(rewards, group, normalize_by_std=normalize)
    assert advantage[:size].tolist() == [0.0] * size
    assert advantage[size:].abs().min() > 0.4


def test_a_single_answer_is_refused() -> None:
    with pytest.raises(ValueError, match="single trajectory"):
        grpo(torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0, 0, 1]))


def test_no_answers_are_no_error() -> None:
    assert grpo(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).shape == (0,)
