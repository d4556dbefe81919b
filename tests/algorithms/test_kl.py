"""Divergence from a reference: estimators and the controller of the penalty."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridflow.algorithms.kl import KL_ESTIMATORS, KlController, mean_per_answer

from golden import golden_batch

REF = [[0.02, 0.01, -0.03], [0, 0.05, -0.02, 0.01], [-0.1, 0.1], [0.04, -0.04, 0, 0.2]]  # above the old log-probs


GOLDEN = {"k1": 0.38, "abs": 3.24, "k2": 0.6433, "k3": 0.648909, "k3_clamped": 0.648909}


@pytest.mark.parametrize("name", KL_ESTIMATORS)
def test_golden_sums(name: str) -> None:
    batch = golden_batch()
    ref_T = batch["old_T"] + torch.tensor([x for row in REF for x in [0.0, *row]])
    found_T = KL_ESTIMATORS[name](batch["new_T"], ref_T)
    assert float(found_T[batch["loss_mask_T"]].sum()) == pytest.approx(GOLDEN[name.rstrip("+")], abs=2e-6)


@pytest.mark.parametrize("name", [name for name in KL_ESTIMATORS if name.endswith("+")])
@given(rows=st.lists(st.tuples(st.floats(-60, 0), st.floats(-60, 0)), min_size=1, max_size=8))
@settings(max_examples=30, deadline=None)
def test_straight_through_forms_have_the_estimators_value_and_the_log_ratio_as_gradient(
    name: str, rows: list[tuple[float, float]]
) -> None:
    logp_M, ref_M = (torch.tensor(x, dtype=torch.float64) for x in zip(*rows))
    value_M = KL_ESTIMATORS[name](logp_M.requires_grad_(), ref_M)
    assert value_M.tolist() == KL_ESTIMATORS[name.rstrip("+")](logp_M, ref_M).tolist()
    (slope_M,) = torch.autograd.grad(value_M.sum(), logp_M)
    assert slope_M.tolist() == [logp - ref for logp, ref in rows]


def test_means_of_k1_and_k3_and_the_gradient_of_k2_are_those_of_the_divergence() -> None:
    logits = torch.tensor([0.5, -1.0, 2.0, 0.1], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([1.0, 0.3, 0.2, -0.7], dtype=torch.float64).log_softmax(-1)
    logp = logits.log_softmax(-1)
    exact = (logp.exp() * (logp - ref)).sum()
    (slope,) = torch.autograd.grad(exact, logits, retain_graph=True)
    p = logp.exp().detach()
    for name in ("k1", "k3"):
        assert float((p * KL_ESTIMATORS[name](logp, ref)).sum().detach()) == pytest.approx(float(exact.detach()))
    (found,) = torch.autograd.grad((p * KL_ESTIMATORS["k2"](logp, ref)).sum(), logits, retain_graph=True)
    torch.testing.assert_close(found, slope)
    (useless,) = torch.autograd.grad((p * KL_ESTIMATORS["k1"](logp, ref)).sum(), logits)
    assert useless.abs().max() < 1e-12  # as the head of the file says


@pytest.mark.parametrize("name", KL_ESTIMATORS)
def test_log_ratios_of_any_size_are_finite(name: str) -> None:
    logp = torch.linspace(-200, 0, 81, requires_grad=True)
    value = KL_ESTIMATORS[name](logp, torch.full((81,), -100.0))
    value.sum().backward()
    assert logp.grad is not None
    assert value.isfinite().all() and logp.grad.isfinite().all()
    if name not in ("k1", "k1+"):
        assert value.min() >= 0
    if name.startswith("k3_clamped"):
        assert value.max() == 10


def test_the_controller_moves_the_coefficient_by_a_fifth_of_the_horizons_share_at_most() -> None:
    controller = KlController(0.1, target=0.05, horizon=100)
    controller.observe(0.2, 10)
    assert controller.coef == pytest.approx(0.102)  # the golden number
    controller.observe(0.0, 100)
    assert controller.coef == pytest.approx(0.102 * 0.8)
    controller.observe(0.055, 50)
    assert controller.coef == pytest.approx(0.102 * 0.8 * 1.05)
    fixed = KlController(0.1)
    fixed.observe(math.inf, 1000)
    assert fixed.coef == 0.1


def test_the_penalty_that_is_reported_is_a_mean_over_answers_of_means_over_tokens() -> None:
    mask_T = torch.tensor([False, True, True, False, True, False])
    kl_T = torch.tensor([9.0, 1.0, 3.0, 9.0, 5.0, 9.0])
    sequence_T = torch.tensor([0, 0, 0, 1, 1, 2])
    assert mean_per_answer(kl_T, mask_T, sequence_T, 3) == pytest.approx((2 + 5 + 0) / 3)
