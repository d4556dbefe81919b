"""Generalised advantage estimation on ragged tokens."""

from __future__ import annotations

import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybridflow.algorithms.advantage.gae import gae, raw_gae
from hybridflow.algorithms.whitening import whiten
from hybridflow.batch import offsets_from_lengths

from golden import LENGTHS, REWARD

# Sequences of (reward, value, whether it carries loss).
number = st.floats(-3, 3)
sequences = st.lists(st.lists(st.tuples(number, number, st.booleans()), min_size=1, max_size=7), min_size=1, max_size=5)
shares = st.floats(0, 1)


def test_golden_numbers() -> None:
    value_T = torch.tensor([0.1, 0.2, 0.3, 0, 0.1, 0.2, 0.1, 0.4, 0.3, -0.1, 0, 0.1, 0.2])
    offsets, reward_T = offsets_from_lengths(LENGTHS), torch.zeros(sum(LENGTHS))
    reward_T[offsets[1:] - 1] = torch.tensor(REWARD)
    mask_T = torch.ones(len(reward_T), dtype=torch.bool)
    advantage_T, return_T = gae(reward_T, value_T, mask_T, offsets, gamma=0.99, lam=0.95)
    assert advantage_T[:3].tolist() == pytest.approx([1.735668, 1.608297, 1.475421], abs=2e-6)
    assert advantage_T[-4:].tolist() == pytest.approx([-0.432061, -0.701676, -0.985797, -1.285339], abs=2e-6)
    assert return_T[:3].tolist() == pytest.approx([0.908407, 0.95535, 1.0], abs=1e-6)


def brute_force(tokens: list[tuple[float, float, bool]], gamma: float, lam: float) -> list[float]:
    """The definition: A_t = sum over k of (gamma lam)^k delta_{t+k}, over the tokens that carry loss."""
    kept = [(r, v) for r, v, mask in tokens if mask]
    deltas = [r + gamma * (kept[i + 1][1] if i + 1 < len(kept) else 0.0) - v for i, (r, v) in enumerate(kept)]
    found = iter(sum((gamma * lam) ** k * d for k, d in enumerate(deltas[i:])) for i in range(len(kept)))
    return [next(found) if mask else 0.0 for _, _, mask in tokens]


@given(sequences, shares, shares)
def test_against_the_definition(rows: list[list[tuple[float, float, bool]]], gamma: float, lam: float) -> None:
    tokens = [token for row in rows for token in row]
    reward_T, value_T = (torch.tensor([t[i] for t in tokens], dtype=torch.float64) for i in (0, 1))
    mask_T = torch.tensor([t[2] for t in tokens])
    offsets = offsets_from_lengths([len(row) for row in rows])
    expected = [a for row in rows for a in brute_force(row, gamma, lam)]
    found = raw_gae(reward_T, value_T, mask_T, offsets, gamma=gamma, lam=lam)
    assert found.tolist() == pytest.approx(expected, abs=1e-12)
    advantage_T, return_T = gae(reward_T, value_T, mask_T, offsets, gamma=gamma, lam=lam)
    for got, a, (_, v, mask) in zip(return_T.tolist(), expected, tokens):
        assert got == pytest.approx(a + v if mask else 0.0, abs=1e-12)
    kept = [a for a, t in zip(expected, tokens) if t[2]]
    if len(kept) > 1:
        white = [(a - statistics.fmean(kept)) / (statistics.variance(kept) + 1e-8) ** 0.5 for a in kept]
        assert advantage_T[mask_T].tolist() == pytest.approx(white, abs=1e-6)
    assert advantage_T[~mask_T].eq(0).all()


@given(sequences)
def test_at_lambda_one_the_return_is_the_discounted_sum_of_rewards_whatever_the_values(
    rows: list[list[tuple[float, float, bool]]],
) -> None:
    tokens = [token for row in rows for token in row]
    reward_T, value_T = (torch.tensor([t[i] for t in tokens], dtype=torch.float64) for i in (0, 1))
    mask_T, offsets = torch.tensor([t[2] for t in tokens]), offsets_from_lengths([len(row) for row in rows])
    _, return_T = gae(reward_T, value_T, mask_T, offsets, gamma=1.0, lam=1.0)
    expected = []
    for row in rows:
        expected += [sum(r for r, _, m in row[i:] if m) if mask else 0.0 for i, (_, _, mask) in enumerate(row)]
    assert return_T.tolist() == pytest.approx(expected, abs=1e-12)


def test_a_tools_tokens_neither_discount_nor_decay() -> None:
    answer = [(0.0, 0.3, True), (0.0, -0.2, True), (1.0, 0.6, True)]
    with_tool = [answer[0], (9.0, 9.0, False), (9.0, 9.0, False), *answer[1:]]
    plain, interrupted = (
        raw_gae(
            torch.tensor([r for r, _, _ in row]),
            torch.tensor([v for _, v, _ in row]),
            torch.tensor([m for _, _, m in row]),
            torch.tensor([0, len(row)]),
            gamma=0.9,
            lam=0.8,
        )
        for row in (answer, with_tool)
    )
    assert interrupted[[0, 3, 4]].equal(plain) and interrupted[[1, 2]].eq(0).all()


def test_nothing_and_a_single_token_are_no_error() -> None:
    none = torch.zeros(0)
    for part in gae(none, none, none.bool(), torch.zeros(1, dtype=torch.int64)):
        assert part.shape == (0,)
    assert whiten(torch.tensor([3.0, 5.0]), torch.tensor([True, False])).tolist() == [0.0, 0.0]
