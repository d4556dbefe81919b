"""Losses on pairs of answers: values and gradients against the papers' equations in plain Python."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hybridflow.algorithms.preference import bradley_terry, dpo, ipo, kto, kto_divergence, orpo, simpo

logp = st.floats(-30, -0.01)
quads = st.lists(st.tuples(logp, logp, logp, logp), min_size=1, max_size=6)
examples = settings(max_examples=30, deadline=None)


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def columns(rows: list[tuple[float, ...]]) -> list[Tensor]:
    return [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in zip(*rows)]


def check(loss_N: Tensor, inputs: list[Tensor], values: list[float], slopes: list[tuple[float, ...]]) -> None:
    """Loss of each row, and its slopes by the first inputs."""
    assert loss_N.tolist() == pytest.approx(values, rel=1e-9, abs=1e-12)
    found = torch.autograd.grad(loss_N.sum(), inputs[: len(slopes[0])])
    for column, expected in zip(found, zip(*slopes)):
        assert column.tolist() == pytest.approx(list(expected), rel=1e-9, abs=1e-12)


@given(quads, st.floats(0.01, 2), st.floats(0, 0.49))
@examples
def test_dpo(rows: list[tuple[float, ...]], beta: float, s: float) -> None:
    inputs = columns(rows)
    loss_N, metrics = dpo(*inputs, beta=beta, label_smoothing=s)
    margins = [beta * ((c - rc) - (r - rr)) for c, r, rc, rr in rows]
    values = [-(1 - s) * math.log(sigma(m)) - s * math.log(sigma(-m)) for m in margins]
    slopes = [beta * (s * sigma(m) - (1 - s) * sigma(-m)) for m in margins]
    check(loss_N, inputs, values, [(x, -x) for x in slopes])
    assert metrics["rewards/margins"].tolist() == pytest.approx(margins)
    assert metrics["rewards/accuracies"].tolist() == [float(c - rc > r - rr) for c, r, rc, rr in rows]


@given(quads, st.floats(0.01, 2))
@examples
def test_ipo(rows: list[tuple[float, ...]], tau: float) -> None:
    inputs = columns(rows)
    loss_N, _ = ipo(*inputs, tau=tau)
    misses = [(c - rc) - (r - rr) - 1 / (2 * tau) for c, r, rc, rr in rows]
    check(loss_N, inputs, [m**2 for m in misses], [(2 * m, -2 * m) for m in misses])


@given(st.lists(st.tuples(logp, logp), min_size=1, max_size=6), st.floats(0.1, 5), st.floats(0, 3))
@examples
def test_simpo(rows: list[tuple[float, ...]], beta: float, gamma: float) -> None:
    inputs = columns(rows)
    loss_N, _ = simpo(*inputs, beta=beta, gamma=gamma)
    margins = [beta * (c - r) - gamma for c, r in rows]
    slopes = [-beta * sigma(-m) for m in margins]
    check(loss_N, inputs, [math.log1p(math.exp(-m)) for m in margins], [(x, -x) for x in slopes])


@given(st.lists(st.tuples(logp, logp), min_size=1, max_size=6), st.floats(0.01, 2))
@examples
def test_orpo(rows: list[tuple[float, ...]], lam: float) -> None:
    inputs = columns(rows)
    loss_N, metrics = orpo(*inputs, lam=lam)
    values, slopes = [], []
    for c, r in rows:
        odds_c, odds_r = math.exp(c) / -math.expm1(c), math.exp(r) / -math.expm1(r)
        values.append(-c + lam * math.log1p(odds_r / odds_c))
        wrong = odds_r / (odds_c + odds_r)  # sigma of minus the log odds ratio
        slopes.append((-1 - lam * wrong / -math.expm1(c), lam * wrong / -math.expm1(r)))
    check(loss_N, inputs, values, slopes)
    assert [x > 0 for x in metrics["log_odds_ratio"].tolist()] == [c > r for c, r in rows]


@given(st.lists(st.tuples(logp, logp, st.booleans()), min_size=1, max_size=6), st.floats(0.01, 2), st.floats(0, 9))
@examples
def test_kto(rows: list[tuple[float, float, bool]], beta: float, z: float) -> None:
    policy_N, ref_N = columns([row[:2] for row in rows])
    good_N = torch.tensor([good for *_, good in rows])
    divergence = torch.tensor(z, dtype=torch.float64)
    loss_N, metrics = kto(policy_N, ref_N, good_N, divergence, beta=beta, weight_good=1.5, weight_bad=0.7)
    values, slopes = [], []
    for p, q, good in rows:
        value = sigma(beta * (p - q - z)) if good else sigma(beta * (z - (p - q)))
        weight = 1.5 if good else 0.7
        values.append(weight * (1 - value))
        slopes.append(((-1 if good else 1) * weight * beta * value * (1 - value),))
    check(loss_N, [policy_N], values, slopes)
    assert metrics["rewards"].tolist() == pytest.approx([beta * (p - q) for p, q, _ in rows])


def test_ktos_divergence_is_never_negative_and_has_no_gradient() -> None:
    policy_N = torch.tensor([-1.0, -5.0], requires_grad=True)
    found = kto_divergence(policy_N, torch.tensor([-4.0, -6.0]))
    assert float(found) == 2 and not found.requires_grad
    assert float(kto_divergence(policy_N, torch.tensor([0.0, 0.0]))) == 0


def test_a_policy_that_is_its_reference_pays_what_the_papers_say() -> None:
    x = torch.tensor([-3.0, -80.0])
    assert dpo(x, x.flip(0), x, x.flip(0))[0].tolist() == pytest.approx([math.log(2)] * 2)
    assert ipo(x, x.flip(0), x, x.flip(0), tau=0.25)[0].tolist() == [4.0, 4.0]
    assert kto(x, x, torch.tensor([True, False]), torch.tensor(0.0))[0].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("loss", [dpo, ipo, simpo, orpo])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_probabilities_of_any_size_have_finite_losses_and_gradients(
    loss: Callable[..., tuple[Tensor, dict[str, Tensor]]], dtype: torch.dtype
) -> None:
    sizes = torch.tensor([0.0, -1e-9, -1e-7, -1e-3, -0.69, -0.7, -20, -100, -1000], dtype=dtype)
    chosen_N, rejected_N = (x.clone().requires_grad_() for x in (sizes.repeat(9), sizes.repeat_interleave(9)))
    references = [torch.full((81,), -10.0, dtype=dtype)] * 2 if loss in (dpo, ipo) else []
    loss_N, metrics = loss(chosen_N, rejected_N, *references)
    loss_N.sum().backward()
    assert chosen_N.grad is not None and rejected_N.grad is not None
    for found in (loss_N, chosen_N.grad, rejected_N.grad, *metrics.values()):
        assert found.isfinite().all() and found.dtype == dtype


def test_bradley_terry_by_hand() -> None:
    chosen_N = torch.tensor([1.0, 0.0, -2.0], dtype=torch.float64, requires_grad=True)
    rejected_N, margin_N = torch.tensor([0.0, 0.0, 1.0]).double(), torch.tensor([0.5, 0.0, 0.0]).double()
    loss_N, metrics = bradley_terry(chosen_N, rejected_N, margin_N, center_coef=0.1)
    # -log sigma(0.5) + 0.1, log 2, log(1 + e^3) + 0.1
    assert loss_N.tolist() == pytest.approx([0.4740769842 + 0.1, 0.6931471806, 3.0485873516 + 0.1], abs=1e-9)
    assert metrics["rewards/accuracies"].tolist() == [1, 0, 0]
    assert metrics["rewards/margins"].tolist() == [1, 0, -3]
