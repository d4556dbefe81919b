"""Generalised advantage estimation on ragged tokens."""

from __future__ import annotations

import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hybridflow.algorithms.advantage.gae import gae
from hybridflow.algorithms.advantage.vapo_gae import vapo_gae
from hybridflow.algorithms.whitening import whiten

from golden import golden_batch

# Sequences of (reward, value, whether it carries loss).
number = st.floats(-3, 3)
sequences = st.lists(st.lists(st.tuples(number, number, st.booleans()), min_size=1, max_size=7), min_size=1, max_size=5)
shares = st.floats(0, 1)


def tensors(rows: list[list[tuple[float, float, bool]]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rewards, values, mask and trajectory: each sequence is one."""
    reward_T, value_T = (torch.tensor([t[i] for row in rows for t in row], dtype=torch.float64) for i in (0, 1))
    mask_T = torch.tensor([t[2] for row in rows for t in row], dtype=torch.bool)
    return reward_T, value_T, mask_T, torch.tensor([i for i, row in enumerate(rows) for _ in row])


def test_golden_numbers() -> None:
    batch = golden_batch()
    columns = batch["reward_T"], batch["value_T"], batch["loss_mask_T"], batch.sequence_of()
    advantage_T, return_T = gae(*columns, gamma=0.99, lam=0.95)
    assert advantage_T[1:4].tolist() == pytest.approx([1.735668, 1.608297, 1.475421], abs=2e-6)
    assert advantage_T[-4:].tolist() == pytest.approx([-0.432061, -0.701676, -0.985797, -1.285339], abs=2e-6)
    assert return_T[1:4].tolist() == pytest.approx([0.908407, 0.95535, 1.0], abs=1e-6)


def brute_force(tokens: list[tuple[float, float, bool]], gamma: float, lam: float) -> list[float]:
    """The definition: A_t = sum over k of (gamma lam)^k delta_{t+k}, over the tokens that carry loss."""
    kept = [(r, v) for r, v, mask in tokens if mask]
    deltas = [r + gamma * (kept[i + 1][1] if i + 1 < len(kept) else 0.0) - v for i, (r, v) in enumerate(kept)]
    found = iter(sum((gamma * lam) ** k * d for k, d in enumerate(deltas[i:])) for i in range(len(kept)))
    return [next(found) if mask else 0.0 for _, _, mask in tokens]


def whitened(rows: list[list[tuple[float, float, bool]]], advantages: list[float]) -> list[float]:
    mask = [m for row in rows for _, _, m in row]
    kept = [a for a, m in zip(advantages, mask) if m]
    if len(kept) < 2:
        return [0.0] * len(mask)
    mean, scale = statistics.fmean(kept), (statistics.variance(kept) + 1e-8) ** 0.5
    return [(a - mean) / scale if m else 0.0 for a, m in zip(advantages, mask)]


@given(sequences, shares, shares)
def test_against_the_definition(rows: list[list[tuple[float, float, bool]]], gamma: float, lam: float) -> None:
    expected = [a for row in rows for a in brute_force(row, gamma, lam)]
    advantage_T, return_T = gae(*tensors(rows), gamma=gamma, lam=lam)
    returns = [a + v if mask else 0.0 for a, (_, v, mask) in zip(expected, [t for row in rows for t in row])]
    assert return_T.tolist() == pytest.approx(returns, abs=1e-12)
    assert advantage_T.tolist() == pytest.approx(whitened(rows, expected), abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(sequences, shares, shares, shares, st.none() | st.floats(0.05, 3))
def test_vapo_has_a_lambda_for_the_critic_and_one_for_the_length(
    rows: list[list[tuple[float, float, bool]]], gamma: float, lam: float, lam_critic: float, alpha: float | None
) -> None:
    own = []
    for row in rows:
        length = sum(mask for _, _, mask in row)
        own.append(lam if alpha is None or not length else max(0.0, 1 - 1 / (alpha * length)))
    expected = [a for row, own_lam in zip(rows, own) for a in brute_force(row, gamma, own_lam)]
    advantage_T, return_T = vapo_gae(*tensors(rows), gamma=gamma, lam=lam, lam_critic=lam_critic, length_alpha=alpha)
    assert advantage_T.tolist() == pytest.approx(whitened(rows, expected), abs=1e-6)
    assert return_T.equal(gae(*tensors(rows), gamma=gamma, lam=lam_critic)[1])


def test_vapo_gives_long_answers_a_longer_view() -> None:
    """The paper: lambda 0.95 for 400 tokens at alpha 0.05, 0.99 for 2,000."""
    for length, lam in [(400, 0.95), (2000, 0.99)]:
        row = [[(0.0, 0.1 * (i % 7), True) for i in range(length - 1)] + [(1.0, 0.3, True)]]
        found = vapo_gae(*tensors(row), length_alpha=0.05)[0]
        torch.testing.assert_close(found, gae(*tensors(row), lam=lam)[0])


@given(sequences)
def test_at_lambda_one_the_return_is_the_discounted_sum_of_rewards_whatever_the_values(
    rows: list[list[tuple[float, float, bool]]],
) -> None:
    _, return_T = gae(*tensors(rows), gamma=1.0, lam=1.0)
    expected = []
    for row in rows:
        expected += [sum(r for r, _, m in row[i:] if m) if mask else 0.0 for i, (_, _, mask) in enumerate(row)]
    assert return_T.tolist() == pytest.approx(expected, abs=1e-12)


def test_a_tools_tokens_neither_discount_nor_decay() -> None:
    answer = [(0.0, 0.3, True), (0.0, -0.2, True), (1.0, 0.6, True)]
    with_tool = [answer[0], (9.0, 9.0, False), (9.0, 9.0, False), *answer[1:]]
    plain, interrupted = (gae(*tensors([row]), gamma=0.9, lam=0.8)[1] for row in (answer, with_tool))
    assert interrupted[[0, 3, 4]].equal(plain) and interrupted[[1, 2]].eq(0).all()


def test_a_trajectory_of_several_sequences_is_one() -> None:
    """Its sequences follow each other in the order of the batch, whatever stands between them."""
    first, second, other = [(0.0, 0.3, True)], [(0.0, 9.0, False), (1.0, 0.6, True)], [(0.5, 0.1, True)]
    reward_T, value_T, mask_T, _ = tensors([first, other, second])
    cut = gae(reward_T, value_T, mask_T, torch.tensor([1, 0, 1, 1]), gamma=0.9, lam=0.8)
    whole = gae(*tensors([other, first + second]), gamma=0.9, lam=0.8)
    for a, b in zip(cut, whole):
        assert a[[1, 0, 2, 3]].equal(b)


def test_nothing_and_a_single_token_are_no_error() -> None:
    none = torch.zeros(0)
    for part in gae(none, none, none.bool(), none.long()):
        assert part.shape == (0,)
    assert gae(*tensors([[(1.0, 0.5, True), (2.0, 0.5, False)]]))[0].tolist() == [0.0, 0.0]
    assert whiten(torch.tensor([3.0])).tolist() == [0.0]
