"""Estimators with one advantage per trajectory, against their papers' equations in plain Python."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridflow.algorithms.advantage.gdpo import gdpo
from hybridflow.algorithms.advantage.gpg import gpg
from hybridflow.algorithms.advantage.grpo import grpo
from hybridflow.algorithms.advantage.grpo_passk import grpo_passk
from hybridflow.algorithms.advantage.maxrl import maxrl
from hybridflow.algorithms.advantage.opo import opo
from hybridflow.algorithms.advantage.reinforce_plus_plus_baseline import reinforce_plus_plus_baseline
from hybridflow.algorithms.advantage.rloo import rloo
from hybridflow.errors import UserError

from golden import GROUP, LENGTHS, REWARD

# Of each group, the members' (reward, number of tokens with loss).
reward = st.floats(-3, 3) | st.sampled_from([0.0, 1.0])
groups = st.lists(st.lists(st.tuples(reward, st.integers(0, 9)), min_size=2, max_size=5), min_size=1, max_size=4)
Groups = list[list[tuple[float, int]]]


def of_rewards(function: Callable[..., torch.Tensor], **values: Any) -> Callable[..., torch.Tensor]:
    return lambda reward_N, group_N, length_N: function(reward_N, group_N, **values)


def mean_and_std(rewards: list[float]) -> tuple[float, float]:
    return statistics.fmean(rewards), statistics.stdev(rewards) + 1e-6


def plain_passk(batch: Groups, by_std: bool) -> list[float]:
    found = []
    for group in batch:
        rewards = [r for r, _ in group]
        for i in range(len(rewards)):
            lead = max(rewards) - max(rewards[:i] + rewards[i + 1 :])
            found.append(lead / mean_and_std(rewards)[1] if by_std else lead)
    return found


def plain_rloo(batch: Groups) -> list[float]:
    return [
        r - statistics.fmean(x for j, (x, _) in enumerate(group) if j != i)
        for group in batch
        for i, (r, _) in enumerate(group)
    ]


def plain_opo(batch: Groups) -> list[float]:
    found = []
    for group in batch:
        tokens = sum(n for _, n in group)
        baseline = sum(r * n for r, n in group) / tokens if tokens else min(r for r, _ in group)
        found += [r - baseline for r, _ in group]
    return found


def plain_gpg(batch: Groups) -> list[float]:
    silent = sum(len(group) for group in batch if len({r for r, _ in group}) == 1)
    total = sum(len(group) for group in batch)
    alpha = total / (total - silent) if total > silent else 1.0
    return [alpha * (r - statistics.fmean(x for x, _ in group)) for group in batch for r, _ in group]


def plain_baseline(batch: Groups) -> list[float]:
    centered = [(r - statistics.fmean(x for x, _ in group), n) for group in batch for r, n in group]
    tokens = [c for c, n in centered for _ in range(n)]
    if len(tokens) < 2:
        return [0.0] * len(centered)
    mean, scale = statistics.fmean(tokens), (statistics.variance(tokens) + 1e-8) ** 0.5
    return [(c - mean) / scale for c, _ in centered]


CASES: dict[str, tuple[Callable[..., torch.Tensor], Callable[[Groups], list[float]]]] = {
    "pass@k": (of_rewards(grpo_passk, normalize_by_std=False), lambda batch: plain_passk(batch, False)),
    "pass@k by std": (of_rewards(grpo_passk), lambda batch: plain_passk(batch, True)),
    "rloo": (of_rewards(rloo), plain_rloo),
    "opo": (opo, plain_opo),
    "gpg": (of_rewards(gpg), plain_gpg),
    "reinforce_plus_plus_baseline": (reinforce_plus_plus_baseline, plain_baseline),
}
# Those whose advantages are differences within the group, whatever the other groups.
WITHIN = {**CASES, "maxrl": (of_rewards(maxrl), None), "grpo": (of_rewards(grpo), None)}
del WITHIN["reinforce_plus_plus_baseline"]


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=30, deadline=None)
@given(groups, st.randoms(use_true_random=False))
def test_against_plain_python(name: str, batch: Groups, random: Any) -> None:
    function, reference = CASES[name]
    members = [(3 - 5 * g, r, n) for g, group in enumerate(batch) for r, n in group]
    order = list(range(len(members)))
    random.shuffle(order)
    groups_of, rewards, lengths = zip(*[members[i] for i in order])
    reward_N = torch.tensor(rewards, dtype=torch.float64)
    found = function(reward_N, torch.tensor(groups_of), torch.tensor(lengths))
    expected = reference(batch)
    assert found.tolist() == pytest.approx([expected[i] for i in order], rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (of_rewards(rloo), [1, -1, 0.75, -0.75]),
        (opo, [0.571429, -0.428571, 0.5, -0.25]),
        (of_rewards(grpo_passk), [1.414212, 0, 1.414211, 0]),
        (reinforce_plus_plus_baseline, [1.31307, -0.889499, 1.037749, -0.614178]),
        # The other implementation counts the one reward of 0 as no signal: 4 / 3 of these.
        (of_rewards(gpg), [0.666667 * 0.75, -0.666667 * 0.75, 0.5 * 0.75, -0.5 * 0.75]),
    ],
)
def test_golden_numbers(function: Callable[..., torch.Tensor], expected: list[float]) -> None:
    found = function(torch.tensor(REWARD), torch.tensor(GROUP), torch.tensor(LENGTHS))
    assert found.tolist() == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("name", WITHIN)
@settings(max_examples=30, deadline=None)
@given(st.floats(0, 1000, width=32), st.integers(2, 9))
def test_equal_rewards_are_worth_exactly_nothing(name: str, reward: float, size: int) -> None:
    rewards, group = torch.tensor([reward] * size + [0.0, 1.0]), torch.tensor([0] * size + [1, 1])
    found = WITHIN[name][0](rewards, group, torch.arange(size + 2))
    assert found[:size].tolist() == [0.0] * size
    assert found[size:].abs().max() > 0


@pytest.mark.parametrize("name", [*WITHIN, "reinforce_plus_plus_baseline"])
def test_single_answers_are_refused_and_none_at_all_are_no_error(name: str) -> None:
    function = {**CASES, **WITHIN}[name][0]
    with pytest.raises(ValueError, match="single trajectory"):
        function(torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0, 0, 1]), torch.tensor([1, 1, 1]))
    none = torch.zeros(0)
    assert function(none, none.long(), none.long()).shape == (0,)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.floats(0.01, 3) | st.just(0.0), min_size=2, max_size=5), min_size=1, max_size=4))
def test_maxrl_divides_by_the_groups_mean(batch: list[list[float]]) -> None:
    reward_N = torch.tensor([r for group in batch for r in group], dtype=torch.float64)
    group_N = torch.tensor([g for g, group in enumerate(batch) for _ in group])
    expected = []
    for group in batch:
        mean = statistics.fmean(group)
        expected += [(r - mean) / mean if mean else 0.0 for r in group]
    assert maxrl(reward_N, group_N).tolist() == pytest.approx(expected, abs=1e-9)


def test_maxrl_averages_the_gradient_of_right_answers_less_that_of_all() -> None:
    """The paper's estimator, 1 / K sum over the K right ones of g_i, less the mean of all g as a control variate."""
    reward_N, gradient_N = torch.tensor([1.0, 0, 0, 1, 0]), torch.tensor([0.3, -2.0, 0.7, 1.1, 0.2])
    expected = gradient_N[reward_N == 1].mean() - gradient_N.mean()
    assert float((maxrl(reward_N, torch.zeros(5)) * gradient_N).mean()) == pytest.approx(float(expected))


def test_maxrl_refuses_negative_rewards() -> None:
    with pytest.raises(UserError, match=r"a reward of -0\.5"):
        maxrl(torch.tensor([1.0, -0.5]), torch.tensor([0, 0]))


def test_gpg_makes_up_for_groups_without_a_signal() -> None:
    reward_N, group_N = torch.tensor([1.0, 0, 1, 1, 0, 0, 3, 1]), torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    assert gpg(reward_N, group_N).tolist() == [1, -1, 0, 0, 0, 0, 2, -2]  # half of the batch learns: twice as much
    assert gpg(reward_N + 5, group_N).tolist() == [1, -1, 0, 0, 0, 0, 2, -2]


components = st.lists(
    st.lists(st.tuples(*[st.sampled_from([0.0, 0.25, 1.0, 40.0])] * 3), min_size=2, max_size=5), min_size=1, max_size=4
)


@settings(max_examples=30, deadline=None)
@given(components, st.none() | st.tuples(*[st.floats(0.1, 2)] * 3))
def test_gdpo_against_plain_python(batch: list[list[tuple[float, ...]]], weights: tuple[float, ...] | None) -> None:
    sums = []
    for group in batch:
        columns = [mean_and_std(list(column)) for column in zip(*group)]
        for member in group:
            normalised = [(r - mean) / std for r, (mean, std) in zip(member, columns)]
            sums.append(sum(w * a for w, a in zip(weights or (1, 1, 1), normalised)))
    scale = statistics.stdev(sums) + 1e-6
    mean = statistics.fmean(sums)
    components_NK = torch.tensor([member for group in batch for member in group], dtype=torch.float64)
    group_N = torch.tensor([g for g, group in enumerate(batch) for _ in group])
    found = gdpo(components_NK, group_N, reward_weights=weights)
    assert found.tolist() == pytest.approx([(s - mean) / scale for s in sums], abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.lists(st.none() | st.sampled_from([0.0, 0.25, 1.0]), min_size=2, max_size=5), min_size=1, max_size=4)
)
def test_gdpo_of_a_component_that_some_lack(batch: list[list[float | None]]) -> None:
    """It is that of the others alone; whoever lacks it, or is alone in having it, gets nothing from it."""
    sums = []
    for group in batch:
        having = [r for r in group if r is not None]
        mean, std = mean_and_std(having) if len(having) > 1 else (0.0, 1.0)
        sums += [0.0 if r is None or len(having) < 2 else (r - mean) / std for r in group]
    group_N = torch.tensor([g for g, group in enumerate(batch) for _ in group])
    lacking = [torch.nan if r is None else r for group in batch for r in group]
    scale = statistics.stdev(sums) + 1e-6
    component_N = torch.tensor(lacking, dtype=torch.float64)
    found_N = gdpo(component_N[:, None], group_N)
    assert found_N.tolist() == pytest.approx([s / scale for s in sums], abs=1e-6)
    whole_N = torch.arange(len(lacking)) % 3 / 2  # beside one that nobody lacks
    both_N = gdpo(torch.stack([component_N, whole_N], 1), group_N, reward_weights=[0.0, 1.0])
    assert both_N.tolist() == pytest.approx(gdpo(whole_N[:, None], group_N).tolist(), abs=1e-6)


def test_gdpo_keeps_answers_apart_whose_rewards_have_equal_sums() -> None:
    """The paper's figure 2: of two answers with rewards (0, 1) and (0, 2), GRPO sees the same as with (0, 1) twice."""
    one = gdpo(torch.tensor([[0.0, 0], [0, 1], [0, 0], [1, 1]]), torch.tensor([0, 0, 1, 1]))
    assert float(one[3] / one[1]) == pytest.approx(2, abs=1e-5)
    assert gdpo(torch.zeros(4, 2), torch.tensor([0, 0, 1, 1])).tolist() == [0, 0, 0, 0]
    assert gdpo(torch.zeros(0, 2), torch.zeros(0)).shape == (0,)


def test_gdpo_needs_a_weight_for_each_component() -> None:
    with pytest.raises(ValueError, match="zip"):
        gdpo(torch.zeros(4, 2), torch.tensor([0, 0, 1, 1]), reward_weights=[1.0])
