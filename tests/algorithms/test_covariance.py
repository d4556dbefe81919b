"""Clip-Cov and KL-Cov: which tokens of a mini-batch they pick."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hybridflow.algorithms.advantage.grpo import grpo
from hybridflow.algorithms.aggregation import token_weights
from hybridflow.algorithms.policy_loss.clip_cov import clip_cov, clip_cov_columns
from hybridflow.algorithms.policy_loss.kl_cov import kl_cov, kl_cov_columns

from golden import golden_batch

# Few values, so that ties are common.
row = st.tuples(
    st.sampled_from([-6.0, -3.0, -1.0, -0.5, -0.1]),
    st.sampled_from([-0.4, 0.0, 0.1, 0.5]),
    st.sampled_from([-2.0, -0.5, 0.0, 1.0, 2.0]),
    st.booleans(),
)
batches = st.lists(row, min_size=1, max_size=30)


def columns_of(rows: list[tuple[float, float, float, bool]]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    logp, change, advantage, mask = zip(*rows)
    logp_T = torch.tensor(logp, dtype=torch.float64)
    key_T = torch.tensor([i * 7919 % 1009 for i in range(len(rows))])
    return (
        logp_T,
        logp_T - torch.tensor(change),
        torch.tensor(advantage, dtype=torch.float64),
        torch.tensor(mask),
        key_T,
    )


def covariances(logp_T: Tensor, advantage_T: Tensor, mask_T: Tensor) -> dict[int, float]:
    """By position of a loss token, from the definition."""
    tokens = [(i, p, a) for i, (p, a, m) in enumerate(zip(logp_T.tolist(), advantage_T.tolist(), mask_T.tolist())) if m]
    n = max(len(tokens), 1)
    mean_p, mean_a = math.fsum(p for _, p, _ in tokens) / n, math.fsum(a for *_, a in tokens) / n
    return {i: (a - mean_a) * (p - mean_p) for i, p, a in tokens}


@settings(max_examples=60, deadline=None)
@given(batches, st.floats(0.01, 0.9), st.floats(-1, 0.9), st.floats(1, 6))
def test_clip_cov_drops_tokens_of_the_band_by_their_keys(
    rows: list[tuple[float, float, float, bool]], share: float, low: float, high: float
) -> None:
    logp_T, old_T, advantage_T, mask_T, key_T = columns_of(rows)
    found = clip_cov_columns(
        logp_T, old_T, advantage_T, mask_T, key_T, clip_cov_share=share, cov_low=low, cov_high=high
    )["cov_keep_T"]
    cov = covariances(logp_T, advantage_T, mask_T)
    assume(all(abs(c - low) > 1e-6 and abs(c - high) > 1e-6 for c in cov.values()))
    ratio = [math.exp(c) for _, c, *_ in rows]
    taken = {i for i in cov if (ratio[i] > 1.2 and advantage_T[i] > 0) or (ratio[i] < 0.8 and advantage_T[i] < 0)}
    candidates = sorted((i for i, c in cov.items() if low < c < high and i not in taken), key=lambda i: int(key_T[i]))
    dropped = set(candidates[: max(1, int(share * len(cov)))])
    assert found.tolist() == [float(i not in dropped) for i in range(len(rows))]


@settings(max_examples=60, deadline=None)
@given(batches, st.floats(0.01, 0.9))
def test_kl_cov_penalises_the_highest_covariances_and_of_equal_ones_the_smallest_keys(
    rows: list[tuple[float, float, float, bool]], share: float
) -> None:
    logp_T, _, advantage_T, mask_T, key_T = columns_of(rows)
    found = kl_cov_columns(logp_T, advantage_T, mask_T, key_T, kl_cov_share=share)["cov_penalty_T"]
    cov = covariances(logp_T, advantage_T, mask_T)
    values = sorted(cov.values())
    assume(all(b == a or b - a > 1e-6 for a, b in itertools.pairwise(values)))  # else rounding ranks them
    ranked = sorted(cov, key=lambda i: (-cov[i], int(key_T[i])))
    chosen = set(ranked[: max(1, int(share * len(cov)))])
    assert found.tolist() == [float(i in chosen) for i in range(len(rows))]


@settings(max_examples=30, deadline=None)
@given(batches, st.randoms(use_true_random=False))
def test_picks_do_not_depend_on_the_order_of_the_tokens(
    rows: list[tuple[float, float, float, bool]], shuffler: random.Random
) -> None:
    columns = columns_of(rows)
    order = list(range(len(rows)))
    shuffler.shuffle(order)
    logp_T, old_T, advantage_T, mask_T, key_T = (c[order] for c in columns)
    keep = clip_cov_columns(*columns, clip_cov_share=0.3, cov_low=0.1)["cov_keep_T"]
    assert torch.equal(
        keep[order],
        clip_cov_columns(logp_T, old_T, advantage_T, mask_T, key_T, clip_cov_share=0.3, cov_low=0.1)["cov_keep_T"],
    )
    penalty = kl_cov_columns(columns[0], *columns[2:], kl_cov_share=0.3)["cov_penalty_T"]
    assert torch.equal(
        penalty[order], kl_cov_columns(logp_T, advantage_T, mask_T, key_T, kl_cov_share=0.3)["cov_penalty_T"]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_advantages_have_no_covariance_and_keys_decide(dtype: torch.dtype) -> None:
    count = 11  # the plain mean of so many times 0.1 is not 0.1
    logp_T, advantage_T = torch.linspace(-3, -0.1, count, dtype=dtype), torch.full((count,), 0.1, dtype=dtype)
    key_T = torch.arange(count) * 7919 % 1009
    mask_T = torch.ones(count, dtype=torch.bool)
    penalty = kl_cov_columns(logp_T, advantage_T, mask_T, key_T, kl_cov_share=3.5 / count)["cov_penalty_T"]
    assert penalty.nonzero()[:, 0].tolist() == sorted(key_T.argsort()[:3].tolist())
    keep = clip_cov_columns(logp_T, logp_T, advantage_T, mask_T, key_T, cov_low=-1e-30)["cov_keep_T"]
    assert (keep == 0).nonzero()[:, 0].tolist() == [int(key_T.argmin())]


def test_a_mini_batch_without_loss_tokens_has_no_picks() -> None:
    value_T, key_T = torch.tensor([-1.0, -2.0]), torch.tensor([1, 2])
    mask_T = torch.zeros(2, dtype=torch.bool)
    assert kl_cov_columns(value_T, value_T, mask_T, key_T)["cov_penalty_T"].tolist() == [0, 0]
    assert clip_cov_columns(value_T, value_T, value_T, mask_T, key_T)["cov_keep_T"].tolist() == [1, 1]


def test_golden_numbers_of_the_token_mean() -> None:
    batch = golden_batch()
    mask_T, new_T, old_T = batch["loss_mask_T"], batch["new_T"], batch["old_T"]
    advantage_T = grpo(batch["reward_B"], batch["group_B"])[batch.sequence_of()]
    weight_T = token_weights(batch, "token-mean", norm=4)
    key_T = torch.arange(len(new_T))
    penalty_T = kl_cov_columns(new_T, advantage_T, mask_T, key_T)["cov_penalty_T"]
    loss_T, metrics = kl_cov(new_T, old_T, advantage_T, penalty_T, kl_cov_coef=0.1)
    assert float((loss_T * weight_T).sum()) == pytest.approx(0.1801561, abs=5e-7)
    assert float((metrics["ppo_kl"] * weight_T).sum()) == pytest.approx(0.247692, abs=5e-7)
    keep_T = clip_cov_columns(new_T, old_T, advantage_T, mask_T, key_T)["cov_keep_T"]
    loss_T, _ = clip_cov(new_T, old_T, advantage_T, keep_T)  # nothing is in the band
    assert float((loss_T * weight_T).sum()) == pytest.approx(0.215922, abs=5e-7)
