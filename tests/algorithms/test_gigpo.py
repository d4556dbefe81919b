"""Groups within groups."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hybridflow.algorithms.advantage.gigpo import gigpo
from hybridflow.algorithms.advantage.grpo import grpo

# Of each trajectory: its group, and of each step its reward, the state that it began in, and the mask of its tokens.
step = st.tuples(st.floats(-2, 2), st.integers(0, 2), st.lists(st.booleans(), min_size=1, max_size=3))
trajectories = st.lists(st.lists(step, min_size=1, max_size=5), min_size=4, max_size=6)
Trajectories = list[list[tuple[float, int, list[bool]]]]


def columns(batch: Trajectories) -> dict[str, Tensor]:
    """The reward of a step at its last token with loss, if it has any."""
    reward, number, anchor, mask, trajectory = [], [], [], [], []
    for i, steps in enumerate(batch):
        for s, (r, state, kept) in enumerate(steps):
            last = max((at for at, m in enumerate(kept) if m), default=-1)
            reward += [r if at == last else 0.0 for at in range(len(kept))]
            number += [s] * len(kept)
            anchor += [state] * len(kept)
            mask += kept
            trajectory += [i] * len(kept)
    reward_T, trajectory_T = torch.tensor(reward, dtype=torch.float64), torch.tensor(trajectory)
    return {
        "reward_N": torch.zeros(len(batch)).double().index_add(0, trajectory_T, reward_T),
        "reward_T": reward_T,
        "group_N": torch.tensor([9 if i < 2 else 4 for i in range(len(batch))]),
        "trajectory_T": trajectory_T,
        "mask_T": torch.tensor(mask),
        "step_T": torch.tensor(number),
        "anchor_T": torch.tensor(anchor),
    }


def normalised(value: float, others: list[float], by_std: bool) -> float:
    centered = value - statistics.fmean(others)
    return centered / ((statistics.stdev(others) if len(others) > 1 else 0) + 1e-6) if by_std else centered


def plain(batch: Trajectories, gamma: float, by_std: bool, weight: float) -> list[float]:
    group = [9 if i < 2 else 4 for i in range(len(batch))]
    learned = [[(r, state) for r, state, kept in steps if any(kept)] for steps in batch]
    totals = [sum(r for r, _ in steps) for steps in learned]
    returns = [
        [(sum(gamma**k * r for k, (r, _) in enumerate(steps[s:])), steps[s][1]) for s in range(len(steps))]
        for steps in learned
    ]
    found = []
    for i, steps in enumerate(batch):
        episode = normalised(totals[i], [t for t, g in zip(totals, group) if g == group[i]], by_std)
        own = iter(returns[i])
        for _, _, kept in steps:
            advantage = 0.0
            if any(kept):
                value, state = next(own)
                same = [v for j, rs in enumerate(returns) if group[j] == group[i] for v, x in rs if x == state]
                advantage = episode + weight * normalised(value, same, by_std)
            found += [advantage if m else 0.0 for m in kept]
    return found


@settings(max_examples=40, deadline=None)
@given(trajectories, st.floats(0, 1), st.booleans(), st.floats(0, 2))
def test_against_plain_python(batch: Trajectories, gamma: float, by_std: bool, weight: float) -> None:
    found = gigpo(**columns(batch), normalize_by_std=by_std, gamma=gamma, step_weight=weight)
    expected = plain(batch, gamma, by_std, weight)
    assert found.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5 if by_std else 1e-9)


def test_without_steps_it_is_grpo_from_one_state() -> None:
    given: dict[str, Any] = columns(
        [[(1.0, 0, [True])], [(0.0, 0, [True, True])], [(2.0, 0, [True])], [(2.5, 0, [True])]]
    )
    whole = gigpo(**given, step_weight=0.5)
    del given["step_T"], given["anchor_T"]
    torch.testing.assert_close(gigpo(**given, step_weight=0.5), whole)
    grpo_N = grpo(given["reward_N"], given["group_N"])
    torch.testing.assert_close(whole, 1.5 * grpo_N[given["trajectory_T"]])


def test_equal_rewards_are_worth_exactly_nothing() -> None:
    steps = [(0.1, 0, [True]), (0.7, 1, [True, True])]
    assert gigpo(**columns([steps] * 5), gamma=0.9).eq(0).all()


def test_a_step_that_nobody_else_took_from_its_state_counts_as_its_episode_does() -> None:
    batch: Trajectories = [[(0.0, 0, [True]), (1.0, 1, [True])], [(0.0, 0, [True]), (0.0, 2, [True])]] * 2
    batch = [*batch[:2], [(0.0, 0, [True])], [(0.0, 0, [True])]]
    found = gigpo(**columns(batch), normalize_by_std=False, gamma=0.5)
    assert found.tolist() == [0.5 + 0.25, 0.5, -0.5 - 0.25, -0.5, 0, 0]


def test_steps_without_states_are_refused() -> None:
    given: dict[str, Any] = columns([[(1.0, 0, [True])]] * 4)
    del given["anchor_T"]
    with pytest.raises(ValueError, match="state"):
        gigpo(**given)
