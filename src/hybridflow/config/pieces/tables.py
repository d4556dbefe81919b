"""What each piece of an algorithm needs, in one table, so that wrong combinations are refused without torch.

A test holds these tables, the registries in `algorithms/` and the signatures there together.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Needs:
    """What a piece needs from the run."""

    needs_group: bool = False
    """several answers to one prompt"""
    needs_critic: bool = False
    """values of states, from a critic that it trains"""
    needs_reference: bool = False
    """log-probabilities of the reference"""
    needs_greedy: bool = False
    """the reward of a greedy answer to every prompt"""
    needs_components: bool = False
    """a reward function that returns several numbers by name"""
    needs_rollout_logp: bool = False
    """the sampler's log-probabilities beside those of the policy at the start of the step"""
    outputs: tuple[str, ...] = ()
    """what the policy is asked for before the step's updates: an extra forward pass"""
    statistics: bool = False
    """statistics of the whole mini-batch under the current policy: an extra forward pass per update"""
    every_answer: bool = False
    """answers without an advantage have a loss too, so none may be left out"""
    modes: tuple[str, ...] = ()
    """the only aggregations that it has a meaning in; empty: any"""
    values: tuple[str, ...] = ()
    """the keys of the algorithm section that it takes"""


ADVANTAGES: dict[str, Needs] = {
    "gae": Needs(needs_critic=True, values=("gamma", "lam")),
    "vapo_gae": Needs(needs_critic=True, values=("gamma", "lam", "lam_critic", "length_alpha")),
    "grpo": Needs(needs_group=True, values=("normalize_by_std",)),
    "grpo_passk": Needs(needs_group=True, values=("normalize_by_std",)),
    "rloo": Needs(needs_group=True),
    "opo": Needs(needs_group=True),
    "gpg": Needs(needs_group=True),
    "maxrl": Needs(needs_group=True),
    "gdpo": Needs(needs_group=True, needs_components=True, values=("reward_weights",)),
    "gigpo": Needs(needs_group=True, values=("normalize_by_std", "gamma", "step_weight")),
    "remax": Needs(needs_greedy=True, values=("gamma",)),
    "reinforce_plus_plus": Needs(values=("gamma",)),
    "reinforce_plus_plus_baseline": Needs(needs_group=True),
    "optimal_token_baseline": Needs(needs_group=True, outputs=("logp", "sum_pi_squared")),
    "tir_optimal_token_baseline": Needs(needs_group=True, outputs=("logp", "sum_pi_squared")),
    "distillation": Needs(needs_reference=True, outputs=("logp",)),
}

CLIPS = ("clip_low", "clip_high")

POLICY_LOSSES: dict[str, Needs] = {
    "ppo_clip": Needs(values=(*CLIPS, "clip_dual")),
    "reinforce": Needs(),
    "gspo": Needs(values=CLIPS),
    "gspo_token": Needs(values=CLIPS),
    "gmpo": Needs(values=CLIPS),
    "sapo": Needs(values=("tau_positive", "tau_negative")),
    "cispo": Needs(values=CLIPS),
    "clip_cov": Needs(values=CLIPS, statistics=True),
    "kl_cov": Needs(values=("kl_cov_coef",), statistics=True, every_answer=True),
    "dppo_tv": Needs(values=("divergence_low", "divergence_high", "ratio_cap")),
    "dppo_kl": Needs(values=("divergence_low", "divergence_high", "ratio_cap")),
    "dro": Needs(values=("dro_beta",), every_answer=True),
    "topr": Needs(values=("topr_cap",)),
    "decoupled_ppo": Needs(needs_rollout_logp=True, values=(*CLIPS, "clip_dual", "behaviour_cap")),
    "sppo": Needs(values=("sppo_eta",), every_answer=True, modes=("seq-mean-token-mean",)),
}

# The values of the functions that make a loss's columns from the whole mini-batch; they count as the loss's own.
STATISTICS: dict[str, tuple[str, ...]] = {
    "clip_cov": (*CLIPS, "clip_cov_share", "cov_low", "cov_high"),
    "kl_cov": ("kl_cov_share",),
}

KL_ESTIMATORS: tuple[str, ...] = ("k1", "abs", "k2", "k3", "k3_clamped", "k1+", "abs+", "k3+", "k3_clamped+")

AGGREGATIONS: dict[str, Needs] = {
    "token-mean": Needs(),
    "token-sum": Needs(),
    "seq-mean-token-sum": Needs(),
    "seq-mean-token-mean": Needs(),
    "seq-mean-token-sum-norm": Needs(),
    "prompt-mean": Needs(),
}
