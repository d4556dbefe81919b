"""Correction of off-policy samples: weights, rejection, and the numbers to watch."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hybridflow.algorithms.correction import Correction, correct
from hybridflow.algorithms.off_policy import off_policy_metrics
from hybridflow.config.pieces.presets import CORRECTIONS, REJECTION_LEVELS
from hybridflow.config.sections.algorithm import CorrectionSection

from golden import LENGTHS, golden_batch

Rows = list[list[tuple[float, float, bool]]]  # sequences of (rollout logp, log-ratio, whether it carries loss)
sequences = st.lists(
    st.lists(st.tuples(st.floats(-8, -0.01), st.floats(-1.5, 1.5), st.booleans()), min_size=1, max_size=6),
    min_size=1,
    max_size=5,
)
weightings = st.fixed_dictionaries(
    {
        "weights": st.sampled_from(["none", "token", "sequence"]),
        "weight_cap": st.floats(1.1, 3),
        "weight_floor": st.none() | st.floats(0.2, 0.9),
        "normalize": st.booleans(),
    }
)
bounds = {"k1": st.tuples(st.floats(0.2, 0.9), st.floats(1.1, 3)).map(list) | st.floats(1.1, 3).map(lambda u: [u])}
rejections = st.fixed_dictionaries(
    {}, optional={level: bounds.get(level[-2:], st.floats(0.05, 2).map(lambda u: [u])) for level in REJECTION_LEVELS}
)


def golden(**values: Any) -> Correction:
    batch = golden_batch()
    return correct(batch["new_T"], batch["old_T"], batch["loss_mask_T"], batch.sequence_of(), len(LENGTHS), **values)


def on_loss(value_T: Tensor) -> list[float]:
    return value_T[golden_batch()["loss_mask_T"]].tolist()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {"weights": "token", "weight_cap": 1.2},
            [1.105171, 0.818731, 1.2, 0.951229, 1.2, 0.67032, 1.020201, 1.2, 0.606531, 1.0, 1.161834, 0.860708, 1.2],
        ),
        ({"weights": "sequence", "weight_cap": 1.2}, [1.2] * 3 + [0.83527] * 4 + [1.0] * 2 + [1.2] * 4),
        (
            {"weights": "token", "weight_floor": 0.8, "weight_cap": 1.2},
            [1.105171, 0.818731, 0, 0.951229, 0, 0, 1.020201, 0, 0, 1.0, 1.161834, 0.860708, 0],
        ),
    ],
)
def test_golden_weights(values: dict[str, Any], expected: list[float]) -> None:
    found = golden(**values)
    assert on_loss(found.weight_T) == pytest.approx(expected, abs=1e-6)
    assert found.keep_T.equal(golden_batch()["loss_mask_T"])
    assert found.weight_T[~found.keep_T].eq(0).all()


@pytest.mark.parametrize(
    ("level", "bound", "expected"),
    [
        ("token_k1", [0.8, 1.2], [1, 0, 0, 1, 0, 0, 1, 0, 0, 1, 1, 1, 0]),
        ("seq_mean_k1", [0.9, 1.1], [1] * 9 + [0] * 4),
        ("seq_max_k3", [0.05], [1] * 3 + [0] * 10),
    ],
)
def test_golden_rejections(level: str, bound: list[float], expected: list[int]) -> None:
    found = golden(reject={level: bound})
    assert on_loss(found.keep_T) == expected
    assert on_loss(found.weight_T) == expected  # without weights, a kept token counts once


def test_golden_metrics_of_how_far_the_policies_are_apart() -> None:
    batch = golden_batch()
    found = off_policy_metrics(batch["new_T"], batch["old_T"], batch["loss_mask_T"], batch.sequence_of(), len(LENGTHS))
    expected = {
        "kl": -0.047692,
        "k3_kl": 0.052265,
        "training_ppl": 2.48849,
        "rollout_ppl": 2.609948,
        "ppl_ratio": 0.960561,
        "chi2_token": 0.327269,
        "chi2_seq": 0.627405,
    }
    assert {name: found[f"rollout_corr/{name}"] for name in expected} == pytest.approx(expected, abs=2e-6)


# --- the definitions, in plain numbers ---


def mean(values: list[float]) -> float:
    return statistics.fmean(values)


def statistic(level: str, row: list[float]) -> list[float]:
    """What a level looks at, for each loss token of a sequence."""
    scope, kind = level.rsplit("_", 1)
    each = [{"k1": -d, "k2": d * d / 2, "k3": math.exp(d) - 1 - d}[kind] for d in row]
    if scope == "token" or not row:
        return each
    return [{"seq_sum": math.fsum, "seq_mean": mean, "seq_max": max}[scope](each)] * len(row)


def limits(level: str, bound: list[float]) -> tuple[float, float]:
    if not level.endswith("k1"):
        return -math.inf, bound[0]
    low, high = bound if len(bound) == 2 else (1 / bound[0], bound[0])
    return math.log(low), math.log(high)


def reference(rows: list[list[float]], values: dict[str, Any]) -> tuple[list[list[float]], list[list[bool]]]:
    """Weights and kept tokens of the loss tokens, from their log-ratios."""
    kept = [[True] * len(row) for row in rows]
    for level, bound in values["reject"].items():
        low, high = limits(level, bound)
        for flags, row in zip(kept, rows):
            flags[:] = [flag and low <= x <= high for flag, x in zip(flags, statistic(level, row))]
    floor, cap = values["weight_floor"], values["weight_cap"]

    def cut(ratio: float) -> float:
        return min(ratio, cap) if floor is None else ratio if floor <= ratio <= cap else 0.0

    if values["weights"] == "none":
        weights = [[1.0] * len(row) for row in rows]
    elif values["weights"] == "token":
        weights = [[cut(math.exp(d)) for d in row] for row in rows]
        counted = [w for row, flags in zip(weights, kept) for w, flag in zip(row, flags) if flag]
    else:
        weights = [[cut(math.exp(math.fsum(row)))] * len(row) for row in rows]
        counted = [row[0] for row, flags in zip(weights, kept) if any(flags)]
    if values["normalize"] and values["weights"] != "none" and any(counted):
        weights = [[w / mean(counted) for w in row] for row in weights]
    return [[w * flag for w, flag in zip(row, flags)] for row, flags in zip(weights, kept)], kept


def near_a_bound(rows: list[list[float]], values: dict[str, Any]) -> bool:
    edges = [(x, y) for level, b in values["reject"].items() for row in rows for x in statistic(level, row)
             for y in limits(level, b)]  # fmt: skip
    ratios = [r for row in rows for r in [*row, math.fsum(row)]]
    edges += [(math.exp(r), values["weight_floor"] or 9e9) for r in ratios]
    edges += [(math.exp(r), values["weight_cap"]) for r in ratios]
    return any(abs(x - y) < 1e-9 for x, y in edges)


def tensors(rows: Rows, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    flat = [token for row in rows for token in row]
    rollout = torch.tensor([t[0] for t in flat], dtype=dtype)
    logp = rollout + torch.tensor([t[1] for t in flat], dtype=dtype)
    sequence = torch.tensor([i for i, row in enumerate(rows) for _ in row])
    return logp, rollout, torch.tensor([t[2] for t in flat]), sequence, len(rows)


def loss_rows(rows: Rows) -> list[list[float]]:
    return [[d for _, d, mask in row if mask] for row in rows]


@settings(max_examples=60, deadline=None)
@given(sequences, weightings, rejections)
def test_against_the_definitions(rows: Rows, weighting: dict[str, Any], reject: dict[str, list[float]]) -> None:
    values = {**weighting, "reject": reject}
    ratios = loss_rows(rows)
    if near_a_bound(ratios, values):
        return
    data = tensors(rows)
    found = correct(*data, **values)
    weights, kept = reference(ratios, values)
    assert found.weight_T[data[2]].tolist() == pytest.approx([w for row in weights for w in row], abs=1e-9)
    assert found.keep_T[data[2]].tolist() == [flag for row in kept for flag in row]
    assert not found.keep_T[~data[2]].any() and found.weight_T[~found.keep_T].eq(0).all()
    assert not found.weight_T.requires_grad
    assert all(math.isfinite(value) for value in found.metrics.values())
    used = [flags for flags in kept if flags]
    if reject and used:
        dropped = [not flag for flags in used for flag in flags]
        assert found.metrics["rollout_corr/rollout_rs_masked_fraction"] == pytest.approx(mean(dropped), abs=1e-6)
        hit = mean([not all(flags) for flags in used])
        assert found.metrics["rollout_corr/rollout_rs_seq_masked_fraction"] == pytest.approx(hit, abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(sequences)
def test_metrics_against_the_definitions(rows: Rows) -> None:
    found = off_policy_metrics(*tensors(rows))
    used = [[(r + d, r, d) for r, d, mask in row if mask] for row in rows if any(mask for _, _, mask in row)]
    if not used:
        assert found == {}
        return
    flat = [token for row in used for token in row]
    training, rollout = ([-mean([token[i] for token in row]) for row in used] for i in (0, 1))
    apart = [t - r for t, r in zip(training, rollout)]
    expected = {
        "kl": -mean([d for _, _, d in flat]),
        "k3_kl": mean([math.exp(d) - d - 1 for _, _, d in flat]),
        "training_ppl": mean([math.exp(x) for x in training]),
        "rollout_ppl": mean([math.exp(x) for x in rollout]),
        "training_log_ppl": mean(training),
        "rollout_log_ppl": mean(rollout),
        "log_ppl_diff": mean(apart),
        "log_ppl_diff_max": max(apart),
        "log_ppl_diff_min": min(apart),
        "log_ppl_abs_diff": mean([abs(x) for x in apart]),
        "ppl_ratio": mean([math.exp(x) for x in apart]),
        "chi2_token": mean([math.exp(2 * d) for _, _, d in flat]) - 1,
        "chi2_seq": mean([math.exp(2 * math.fsum(d for _, _, d in row)) for row in used]) - 1,
    }
    expected = {f"rollout_corr/{name}": value for name, value in expected.items()}
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-9)


# --- edges ---


def test_metrics_of_weights_and_of_a_level() -> None:
    found = golden(
        weights="token", weight_floor=0.8, weight_cap=1.2, normalize=True, reject={"seq_mean_k1": [0.9, 1.1]}
    )
    metrics = {name.removeprefix("rollout_corr/"): value for name, value in found.metrics.items()}
    weights = on_loss(golden(weights="token", weight_floor=0.8, weight_cap=1.2).weight_T)
    squares = mean([w * w for w in weights])
    assert metrics["rollout_is_mean"] == pytest.approx(mean(weights), abs=1e-6)
    assert metrics["rollout_is_eff_sample_size"] == pytest.approx(mean(weights) ** 2 / squares, abs=1e-6)
    assert metrics["rollout_is_std"] == pytest.approx(statistics.pstdev(weights), abs=1e-6)
    assert metrics["rollout_is_oob_ratio"] == pytest.approx(6 / 13)
    assert metrics["rollout_is_ratio_fraction_high"] == pytest.approx(4 / 13)
    assert metrics["rollout_is_ratio_fraction_low"] == pytest.approx(2 / 13)
    assert metrics["rollout_is_batch_norm_factor"] == pytest.approx(mean(weights[:9]), abs=1e-6)  # row 4 is rejected
    assert mean(on_loss(found.weight_T)[:9]) == pytest.approx(1, abs=1e-6)
    assert metrics["rollout_rs_seq_mean_k1_min"] == pytest.approx(-0.15, abs=1e-6)
    assert metrics["rollout_rs_seq_mean_k1_seq_fraction_low"] == pytest.approx(1 / 4)
    assert metrics["rollout_rs_seq_mean_k1_seq_fraction_high"] == 0
    assert metrics["rollout_rs_seq_mean_k1_seq_max_deviation"] == pytest.approx(0.15, abs=1e-6)
    assert metrics["rollout_rs_seq_mean_k1_masked_fraction"] == pytest.approx(4 / 13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weights", ["token", "sequence"])
@pytest.mark.parametrize("floor", [None, 0.5])
def test_ratios_from_e_minus_40_to_e_40_are_finite(dtype: torch.dtype, weights: str, floor: float | None) -> None:
    data = tensors([[(-41.0, d, True) for d in range(-40, 41)], [(-41.0, 40.0, True)], [(-1.0, -40.0, True)]], dtype)
    levels = {level: [2.0] for level in REJECTION_LEVELS}
    for reject in ({}, levels):
        found = correct(*data, weights=weights, weight_floor=floor, weight_cap=1e30, normalize=True, reject=reject)
        assert found.weight_T.dtype == dtype and found.weight_T.isfinite().all()
        assert all(math.isfinite(value) for value in found.metrics.values())
    assert all(math.isfinite(value) for value in off_policy_metrics(*data).values())


def test_where_no_token_carries_loss_or_none_is_left_nothing_breaks() -> None:
    nothing = tensors([[(-1.0, 0.5, False), (-1.0, 0.1, False)], [(-2.0, 0.1, False)]])
    found = correct(*nothing, weights="sequence", normalize=True, reject={"token_k1": [2.0]})
    assert not found.keep_T.any() and found.weight_T.eq(0).all() and found.metrics == {}
    assert off_policy_metrics(*nothing) == {}
    far = tensors([[(-1.0, 0.9, True)], [(-2.0, 0.8, True)]])
    found = correct(*far, weights="token", weight_floor=0.9, weight_cap=1.1, normalize=True)
    assert found.keep_T.all() and found.weight_T.eq(0).all()  # every weight is outside of the band
    assert found.metrics["rollout_corr/rollout_is_eff_sample_size"] == 0
    found = correct(*far, weights="sequence", normalize=True, reject={"token_k1": [1.1]})
    assert not found.keep_T.any() and found.metrics["rollout_corr/rollout_rs_masked_fraction"] == 1


def test_a_rejected_sequence_loses_all_its_tokens_and_an_empty_one_changes_nothing() -> None:
    rows: Rows = [[(-1.0, 0.0, True), (-1.0, 1.0, True)], [(-1.0, 0.01, True)], [(-1.0, 1.4, False)]]
    found = correct(*tensors(rows), weights="sequence", normalize=True, reject={"seq_max_k2": [0.1]})
    assert found.keep_T.tolist() == [False, False, True, False]
    assert found.weight_T.tolist() == pytest.approx([0, 0, 1, 0])
    without = correct(*tensors(rows[:2]), weights="sequence", normalize=True, reject={"seq_max_k2": [0.1]})
    assert without.metrics == found.metrics


@pytest.mark.parametrize("preset", CORRECTIONS)
def test_every_preset_keeps_what_engines_sample_that_nearly_agree(preset: str) -> None:
    section = CorrectionSection.model_validate({"preset": preset})
    batch = golden_batch()
    logp_T, mask_T = batch["old_T"] + batch["change_T"] / 200, batch["loss_mask_T"]
    values = section.model_dump(exclude={"preset", "mode"})
    found = correct(logp_T, batch["old_T"], mask_T, batch.sequence_of(), len(LENGTHS), **values)
    assert bool(found.metrics) == section.active
    assert found.keep_T.equal(mask_T)
    assert on_loss(found.weight_T) == pytest.approx([1] * sum(LENGTHS), abs=5e-3)
