"""The critic's clipped loss."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from hybridflow.algorithms.aggregation import token_weights
from hybridflow.algorithms.value_loss import clipped_value_loss

from golden import golden_batch

VALUE = [[0.1, 0.2, 0.3], [0, 0.1, 0.2, 0.1], [0.4, 0.3], [-0.1, 0, 0.1, 0.2]]
CHANGE = [[0.7, -0.1, 0.2], [0, 0.6, -0.3, 0.1], [0.2, 0.2], [-0.6, 0.1, 0, 0.3]]
number = st.floats(-3, 3)


def test_the_golden_number_of_the_token_mean() -> None:
    batch = golden_batch()
    old_T, change_T = (torch.tensor([x for row in rows for x in [0.0, *row]]) for rows in (VALUE, CHANGE))
    loss_T, metrics = clipped_value_loss(old_T + change_T, old_T, old_T + 0.25, clip_value=0.5)
    weight_T = token_weights(batch, "token-mean", norm=4)
    assert float((loss_T * weight_T).sum()) == pytest.approx(0.0635577, abs=5e-8)
    assert metrics["vf_clipfrac"].sum() == 0  # what went too far went past the return, where the clip forgives nothing


def test_a_value_that_moved_too_far_towards_its_return_counts_as_clipped() -> None:
    value = torch.tensor([0.9, 0.4, 0.9], requires_grad=True)
    loss, metrics = clipped_value_loss(value, torch.zeros(3), torch.tensor([1.0, 1.0, 0.6]), clip_value=0.5)
    assert metrics["vf_clipfrac"].tolist() == [1, 0, 0]
    assert loss.tolist() == pytest.approx([0.125, 0.18, 0.045])
    assert metrics["vpred_mean"].tolist() == value.tolist()


@given(st.lists(st.tuples(number, number, number), min_size=1, max_size=10), st.floats(0.01, 2))
def test_loss_and_gradient_against_a_derivation_by_hand(rows: list[tuple[float, float, float]], clip: float) -> None:
    for value, old, goal in rows:  # at the kinks themselves there is no derivative
        kept = min(max(value, old - clip), old + clip)
        assume(
            abs(abs(value - old) - clip) > 1e-6 and (kept == value or abs(abs(value - goal) - abs(kept - goal)) > 1e-6)
        )
    value_M, old_M, return_M = (torch.tensor(x, dtype=torch.float64) for x in zip(*rows))
    value_M.requires_grad_()
    loss_M, _ = clipped_value_loss(value_M, old_M, return_M, clip_value=clip)
    loss_M.sum().backward()
    assert value_M.grad is not None
    for i, (value, old, goal) in enumerate(rows):
        kept = min(max(value, old - clip), old + clip)
        stuck = (kept - goal) ** 2 > (value - goal) ** 2  # it has overshot towards the return: no further
        assert float(loss_M[i].detach()) == pytest.approx(0.5 * max((value - goal) ** 2, (kept - goal) ** 2), abs=1e-12)
        assert float(value_M.grad[i]) == pytest.approx(0.0 if stuck else value - goal, abs=1e-9)


def test_without_a_bound_it_is_half_the_squared_error() -> None:
    value, goal = torch.tensor([0.0, 3.0]), torch.tensor([1.0, -1.0])
    loss, metrics = clipped_value_loss(value, torch.zeros(2), goal, clip_value=None)
    assert loss.tolist() == [0.5, 8.0] and "vf_clipfrac" not in metrics
