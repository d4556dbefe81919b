"""Estimators with an advantage per token, against their papers' equations in plain Python."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hybridflow.algorithms.advantage.distillation import distillation
from hybridflow.algorithms.advantage.optimal_token_baseline import optimal_token_baseline, tir_optimal_token_baseline
from hybridflow.algorithms.advantage.registry import advantage_columns
from hybridflow.algorithms.advantage.reinforce_plus_plus import reinforce_plus_plus
from hybridflow.algorithms.advantage.remax import remax
from hybridflow.algorithms.advantage.timeline import BLOCK, Timeline, discounted_sums, running_sums

from golden import REF_CHANGE, golden_batch

# A token: reward, log-probability, sum of squared probabilities, weight, whether it carries loss.
token = st.builds(
    lambda reward, logp, rest, weight, mask: (reward, logp, math.exp(2 * logp) + rest, weight, mask),
    *[st.floats(-2, 2), st.floats(-3, -0.05), st.floats(0, 0.3), st.floats(0.1, 2), st.booleans()],
)
sequence = st.lists(token, min_size=1, max_size=6)
Token = tuple[float, float, float, float, bool]


class Case:
    """Sequences of trajectories 0..N-1, each with one at least, in any order."""

    def __init__(self, first: list[list[Token]], more: list[tuple[int, list[Token]]], random: Any) -> None:
        self.count = len(first)
        rows = [*enumerate(first), *((i % self.count, row) for i, row in more)]
        random.shuffle(rows)
        self.trajectory = [i for i, row in rows for _ in row]
        self.tokens = [t for _, row in rows for t in row]
        self.group = [7 if i < 2 else 3 if i < self.count - self.count % 2 else 7 for i in range(self.count)]

    def column(self, field: int) -> Tensor:
        return torch.tensor([t[field] for t in self.tokens], dtype=torch.bool if field == 4 else torch.float64)

    def of(self, i: int) -> list[int]:
        """Places of a trajectory's tokens with loss."""
        return [at for at, (owner, t) in enumerate(zip(self.trajectory, self.tokens)) if owner == i and t[4]]

    def to_come(self, i: int, gamma: float) -> list[float]:
        rewards = [self.tokens[at][0] for at in self.of(i)]
        return [sum(gamma**k * r for k, r in enumerate(rewards[t:])) for t in range(len(rewards))]


cases = st.builds(
    Case,
    st.lists(sequence, min_size=4, max_size=6),
    st.lists(st.tuples(st.integers(0, 5), sequence), max_size=3),
    st.randoms(use_true_random=False),
)


@settings(max_examples=30, deadline=None)
@given(cases, st.floats(0, 1))
def test_remax_against_plain_python(case: Case, gamma: float) -> None:
    baseline = [0.3 * i - 0.5 for i in range(case.count)]
    expected = [0.0] * len(case.tokens)
    for i in range(case.count):
        for at, value in zip(case.of(i), case.to_come(i, gamma)):
            expected[at] = value - baseline[i]
    found = remax(
        case.column(0), torch.tensor(baseline).double(), case.column(4), torch.tensor(case.trajectory), gamma=gamma
    )
    assert found.tolist() == pytest.approx(expected, abs=1e-7)


@settings(max_examples=30, deadline=None)
@given(cases, st.floats(0, 1))
def test_reinforce_plus_plus_against_plain_python(case: Case, gamma: float) -> None:
    returns = {at: value for i in range(case.count) for at, value in zip(case.of(i), case.to_come(i, gamma))}
    expected = [0.0] * len(case.tokens)
    if len(returns) > 1:
        mean, scale = statistics.fmean(returns.values()), (statistics.variance(returns.values()) + 1e-8) ** 0.5
        for at, value in returns.items():
            expected[at] = (value - mean) / scale
    found = reinforce_plus_plus(case.column(0), case.column(4), torch.tensor(case.trajectory), gamma=gamma)
    assert found.tolist() == pytest.approx(expected, abs=1e-6)


def plain_baseline(case: Case, only_loss: bool, weighted: bool) -> list[float]:
    """The estimator of the paper, with a baseline of 0 where a single trajectory of the group is left."""
    at_time: dict[tuple[int, int], list[tuple[float, float, int]]] = {}
    for i in range(case.count):
        path, own = 0.0, [at for at, owner in enumerate(case.trajectory) if owner == i]
        for at, value in zip(case.of(i), case.to_come(i, 1.0)):
            _, logp, squares, weight, _ = case.tokens[at]
            path += (1 - 2 * math.exp(logp) + squares) * (weight**2 if weighted else 1)
            time = case.of(i).index(at) if only_loss else own.index(at) - own.index(case.of(i)[0])
            at_time.setdefault((case.group[i], time), []).append((path, value, at))
    advantages = [0.0] * len(case.tokens)
    for members in at_time.values():
        total = sum(path for path, _, _ in members)
        baseline = sum(path * value for path, value, _ in members) / total if len(members) > 1 else 0.0
        for _, value, at in members:
            advantages[at] = value - baseline
    return advantages


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("only_loss", [False, True])
@settings(max_examples=30, deadline=None)
@given(cases)
def test_the_optimal_token_baseline_against_plain_python(only_loss: bool, weighted: bool, case: Case) -> None:
    function = tir_optimal_token_baseline if only_loss else optimal_token_baseline
    trajectory_T, mask_T = torch.tensor(case.trajectory), case.column(4)
    reward_N = torch.zeros(case.count).double().index_add(0, trajectory_T, case.column(0) * mask_T)
    group_N = torch.tensor(case.group)
    columns = case.column(0), case.column(1), case.column(2), group_N, trajectory_T, mask_T
    found = function(reward_N, *columns, case.column(3) if weighted else None)
    assert found.tolist() == pytest.approx(plain_baseline(case, only_loss, weighted), abs=1e-6)


def otb_columns(rewards: list[float], lengths: list[int]) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)
    reward_T = torch.cat([torch.tensor([0.0] * (n - 1) + [r]) for r, n in zip(rewards, lengths)])
    return {
        "reward_N": torch.tensor(rewards),
        "reward_T": reward_T,
        "old_logp_T": -torch.rand(len(reward_T), generator=rng),
        "sum_pi_squared_T": torch.rand(len(reward_T), generator=rng),
        "group_N": torch.zeros(len(rewards)),
        "trajectory_T": torch.repeat_interleave(torch.arange(len(rewards)), torch.tensor(lengths)),
        "mask_T": torch.ones(len(reward_T), dtype=torch.bool),
    }


@pytest.mark.parametrize("function", [optimal_token_baseline, tir_optimal_token_baseline])
def test_equal_rewards_at_the_end_are_worth_nothing_until_one_answer_is_left(function: Any) -> None:
    found = function(**otb_columns([0.7, 0.7, 0.7], [3, 5, 9]))
    assert found[:3].eq(0).all() and found[3:8].eq(0).all() and found[8:13].eq(0).all()
    assert found[13:].tolist() == pytest.approx([0.7] * 4)


@pytest.mark.parametrize("function", [optimal_token_baseline, tir_optimal_token_baseline])
def test_a_policy_without_a_choice_has_a_finite_baseline(function: Any) -> None:
    columns = otb_columns([1.0, 0.0], [2, 2])
    columns |= {"old_logp_T": torch.zeros(4), "sum_pi_squared_T": torch.ones(4)}
    assert function(**columns).isfinite().all()
    with pytest.raises(ValueError, match="single trajectory"):
        function(**columns | {"group_N": torch.tensor([0, 1])})


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("remax", [[0.5] * 3, [0.0] * 4, [0.25] * 2, [-0.25] * 4]),
        ("optimal_token_baseline", None),
        ("tir_optimal_token_baseline", None),
        ("reinforce_plus_plus", [[1.502929, 1.522745, 1.54276]]),
        ("distillation", REF_CHANGE),
    ],
)
def test_golden_numbers(name: str, expected: list[list[float]] | None) -> None:
    otb = [[0.352244, 0.161254, 0.328686], [-0.647756, -0.838746, -0.671314, 0], [0.080613, 0.308475]]
    otb += [[-0.669387, -0.441525, -0.25, -0.25]]
    batch = golden_batch()
    batch["old_logp_T"] = batch["old_T"]
    batch["ref_logp_T"] = batch["old_T"] + torch.tensor([x for row in REF_CHANGE for x in [0.0, *row]])
    batch["sum_pi_squared_T"] = torch.full((batch.total(),), 0.3)
    batch["baseline_B"] = torch.tensor([0.5, 0, 0.25, 0])
    gamma = 0.99 if name == "reinforce_plus_plus" else 1.0
    found = advantage_columns(name, batch, {"gamma": gamma})["advantage_T"]
    rows = [found[a:b] for a, b in zip(batch.offsets["T"][:-1], batch.offsets["T"][1:])]
    for row, wanted in zip(rows, expected or otb):
        assert row.tolist() == pytest.approx([0.0, *wanted], abs=2e-6)


def test_distillation_has_the_gradient_of_the_reverse_divergence() -> None:
    """Of one token, summed over what may be drawn: the policy gradient is minus that of KL(student || teacher)."""
    logits = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([1.0, 0.3, 0.2], dtype=torch.float64).log_softmax(-1)
    logp = logits.log_softmax(-1)
    (slope,) = torch.autograd.grad((logp.exp() * (logp - teacher)).sum(), logits, retain_graph=True)
    p = logp.detach()
    advantage = distillation(teacher, p, torch.ones(3, dtype=torch.bool))
    (found,) = torch.autograd.grad((-p.exp() * advantage * logp).sum(), logits)
    torch.testing.assert_close(found, slope)
    assert distillation(teacher, p, torch.tensor([True, False, True]))[1] == 0


@pytest.mark.parametrize("length", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, BLOCK**2 + 5])
def test_sums_of_any_length_are_those_of_the_recursion(length: int) -> None:
    rng = torch.Generator().manual_seed(length)
    lengths, decay_N = torch.tensor([3, length, 0, 700]), torch.tensor([0.5, 0.999, 0.1, 0.0]).double()
    value_M = torch.randn(int(lengths.sum()), generator=rng, dtype=torch.float64)
    expected, forward = [], []
    for part, decay in zip(value_M.split(lengths.tolist()), decay_N.tolist()):
        total, own = 0.0, []
        for x in reversed(part.tolist()):
            total = x + decay * total
            own.append(total)
        expected += own[::-1]
        forward += part.cumsum(0).tolist()
    assert discounted_sums(value_M, lengths, decay_N).tolist() == pytest.approx(expected, abs=1e-11)
    assert running_sums(value_M, lengths).tolist() == pytest.approx(forward, abs=1e-11)


def test_what_is_put_back_is_what_was_taken() -> None:
    mask_T = torch.tensor([True, False, True, True, False, True])
    value_T = torch.arange(6.0) + 1
    for trajectories in ([0, 0, 1, 1, 3, 3], [2, 2, 0, 1, 1, 2]):
        time = Timeline.of(mask_T, torch.tensor(trajectories))
        assert time.put(time.take(value_T)).tolist() == (value_T * mask_T).tolist()
        owner_M = time.take(torch.tensor(trajectories))
        assert owner_M.equal(owner_M.sort().values) and owner_M.equal(time.spread(torch.arange(len(time.length_N))))
