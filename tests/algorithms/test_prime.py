"""PRIME's rewards, loss and advantage, against the paper's equations in plain Python."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridflow.algorithms.prime import outcome_loss, prime, process_rewards
from hybridflow.batch import Batch

from golden import golden_batch

logp = st.floats(-20, 0)
tokens = st.lists(st.tuples(logp, logp), min_size=1, max_size=5)
# Tokens of each answer (whether they carry loss, and their process reward), its outcome, its group.
answer = st.tuples(
    st.lists(st.tuples(st.booleans(), st.floats(-2, 2)), min_size=1, max_size=6), st.floats(-1, 1), st.integers(0, 2)
)
examples = settings(max_examples=30, deadline=None)


@given(st.lists(st.tuples(tokens, st.sampled_from([0.0, 0.3, 1.0])), min_size=1, max_size=5), st.floats(0.01, 1))
@examples
def test_loss_and_gradient_of_the_reward_model(
    rows: list[tuple[list[tuple[float, float]], float]], beta: float
) -> None:
    pairs = [pair for row, _ in rows for pair in row]
    logp_M, ref_M = (torch.tensor(x, dtype=torch.float64) for x in zip(*pairs))
    sequence_M = torch.tensor([i for i, (row, _) in enumerate(rows) for _ in row])
    outcome_M = torch.tensor([outcome for row, outcome in rows for _ in row], dtype=torch.float64)
    loss_M, metrics = outcome_loss(logp_M.requires_grad_(), ref_M, outcome_M, sequence_M, beta=beta)
    weight_M = torch.tensor([1 / len(row) for row, _ in rows for _ in row], dtype=torch.float64)
    (slope_M,) = torch.autograd.grad((loss_M * weight_M).sum(), logp_M)  # each answer once
    for i, (row, outcome) in enumerate(rows):
        reward = sum(beta * (a - b) for a, b in row)
        p = 1 / (1 + math.exp(-reward))
        own = sequence_M == i
        expected = -outcome * math.log(p) - (1 - outcome) * math.log(1 - p)
        assert loss_M[own].tolist() == pytest.approx([expected] * len(row), abs=1e-7)
        assert slope_M[own].tolist() == pytest.approx([beta * (p - outcome)] * len(row), abs=1e-9)
        assert metrics["prm_accuracy"][own].tolist() == [float((reward > 0) == (outcome > 0.5))] * len(row)
        assert metrics["prm_reward"][own].tolist() == pytest.approx([reward] * len(row), abs=1e-9)


@pytest.mark.parametrize("size", [-4000.0, -40.0, 40.0, 4000.0])
def test_answers_of_any_reward_have_a_finite_loss_and_gradient(size: float) -> None:
    logp_M = torch.tensor([size], requires_grad=True)
    nothing_M = torch.zeros(1)
    for outcome in (0.0, 1.0):
        loss_M, _ = outcome_loss(logp_M, nothing_M, nothing_M + outcome, nothing_M.long(), beta=1.0)
        (slope_M,) = torch.autograd.grad(loss_M.sum(), logp_M)
        assert float(loss_M.detach()) == pytest.approx(max(0.0, -size if outcome else size), abs=1e-6)
        assert float(slope_M) == pytest.approx((size > 0) - outcome, abs=1e-6)


def reference(rows: list[tuple[list[tuple[bool, float]], float, int]], gamma: float) -> list[list[float]]:
    """The paper's advantage; 0 where there is no loss."""
    kept = [[r for mask, r in row if mask] for row, _, _ in rows]
    means = [sum(r) / len(r) if r else 0.0 for r in kept]
    result = []
    for i, (row, outcome, group) in enumerate(rows):
        others = [j for j, (_, _, g) in enumerate(rows) if g == group and j != i]
        base = sum(means[j] for j in others) / len(others)
        first = outcome - sum(rows[j][1] for j in others) / len(others)
        advantages, place = [], 0
        for mask, _ in row:
            after = [gamma**s * (r - base) for s, r in enumerate(kept[i][place:])]
            advantages.append(sum(after) + first if mask else 0.0)
            place += mask
        result.append(advantages)
    return result


@given(st.lists(answer, min_size=1, max_size=4), st.floats(0, 1))
@examples
def test_the_advantage(half: list[tuple[list[tuple[bool, float]], float, int]], gamma: float) -> None:
    rows = half + [(row[::-1], -outcome, group) for row, outcome, group in half]  # every group has two members or more
    where = [(i, place) for i, (row, _, _) in enumerate(rows) for place in range(len(row))]
    where.sort(key=lambda w: w[1] >= 2)  # two sequences each: the second ones come behind all the first ones
    mask_T = torch.tensor([rows[i][0][place][0] for i, place in where])
    process_T = torch.tensor([rows[i][0][place][1] for i, place in where], dtype=torch.float64)
    reward_N = torch.tensor([outcome for _, outcome, _ in rows], dtype=torch.float64)
    group_N = torch.tensor([group for *_, group in rows])
    found_T = prime(process_T, reward_N, group_N, torch.tensor([i for i, _ in where]), mask_T, gamma=gamma)
    expected = reference(rows, gamma)
    assert found_T.tolist() == pytest.approx([expected[i][place] for i, place in where], abs=1e-9)


def advantages_of(batch: Batch, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    process_T = change(process_rewards(batch["new_T"], batch["old_T"], beta=0.5))
    return prime(process_T, torch.full((4,), 0.3), batch["group_B"], batch.sequence_of(), batch["loss_mask_T"])


def test_equal_outcomes_and_no_process_reward_give_exactly_nothing() -> None:
    assert advantages_of(golden_batch(), torch.zeros_like).eq(0).all()


def test_with_equal_outcomes_tokens_that_the_reward_model_likes_come_out_ahead() -> None:
    advantage_T = advantages_of(golden_batch(), lambda x: x)
    # First answer: rewards .05 -.1 .15, the other answer of its group has the mean -.0225.
    assert advantage_T[:4].tolist() == pytest.approx([0, 0.1 + 3 * 0.0225, 0.05 + 2 * 0.0225, 0.15 + 0.0225], abs=1e-6)


def test_a_lone_answer_has_nothing_to_be_compared_with() -> None:
    one = torch.ones(1)
    with pytest.raises(ValueError, match="a group has a single trajectory"):
        prime(one, one, one.long(), torch.zeros(1).long(), one.bool())
