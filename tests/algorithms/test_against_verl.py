"""Against verl's own functions, where verl is installed: random ragged batches here, the same padded there.

verl 0.9.1 runs on a CPU in an environment of its own (`pip install --no-deps verl==0.9.1`, and what its imports ask
for); run this file with that environment's Python, `PYTHONPATH=src`, and `-s` to see the largest differences.

Where the two disagree on purpose, `DISAGREEMENTS` says so, and a test holds that it is still so.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

core = pytest.importorskip("verl.trainer.ppo.core_algos")

from verl.trainer.config import AlgoConfig
from verl.trainer.ppo import rollout_corr_helper
from verl.workers.config import ActorConfig, PolicyLossConfig

from hybridflow.algorithms.advantage import ADVANTAGES
from hybridflow.algorithms.aggregation import token_weights
from hybridflow.algorithms.correction import correct
from hybridflow.algorithms.kl import KL_ESTIMATORS, KlController
from hybridflow.algorithms.off_policy import off_policy_metrics
from hybridflow.algorithms.policy_loss import POLICY_LOSSES
from hybridflow.algorithms.policy_loss.clip_cov import clip_cov_columns
from hybridflow.algorithms.policy_loss.kl_cov import kl_cov_columns
from hybridflow.algorithms.value_loss import clipped_value_loss
from hybridflow.batch import Batch, offsets_from_lengths
from hybridflow.config.algorithms import REJECTION_LEVELS

SEEDS = range(8)
COMPONENTS = {"right": 1.0, "short": 0.5, "polite": 2.0}
MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
EMPTY_ROWS = (2, 9)


class Case:
    """A random step: 17 answers in 4 groups, tokens of tools between their own, and both shapes of every column.

    Args:
        seed: of the numbers.
        spread: standard deviation of the log-ratios.
        empty: rows without a loss token.
    """

    def __init__(self, seed: int, *, spread: float = 0.4, empty: tuple[int, ...] = ()) -> None:
        self.random = random = torch.Generator().manual_seed(seed)
        self.group_N = torch.tensor([5] * 6 + [2] * 2 + [9] * 4 + [7] * 5)[torch.randperm(17, generator=random)]
        self.length_B = torch.randint(1, 12, (17,), generator=random)
        self.offsets = offsets_from_lengths(self.length_B)
        self.width, self.total = int(self.length_B.max()) + 3, int(self.offsets[-1])
        self.sequence_T = torch.repeat_interleave(torch.arange(17), self.length_B)
        self.place_T = torch.arange(self.total) - self.offsets[self.sequence_T]
        self.mask_T = torch.rand(self.total, generator=random) < 0.8
        self.mask_T[self.offsets[:-1]] = self.mask_T[self.offsets[1:] - 1] = True
        self.mask_T &= torch.tensor([i not in empty for i in range(17)])[self.sequence_T]
        self.old_logp_T = -0.05 - 3 * self.uniform()
        self.logp_T = (self.old_logp_T + spread * self.normal()).clamp(max=-0.01)
        self.advantage_T = torch.randn(17, generator=random, dtype=torch.float64)[self.sequence_T]

    def normal(self) -> Tensor:
        return torch.randn(self.total, generator=self.random, dtype=torch.float64)

    def uniform(self) -> Tensor:
        return torch.rand(self.total, generator=self.random, dtype=torch.float64)

    def padded(self, value_T: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        value_BL = torch.zeros(17, self.width, dtype=dtype or value_T.dtype)
        value_BL[self.sequence_T, self.place_T] = value_T.to(value_BL.dtype)
        return value_BL

    def ragged(self, value_BL: Tensor) -> Tensor:
        return value_BL[self.sequence_T, self.place_T]

    @property
    def mask_BL(self) -> Tensor:
        return self.padded(self.mask_T, torch.int64)

    def batch(self) -> Batch:
        return Batch(
            {"loss_mask_T": self.mask_T, "trajectory_B": torch.arange(17), "group_B": self.group_N},
            lengths={"T": self.length_B},
        )

    def on_loss(self, value_T: Tensor) -> Tensor:
        return value_T[self.mask_T]


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


def accepted(function: Callable[..., Any], given: dict[str, Any]) -> dict[str, Any]:
    return {name: given[name] for name in inspect.signature(function).parameters if name in given}


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
    ("gdpo", "gdpo", {"reward_weights": COMPONENTS}),
    ("remax", "remax", {"gamma": 1.0}),
    ("reinforce_plus_plus", "reinforce_plus_plus", {"gamma": 0.97}),
    ("reinforce_plus_plus_baseline", "reinforce_plus_plus_baseline", {}),
    ("optimal_token_baseline", "optimal_token_baseline", {}),
    ("optimal_token_baseline", "optimal_token_baseline", {"rollout_weight": True}),
    ("tir_optimal_token_baseline", "tir_optimal_token_baseline", {}),
    ("tir_optimal_token_baseline", "tir_optimal_token_baseline", {"rollout_weight": True}),
]
WHOLE = ("otb without tools",)  # see DISAGREEMENTS


def both_advantages(case: Case, theirs: str, ours: str, values: dict[str, Any]) -> tuple[tuple[Tensor, ...], ...]:
    """(advantage, return) at the loss tokens, here and there; one of each where there is no return to learn."""
    dense = ours in ("gae", "remax", "reinforce_plus_plus") or "token_baseline" in ours
    last_T = case.place_T + 1 == case.length_B[case.sequence_T]
    reward_T = case.normal() * (case.mask_T if dense else last_T & case.mask_T)
    columns = {"value_T": case.normal(), "sum_pi_squared_T": case.uniform(), "old_logp_T": case.old_logp_T}
    weight_T = 0.5 + case.uniform() if values.get("rollout_weight") else None
    component_NK = torch.randn(17, len(COMPONENTS), generator=case.random, dtype=torch.float64).float().double()
    baseline_N = torch.randn(17, generator=case.random, dtype=torch.float64)
    given = {
        **columns,
        "reward_T": reward_T,
        "reward_N": torch.zeros(17, dtype=torch.float64).index_add_(0, case.sequence_T, reward_T),
        "group_N": case.group_N,
        "baseline_N": baseline_N,
        "length_N": torch.zeros(17, dtype=torch.int64).index_add_(0, case.sequence_T, case.mask_T.long()),
        "components_NK": component_NK,
        "mask_T": case.mask_T,
        "offsets": case.offsets,
        "trajectory_T": case.sequence_T,
        "rollout_weight_T": weight_T,
        **values,
    }
    function = ADVANTAGES[ours]
    found = function(**accepted(function, given))
    advantage, *rest = found if isinstance(found, tuple) else (found,)
    got = [advantage if len(advantage) == case.total else advantage[case.sequence_T], *rest]

    algorithm = AlgoConfig(
        gamma=values.get("gamma", 1.0),
        norm_adv_by_std_in_grpo=values.get("normalize_by_std", True),
        gdpo_reward_keys=list(COMPONENTS),
        gdpo_reward_weights=list(COMPONENTS.values()),
    )
    peer = core.get_adv_estimator_fn(theirs)
    wanted = peer(
        **accepted(
            peer,
            {
                "token_level_rewards": case.padded(reward_T),
                "response_mask": case.mask_BL,
                "index": case.group_N.numpy().astype(str).astype(object),
                "values": case.padded(columns["value_T"]),
                "gamma": values.get("gamma"),
                "lam": values.get("lam"),
                "norm_adv_by_std_in_grpo": values.get("normalize_by_std", True),
                "reward_baselines": baseline_N,
                "old_log_probs": case.padded(case.old_logp_T),
                "sum_pi_squared": case.padded(columns["sum_pi_squared_T"]),
                "rollout_is_weights": None if weight_T is None else case.padded(weight_T),
                "config": algorithm,
                "non_tensor_batch": {k: component_NK[:, i].numpy() for i, k in enumerate(COMPONENTS)},
                "batch": {"prompts": torch.zeros(17, 2), "attention_mask": attention(case)},
            },
        )
    )
    pairs = [tuple(case.on_loss(x) for x in got), tuple(case.on_loss(case.ragged(x)) for x in wanted[: len(got)])]
    return tuple(pairs)


def attention(case: Case) -> Tensor:
    answer_BL = case.padded(torch.ones(case.total, dtype=torch.int64))
    return torch.cat([torch.ones(17, 2, dtype=torch.int64), answer_BL], 1)


@pytest.mark.parametrize(("theirs", "ours", "values"), ESTIMATORS)
def test_advantages(theirs: str, ours: str, values: dict[str, Any]) -> None:
    largest = Largest(f"{ours} {values} against {theirs}")
    for seed in SEEDS:
        case = Case(seed)
        if theirs == "optimal_token_baseline":  # see DISAGREEMENTS
            case.mask_T[:] = True
        for got, wanted in zip(*both_advantages(case, theirs, ours, values)):
            largest.add(got, wanted)
    largest.hold(2e-6)  # verl keeps some statistics in float32


# --- policy losses ---

CLIPS = {"clip_low": 0.2, "clip_high": 0.28}
ACTOR = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28}
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
COV = {"clip_cov_ratio": 1.0, "clip_cov_lb": 0.2, "clip_cov_ub": 2.0, "kl_cov_ratio": 0.1, "ppo_kl_coef": 0.1}


def actor(case: Case, values: dict[str, Any]) -> Any:
    info = {"dp_size": 1, "batch_num_tokens": int(case.mask_T.sum()), "global_batch_size": 17}
    return ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        use_dynamic_bsz=True,
        policy_loss=PolicyLossConfig(dro_beta=0.1, **COV),
        global_batch_info=info | {"loss_scale_factor": case.width},
        **values,
    )


def our_loss(case: Case, name: str, values: dict[str, Any], mode: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The aggregated loss, its gradient by the loss tokens' log-probabilities, and metrics as means over tokens."""
    logp_T = case.logp_T.clone().requires_grad_()
    key_T = torch.arange(case.total)
    columns = {
        "old_logp_T": case.old_logp_T,
        "advantage_T": case.advantage_T,
        "sequence_T": case.sequence_T,
    }
    if name == "clip_cov":
        columns |= clip_cov_columns(
            case.logp_T, case.old_logp_T, case.advantage_T, case.mask_T, key_T,
            **values, clip_cov_share=1.0, cov_low=0.2, cov_high=2.0,
        )  # fmt: skip
    if name == "kl_cov":
        columns |= kl_cov_columns(case.logp_T, case.advantage_T, case.mask_T, key_T, kl_cov_share=0.1)
    given = {f"{column.removesuffix('T')}M": case.on_loss(value) for column, value in columns.items()}
    function = POLICY_LOSSES[name]
    loss_M, metrics = function(logp_M=case.on_loss(logp_T), **accepted(function, given), **values)
    weight_M = case.on_loss(token_weights(case.batch(), mode, norm=case.width))
    loss = (loss_M * weight_M).sum()
    loss.backward()
    assert logp_T.grad is not None
    return loss, case.on_loss(logp_T.grad), {k: v.double().mean() for k, v in metrics.items()}


def peer_loss(case: Case, name: str, values: dict[str, Any], mode: str) -> tuple[Tensor, Tensor, dict[str, float]]:
    logp_BL = case.padded(case.logp_T).requires_grad_()
    loss, metrics = core.get_policy_loss_fn(name)(
        old_log_prob=case.padded(case.old_logp_T),
        log_prob=logp_BL,
        advantages=case.padded(case.advantage_T),
        response_mask=case.mask_BL,
        loss_agg_mode=mode,
        config=actor(case, values),
    )
    loss.backward()
    return loss, case.on_loss(case.ragged(logp_BL.grad)), {k.removeprefix("actor/"): v for k, v in metrics.items()}


OTHER_METRICS = {  # named in DISAGREEMENTS
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
@pytest.mark.parametrize("empty", [(), EMPTY_ROWS])
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


def peer_correction(case: Case, values: dict[str, Any]) -> tuple[Tensor | None, Tensor, dict[str, float]]:
    floor, cap, reject = values["weight_floor"], values["weight_cap"], values["reject"]
    weights, mask_BL, metrics = rollout_corr_helper.compute_rollout_correction_and_rejection_mask(
        case.padded(case.logp_T),
        case.padded(case.old_logp_T),
        case.mask_BL,
        rollout_is=None if values["weights"] == "none" else values["weights"],
        rollout_is_threshold=cap if floor is None else f"{floor}_{cap}",
        rollout_is_batch_normalize=values["normalize"],
        rollout_rs=",".join(reject) or None,
        rollout_rs_threshold=",".join("_".join(map(str, b)) for b in reject.values()) or None,
    )
    weight_T = None if weights is None else case.ragged(weights.batch["rollout_is_weights"])
    return weight_T, case.ragged(mask_BL).bool(), metrics


def ours_and_peers_correction(case: Case, values: dict[str, Any]) -> tuple[Any, Any]:
    ours = correct(case.logp_T, case.old_logp_T, case.mask_T, case.sequence_T, 17, **values)
    return ours, peer_correction(case, values)


@pytest.mark.parametrize("values", WEIGHTINGS)
def test_correction(values: dict[str, Any]) -> None:
    name = f"correct {values['weights']} {values['weight_floor']} normalize={values['normalize']}"
    weight, metric = Largest(f"{name}: weights"), Largest(f"{name}: metrics")
    for seed in SEEDS:
        case = Case(seed, spread=0.2)
        for reject in REJECTIONS if not values["normalize"] else [{}]:  # both: see DISAGREEMENTS
            ours, (weight_T, keep_T, metrics) = ours_and_peers_correction(case, {**values, "reject": reject})
            assert ours.keep_T.equal(keep_T), reject
            if weight_T is not None:
                weight.add(ours.weight_T[keep_T], weight_T[keep_T])
            found = ours.metrics | off_policy_metrics(
                case.logp_T, case.old_logp_T, case.mask_T, case.sequence_T, 17
            )
            assert metrics.keys() <= found.keys(), metrics.keys() - found.keys()
            for key, value in metrics.items():
                metric.add(found[key], value)
    weight.hold(1e-9)
    metric.hold(1e-5)  # variances as differences of squares there
