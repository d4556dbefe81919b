"""The functions of `algorithms_speed.py` as verl has them; run it with the Python of an environment that has verl.

    VERL_PYTHON benchmarks/peer_verl_algorithms.py --out FILE

float32 on the CPU, one thread; responses padded to the longest, masks int64, as its trainer makes them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo import core_algos, rollout_corr_helper
from verl.workers.config import ActorConfig, PolicyLossConfig

from algorithms_speed import BOUNDS, COMPONENTS, ESTIMATORS, VALUES, Call, Workload, called, numbers, run_side

from measuring import record

LOSSES = {"ppo_clip": "vanilla", "reinforce": "gpg", "gmpo": "geo_mean"}
OTHERS = ("gspo", "sapo", "cispo", "clip_cov", "kl_cov", "dppo_tv", "dppo_kl", "dro")
RENAMED = {"grpo": "grpo_vectorized", "rloo": "rloo_vectorized"}  # the faster of two forms
ALGORITHM = AlgoConfig(
    gamma=VALUES["gamma"],
    lam=VALUES["lam"],
    gdpo_reward_keys=list(COMPONENTS),
    gdpo_reward_weights=VALUES["reward_weights"],
)
ACTOR = ActorConfig(
    strategy="fsdp",
    rollout_n=1,
    use_dynamic_bsz=True,
    clip_ratio_low=0.2,
    clip_ratio_high=0.28,
    policy_loss=PolicyLossConfig(dro_beta=0.1),
)


def peer_calls(workload: Workload) -> dict[str, Call]:
    """Returns each function by our name, on padded tokens."""
    made = numbers(workload)
    length_N = made["length_N"]
    mask_BL = (torch.arange(workload.longest) < length_N[:, None]).long()

    def padded(name: str) -> Tensor:
        return torch.zeros(mask_BL.shape).masked_scatter_(mask_BL.bool(), made.pop(name))

    columns = {k: padded(k) for k in list(made) if k.endswith("_T")}
    rewards = torch.zeros(mask_BL.shape).scatter_(1, length_N[:, None] - 1, made["reward_N"][:, None])
    given = {
        "token_level_rewards": rewards,
        "response_mask": mask_BL,
        "index": made["group_N"].numpy().astype(str).astype(object),
        "values": columns["value_T"],
        "gamma": VALUES["gamma"],
        "lam": VALUES["lam"],
        "norm_adv_by_std_in_grpo": True,
        "reward_baselines": made["baseline_N"],
        "old_log_probs": columns["old_logp_T"],
        "sum_pi_squared": columns["sum_pi_squared_T"],
        "config": ALGORITHM,
        "non_tensor_batch": {k: np.asarray(made["components_NK"][:, i]) for i, k in enumerate(COMPONENTS)},
        "batch": {"prompts": torch.zeros(len(mask_BL), 0), "attention_mask": mask_BL},
    }

    def backward(found: tuple[Tensor, Any], by: Tensor) -> Tensor:
        loss, _ = found
        loss.backward()
        float(loss.detach())
        gradient, by.grad = by.grad, None
        assert gradient is not None
        return gradient

    def loss(name: str) -> Tensor:
        logp = columns["logp_T"].detach().requires_grad_()
        data = columns["old_logp_T"], logp, columns["advantage_T"], mask_BL
        return backward(core_algos.get_policy_loss_fn(LOSSES.get(name, name))(*data, "token-mean", ACTOR), logp)

    def value() -> Tensor:
        values = columns["value_T"].detach().requires_grad_()
        data = values, columns["ref_logp_T"], columns["old_logp_T"], mask_BL
        return backward(core_algos.compute_value_loss(*data, cliprange_value=0.5), values)

    def divergence() -> Tensor:
        logp = columns["logp_T"].detach().requires_grad_()
        kl = core_algos.kl_penalty(logp, columns["ref_logp_T"], "low_var_kl")
        return backward((core_algos.agg_loss(kl, mask_BL, "token-mean"), None), logp)

    def correction() -> Any:
        return rollout_corr_helper.compute_rollout_correction_and_rejection_mask(
            columns["logp_T"],
            columns["old_logp_T"],
            mask_BL,
            rollout_is="token",
            rollout_is_threshold=2.0,
            rollout_rs="seq_mean_k1",
            rollout_rs_threshold="_".join(map(str, BOUNDS)),
        )

    estimators = {n: core_algos.get_adv_estimator_fn(RENAMED.get(n, n)) for n in ESTIMATORS}
    calls: dict[str, Call] = {f"advantage {n}": lambda f=f: called(f, given) for n, f in estimators.items()}
    calls |= {f"loss {n}": lambda n=n: loss(n) for n in (*LOSSES, *OTHERS)}
    return calls | {"loss value": value, "loss kl": divergence, "correction": correction}


def main() -> None:
    parser = argparse.ArgumentParser(description="The functions of algorithms_speed.py as verl has them.")
    parser.add_argument("--only", help="one function")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    results = run_side(peer_calls, args.only)
    written = record("VERL_PYTHON benchmarks/peer_verl_algorithms.py", {}, results)
    args.out.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
