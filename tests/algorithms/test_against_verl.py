"""Against verl's own functions, where verl is installed: random ragged batches here, the same padded there.

verl 0.9.1 runs on a CPU in an environment of its own (`pip install --no-deps verl==0.9.1`, and what its imports ask
for); run this file with that environment's Python, `PYTHONPATH=src`, and `-s` to see the largest differences.

Where the two disagree on purpose stands in `test_disagreements_with_verl.py`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hybridflow.algorithms.aggregation import token_weights
from hybridflow.algorithms.kl import KL_ESTIMATORS, KlController
from hybridflow.algorithms.off_policy import off_policy_metrics
from hybridflow.algorithms.value_loss import clipped_value_loss
from hybridflow.config.pieces.presets import CORRECTIONS, REJECTION_LEVELS
from hybridflow.config.sections.algorithm import CorrectionSection
from verl_peer import (
    ACTOR,
    CLIPS,
    COMPONENTS,
    Case,
    algorithm_config,
    both_advantages,
    core,
    our_loss,
    ours_and_peers_correction,
    peer_loss,
)

SEEDS = range(8)
MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")


class Largest:
    """The largest difference of a comparison over all seeds; prints it and holds it to a tolerance."""

    def __init__(self, name: str) -> None:
        self.name, self.seen = name, 0.0

    def add(self, ours: Tensor | float, theirs: Tensor | float) -> None:
        ours, theirs = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (ours, theirs))
        assert ours.isfinite().all() and theirs.isfinite().all(), self.name
        difference = (ours - theirs).abs() / theirs.abs().clamp(min=1)
        self.seen = max(self.seen, float(difference.max()) if difference.numel() else 0.0)

    def hold(self, tolerance: float) -> None:
        print(f"{self.name:60} {self.seen:.1e}")
        assert self.seen <= tolerance, self.name


# --- advantages ---

ESTIMATORS: list[tuple[str, str, dict[str, Any]]] = [  # verl's name, ours, values
    ("gae", "gae", {"gamma": 0.99, "lam": 0.95}),
    ("gae", "gae", {"gamma": 1.0, "lam": 1.0}),
    ("grpo", "grpo", {"normalize_by_std": True}),
    ("grpo", "grpo", {"normalize_by_std": False}),
    ("grpo_vectorized", "grpo", {"normalize_by_std": True}),
    ("grpo_passk", "grpo_passk", {"normalize_by_std": True}),
    ("grpo_passk", "grpo_passk", {"normalize_by_std": False}),
    ("rloo", "rloo", {}),
    ("rloo_vectorized", "rloo", {}),
    ("opo", "opo", {}),
    ("gpg", "gpg", {}),
    ("gdpo", "gdpo", {"reward_weights": list(COMPONENTS.values())}),
    ("remax", "remax", {"gamma": 1.0}),
    ("reinforce_plus_plus", "reinforce_plus_plus", {"gamma": 0.97}),
    ("reinforce_plus_plus_baseline", "reinforce_plus_plus_baseline", {}),
    ("optimal_token_baseline", "optimal_token_baseline", {}),
    ("optimal_token_baseline", "optimal_token_baseline", {"rollout_weight": True}),
    ("tir_optimal_token_baseline", "tir_optimal_token_baseline", {}),
    ("tir_optimal_token_baseline", "tir_optimal_token_baseline", {"rollout_weight": True}),
]


@pytest.mark.parametrize(("theirs", "ours", "values"), ESTIMATORS)
def test_advantages(theirs: str, ours: str, values: dict[str, Any]) -> None:
    largest = Largest(f"{ours} {values} against {theirs}")
    for seed in SEEDS:
        # As far as they agree; for what is left out see the disagreements.
        case = Case(seed, tools=theirs != "optimal_token_baseline", longest=1 if theirs == "gdpo" else 11)
        for got, wanted in zip(*both_advantages(case, theirs, ours, values)):
            largest.add(got, wanted)
    largest.hold(1e-5)  # verl keeps some statistics in float32


# --- policy losses ---

DIVERGENCES = {"divergence_low": 0.2, "divergence_high": 0.28, "ratio_cap": 3.0}
ANY = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum")
LOSSES: list[tuple[str, str, dict[str, Any], dict[str, Any], tuple[str, ...]]] = [
    ("vanilla", "ppo_clip", {**CLIPS, "clip_dual": 3.0}, {**ACTOR, "clip_ratio_c": 3.0}, ANY),
    ("gspo", "gspo", CLIPS, ACTOR, ANY),
    ("gspo", "gspo_token", CLIPS, ACTOR, ANY),
    ("sapo", "sapo", {"tau_positive": 1.0, "tau_negative": 1.05}, {}, ("seq-mean-token-mean",)),
    ("gpg", "reinforce", {}, {}, ANY),
    ("clip_cov", "clip_cov", CLIPS, ACTOR, ANY),
    ("kl_cov", "kl_cov", {"kl_cov_coef": 0.1}, {}, ANY),
    ("geo_mean", "gmpo", CLIPS, ACTOR, ("seq-mean-token-mean",)),
    ("cispo", "cispo", CLIPS, ACTOR, ANY),
    ("dppo_tv", "dppo_tv", DIVERGENCES, ACTOR, ANY),
    ("dppo_kl", "dppo_kl", DIVERGENCES, ACTOR, ANY),
    ("dro", "dro", {"dro_beta": 0.1}, {}, ANY),
]

OTHER_METRICS = {  # named among the disagreements
    ("clip_cov", "pg_clipfrac"),
    ("gmpo", "pg_clipfrac"),
    ("gmpo", "pg_clipfrac_lower"),
}


@pytest.mark.parametrize(("theirs", "ours", "values", "config", "modes"), LOSSES)
def test_policy_losses(
    theirs: str, ours: str, values: dict[str, Any], config: dict[str, Any], modes: tuple[str, ...]
) -> None:
    loss, gradient, metric = (Largest(f"{ours} against {theirs}: {x}") for x in ("loss", "gradient", "metrics"))
    for seed in SEEDS:
        case = Case(seed)
        for mode in modes:
            got, wanted = our_loss(case, ours, values, mode), peer_loss(case, theirs, config, mode)
            loss.add(got[0], wanted[0])
            gradient.add(got[1], wanted[1])
            for name in (got[2].keys() & wanted[2].keys()) - {n for o, n in OTHER_METRICS if o == ours}:
                metric.add(got[2][name], wanted[2][name])
    for largest in (loss, gradient, metric):
        largest.hold(1e-6)  # weights of tokens are float32


def test_value_loss() -> None:
    largest = Largest("clipped_value_loss")
    for seed in SEEDS:
        case = Case(seed)
        value_T, old_T, return_T = case.normal(), case.normal(), case.normal()
        raw_T, metrics = clipped_value_loss(value_T, old_T, return_T, clip_value=0.5)
        for mode in MODES:
            wanted, fraction = core.compute_value_loss(
                *(case.padded(x) for x in (value_T, return_T, old_T)), case.mask_BL, 0.5, loss_agg_mode=mode
            )
            largest.add((raw_T * token_weights(case.batch(), mode, norm=case.width)).sum(), wanted)
            largest.add(case.on_loss(metrics["vf_clipfrac"]).mean(), fraction)
    largest.hold(1e-6)


# --- aggregation and divergence ---


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("empty", [(), (2, 9)])
def test_aggregation(mode: str, empty: tuple[int, ...]) -> None:
    largest = Largest(f"{mode}{', empty rows' if empty else ''}")
    for seed in SEEDS:
        case = Case(seed, empty=empty)
        loss_T = case.normal()
        got = (loss_T * token_weights(case.batch(), mode, norm=case.width)).sum()
        wanted = core.agg_loss(
            case.padded(loss_T), case.mask_BL, mode, batch_num_tokens=int(case.mask_T.sum()), global_batch_size=17
        )
        largest.add(got, wanted)
    largest.hold(1e-6)


@pytest.mark.parametrize("theirs", ["k1", "abs", "k2", "k3", "low_var_kl", "k1+", "abs+", "k3+", "low_var_kl+"])
def test_divergences(theirs: str) -> None:
    ours = theirs.replace("low_var_kl", "k3_clamped").replace("k3+", "k3_clamped+")
    ours = {"k3": "k3_clamped"}.get(theirs, ours)
    largest = Largest(f"{ours} against {theirs}")
    for seed in SEEDS:
        case = Case(seed, spread=3.0)
        got, wanted = (case.logp_T.clone().requires_grad_() for _ in range(2))
        mine, peer = KL_ESTIMATORS[ours](got, case.old_logp_T), core.kl_penalty(wanted, case.old_logp_T, theirs)
        largest.add(mine, peer)
        mine.sum().backward()
        peer.sum().backward()
        largest.add(got.grad, wanted.grad)
    largest.hold(1e-12)


def test_adaptive_coefficient() -> None:
    largest = Largest("KlController")
    ours, theirs = KlController(0.1, 0.05, 100), core.AdaptiveKLController(0.1, 0.05, 100)
    for kl in (0.2, 0.04, 0.051, 0.0, 3.0):
        ours.observe(kl, 10)
        theirs.update(kl, 10)
        largest.add(ours.coef, theirs.value)
    largest.hold(1e-12)


# --- correction ---

WEIGHTINGS = [
    {"weights": weights, "weight_cap": cap, "weight_floor": floor, "normalize": normalize}
    for weights in ("none", "token", "sequence")
    for cap, floor in ((1.2, None), (1.3, 0.7))
    for normalize in (False, True)
    if weights != "none" or not (normalize or floor)
]
BOUNDS = {"k1": [0.7, 1.2], "k2": [0.1], "k3": [0.1]}
REJECTIONS: list[dict[str, list[float]]] = [{}, *({level: BOUNDS[level[-2:]]} for level in REJECTION_LEVELS)]
REJECTIONS += [{"token_k1": [1.5]}, {"token_k2": [0.3], "seq_mean_k1": [0.8, 1.3], "seq_max_k3": [0.8]}]


@pytest.mark.parametrize("values", WEIGHTINGS)
def test_correction(values: dict[str, Any]) -> None:
    name = f"correct {values['weights']} {values['weight_floor']} normalize={values['normalize']}"
    weight, metric = Largest(f"{name}: weights"), Largest(f"{name}: metrics")
    for seed in SEEDS:
        case = Case(seed, spread=0.2)
        for reject in REJECTIONS if not values["normalize"] else [{}]:  # both: see the disagreements
            ours, (weight_T, keep_T, metrics) = ours_and_peers_correction(case, {**values, "reject": reject})
            assert ours.keep_T.equal(keep_T), reject
            if weight_T is not None:
                weight.add(ours.weight_T[keep_T], weight_T[keep_T])
            found = ours.metrics | off_policy_metrics(case.logp_T, case.old_logp_T, case.mask_T, case.sequence_T, 17)
            assert metrics.keys() <= found.keys(), metrics.keys() - found.keys()
            for key, value in metrics.items():
                metric.add(found[key], value)
    weight.hold(1e-9)
    metric.hold(1e-5)  # variances as differences of squares there


@pytest.mark.parametrize("preset", [p for p in CORRECTIONS if p != "disabled"])
def test_presets_have_the_same_values(preset: str) -> None:
    theirs = getattr(algorithm_config.RolloutCorrectionConfig, preset)()
    bounds = [float(x) for x in str(theirs.rollout_rs_threshold).split("_")] if theirs.rollout_rs else []
    expected = {
        "preset": preset,
        "mode": "bypass" if theirs.bypass_mode else "decoupled",
        "weights": theirs.rollout_is or "none",
        "reject": {theirs.rollout_rs: bounds} if theirs.rollout_rs else {},
        "normalize": theirs.rollout_is_batch_normalize,
    }
    floor, _, cap = str(theirs.rollout_is_threshold).rpartition("_")
    if theirs.rollout_is:
        expected |= {"weight_cap": float(cap), "weight_floor": float(floor) if floor else None}
    ours = CorrectionSection.model_validate({"preset": preset}).model_dump()
    assert {key: ours[key] for key in expected} == expected
