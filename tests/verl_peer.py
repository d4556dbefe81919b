"""Random ragged batches for comparisons with verl: its functions on padded tensors, and ours on the same tokens.

Importing this skips a test file where verl is not installed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hybridflow.algorithms.advantage.registry import ADVANTAGES
from hybridflow.algorithms.aggregation import token_weights
from hybridflow.algorithms.correction import correct
from hybridflow.algorithms.policy_loss.clip_cov import clip_cov_columns
from hybridflow.algorithms.policy_loss.kl_cov import kl_cov_columns
from hybridflow.algorithms.policy_loss.registry import POLICY_LOSSES
from hybridflow.batch import Batch, offsets_from_lengths

core = pytest.importorskip("verl.trainer.ppo.core_algos")
algorithm_config = pytest.importorskip("verl.trainer.config")
actor_config = pytest.importorskip("verl.workers.config")
rollout_corr = pytest.importorskip("verl.trainer.ppo.rollout_corr_helper")

COMPONENTS = {"right": 1.0, "short": 0.5, "polite": 2.0}
CLIPS = {"clip_low": 0.2, "clip_high": 0.28}
ACTOR = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28}
COV = {"clip_cov_ratio": 1.0, "clip_cov_lb": 0.2, "clip_cov_ub": 2.0, "kl_cov_ratio": 0.1, "ppo_kl_coef": 0.1}


class Case:
    """A random step: 17 answers in 4 groups, tokens of tools between their own, and both shapes of every column.

    Args:
        seed: of the numbers.
        spread: standard deviation of the log-ratios.
        empty: rows without a loss token.
        longest: the largest number of tokens of an answer.
        tools: whether tokens without loss stand between an answer's own.
    """

    def __init__(
        self, seed: int, *, spread: float = 0.4, empty: tuple[int, ...] = (), longest: int = 11, tools: bool = True
    ) -> None:
        self.random = random = torch.Generator().manual_seed(seed)
        self.group_N = torch.tensor([5] * 6 + [2] * 2 + [9] * 4 + [7] * 5)[torch.randperm(17, generator=random)]
        self.length_B = torch.randint(1, longest + 1, (17,), generator=random)
        self.offsets = offsets_from_lengths(self.length_B)
        self.width, self.total = int(self.length_B.max()) + 3, int(self.offsets[-1])
        self.sequence_T = torch.repeat_interleave(torch.arange(17), self.length_B)
        self.place_T = torch.arange(self.total) - self.offsets[self.sequence_T]
        self.mask_T = torch.rand(self.total, generator=random) < (0.8 if tools else 2)
        self.mask_T[self.offsets[:-1]] = self.mask_T[self.offsets[1:] - 1] = True
        self.mask_T &= torch.tensor([i not in empty for i in range(17)])[self.sequence_T]
        self.old_logp_T = -0.05 - 3 * self.uniform()
        self.logp_T = -(self.old_logp_T + spread * self.normal()).abs()
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


def accepted(function: Callable[..., Any], given: dict[str, Any]) -> dict[str, Any]:
    return {name: given[name] for name in inspect.signature(function).parameters if name in given}


def both_advantages(case: Case, theirs: str, ours: str, values: dict[str, Any]) -> tuple[tuple[Tensor, ...], ...]:
    """(advantage, return) at the loss tokens, here and there; one of each where there is no return to learn."""
    dense = ours in ("gae", "remax", "reinforce_plus_plus") or "token_baseline" in ours
    last_T = case.place_T + 1 == case.length_B[case.sequence_T]
    reward_T = case.normal() * (case.mask_T if dense else last_T & case.mask_T)
    p_T = case.old_logp_T.exp()
    squared_T = p_T.square() + (1 - p_T).square() * case.uniform()
    columns = {"value_T": case.normal(), "sum_pi_squared_T": squared_T, "old_logp_T": case.old_logp_T}
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

    algorithm = algorithm_config.AlgoConfig(
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


def actor(case: Case, values: dict[str, Any]) -> Any:
    info = {"dp_size": 1, "batch_num_tokens": int(case.mask_T.sum()), "global_batch_size": 17}
    return actor_config.ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        use_dynamic_bsz=True,
        policy_loss=actor_config.PolicyLossConfig(dro_beta=0.1, **COV),
        global_batch_info=info | {"loss_scale_factor": case.width},
        **values,
    )


def our_loss(
    case: Case, name: str, values: dict[str, Any], mode: str, part_T: Tensor | None = None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The aggregated loss, its gradient by the loss tokens' log-probabilities, and metrics as means over tokens.

    With `part_T` of a micro-batch that has these tokens; statistics and weights are those of the whole.
    """
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
    on_T = case.mask_T if part_T is None else case.mask_T & part_T
    given = {f"{column.removesuffix('T')}M": value[on_T] for column, value in columns.items()}
    function = POLICY_LOSSES[name]
    loss_M, metrics = function(logp_M=logp_T[on_T], **accepted(function, given), **values)
    weight_M = token_weights(case.batch(), mode, norm=case.width)[on_T]
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


def peer_correction(case: Case, values: dict[str, Any]) -> tuple[Tensor | None, Tensor, dict[str, float]]:
    floor, cap, reject = values["weight_floor"], values["weight_cap"], values["reject"]
    weights, mask_BL, metrics = rollout_corr.compute_rollout_correction_and_rejection_mask(
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
