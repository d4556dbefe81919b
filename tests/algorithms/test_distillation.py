"""Divergences of a student from its teacher, against their definitions in plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hybridflow.algorithms.distillation import (
    forward_kl,
    generalized_jsd,
    logp_at,
    reverse_kl,
    top_k_forward_kl,
    top_k_reverse_kl,
)

VOCAB = 5
logits = st.lists(st.floats(-6, 6), min_size=VOCAB, max_size=VOCAB)
pairs = st.lists(st.tuples(logits, logits), min_size=1, max_size=4)
examples = settings(max_examples=30, deadline=None)


def probabilities(row: list[float]) -> list[float]:
    total = sum(math.exp(x) for x in row)
    return [math.exp(x) / total for x in row]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q))


def tensors(rows: list[tuple[list[float], list[float]]]) -> tuple[Tensor, Tensor]:
    student_MV, teacher_MV = (torch.tensor(x, dtype=torch.float64) for x in zip(*rows))
    return student_MV.requires_grad_(), teacher_MV


def check(loss_M: Tensor, student_MV: Tensor, values: list[float], slopes: list[list[float]]) -> None:
    assert loss_M.tolist() == pytest.approx(values, abs=1e-9)
    (found_MV,) = torch.autograd.grad(loss_M.sum(), student_MV)
    torch.testing.assert_close(found_MV, torch.tensor(slopes, dtype=torch.float64), atol=1e-9, rtol=0)


@given(pairs)
@examples
def test_forward_and_reverse_kl(rows: list[tuple[list[float], list[float]]]) -> None:
    student_MV, teacher_MV = tensors(rows)
    both = [(probabilities(s), probabilities(t)) for s, t in rows]
    slopes = [[a - b for a, b in zip(q, p)] for q, p in both]
    check(forward_kl(student_MV, teacher_MV), student_MV, [kl(p, q) for q, p in both], slopes)
    slopes = [[a * (math.log(a / b) - kl(q, p)) for a, b in zip(q, p)] for q, p in both]
    check(reverse_kl(student_MV, teacher_MV), student_MV, [kl(q, p) for q, p in both], slopes)


@given(pairs, st.floats(0.05, 0.95))
@examples
def test_generalised_jsd(rows: list[tuple[list[float], list[float]]], beta: float) -> None:
    student_MV, teacher_MV = tensors(rows)
    values, slopes = [], []
    for s, t in rows:
        q, p = probabilities(s), probabilities(t)
        m = [beta * b + (1 - beta) * a for a, b in zip(q, p)]
        values.append(beta * kl(p, m) + (1 - beta) * kl(q, m))
        own = kl(q, m)
        slopes.append([(1 - beta) * a * (math.log(a / b) - own) for a, b in zip(q, m)])
    check(generalized_jsd(student_MV, teacher_MV, beta=beta), student_MV, values, slopes)


def test_the_ends_of_the_generalised_jsd_are_the_two_divergences() -> None:
    student_MV, teacher_MV = tensors([([0.5, -1, 2, 0.1, 0], [1, 0.3, 0.2, -0.7, -2])])
    small = generalized_jsd(student_MV, teacher_MV, beta=1e-6) / 1e-6
    large = generalized_jsd(student_MV, teacher_MV, beta=1 - 1e-6) / 1e-6
    torch.testing.assert_close(small, forward_kl(student_MV, teacher_MV), atol=1e-5, rtol=0)
    torch.testing.assert_close(large, reverse_kl(student_MV, teacher_MV), atol=1e-5, rtol=0)
    for beta in (0.0, 1.0, -0.1):
        with pytest.raises(ValueError, match="take forward_kl or reverse_kl"):
            generalized_jsd(student_MV, teacher_MV, beta=beta)


@given(pairs, st.integers(1, VOCAB))
@examples
def test_divergences_over_the_teachers_likeliest_tokens(rows: list[tuple[list[float], list[float]]], k: int) -> None:
    student_MV, teacher_MV = tensors(rows)
    ids_MK = teacher_MV.topk(k).indices
    teacher_MK = teacher_MV.log_softmax(-1).gather(-1, ids_MK)
    forward_M = top_k_forward_kl(logp_at(student_MV, ids_MK), teacher_MK)
    reverse_M = top_k_reverse_kl(logp_at(student_MV, ids_MK), teacher_MK)
    slopes = []
    for i, (s, t) in enumerate(rows):
        q, p, ids = probabilities(s), probabilities(t), ids_MK[i].tolist()
        rest = [v for v in range(VOCAB) if v not in ids]
        merged_q = [q[v] for v in ids] + [sum(q[v] for v in rest)] * (k < VOCAB)
        merged_p = [p[v] for v in ids] + [sum(p[v] for v in rest)] * (k < VOCAB)
        assert float(forward_M[i].detach()) == pytest.approx(kl(merged_p, merged_q), abs=1e-9)
        assert float(reverse_M[i].detach()) == pytest.approx(kl(merged_q, merged_p), abs=1e-9)
        assert -1e-12 <= float(forward_M[i].detach()) <= kl(p, q) + 1e-9  # a lower bound of the whole
        # Outside of the k tokens the teacher's mass counts as if it were spread as the student's is.
        slopes.append([q[v] - (p[v] if v in ids else merged_p[-1] * q[v] / merged_q[-1]) for v in range(VOCAB)])
    (found_MV,) = torch.autograd.grad(forward_M.sum(), student_MV)
    torch.testing.assert_close(found_MV, torch.tensor(slopes, dtype=torch.float64), atol=1e-9, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tokens_without_mass_and_certain_tokens_have_finite_losses_and_gradients(dtype: torch.dtype) -> None:
    never = -torch.inf
    student_MV = torch.tensor([[0.0, 1, never], [80, 0, never], [0, 80, -80]], dtype=dtype, requires_grad=True)
    teacher_MV = torch.tensor([[1.0, 0, never], [0, 80, never], [0, 80, -80]], dtype=dtype)
    ids_MK = teacher_MV.topk(1).indices
    student_MK, teacher_MK = logp_at(student_MV, ids_MK), logp_at(teacher_MV, ids_MK)
    for loss_M in (
        forward_kl(student_MV, teacher_MV),
        reverse_kl(student_MV, teacher_MV),
        generalized_jsd(student_MV, teacher_MV),
        top_k_forward_kl(student_MK, teacher_MK),
        top_k_reverse_kl(student_MK, teacher_MK),
    ):
        (slope_MV,) = torch.autograd.grad(loss_M.sum(), student_MV, retain_graph=True)
        assert loss_M.isfinite().all() and slope_MV.isfinite().all() and loss_M.dtype == dtype
        assert float(loss_M[2].detach()) == pytest.approx(0, abs=1e-6)
        assert float(loss_M[1].detach()) > 0.3
