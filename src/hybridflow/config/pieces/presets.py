"""Algorithms by name: values of the `algorithm` section that belong together."""

from __future__ import annotations

from typing import Any

# Where paper and verl differ, the preset follows the paper; the comment says what verl does.
PRESETS: dict[str, dict[str, Any]] = {
    # arXiv 2402.03300 averages tokens within a response, then responses; verl's default is token-mean.
    "grpo": {"advantage": "grpo", "normalize_by_std": True, "aggregation": "seq-mean-token-mean"},
    # arXiv 2503.20783: no division by the standard deviation nor by the response's length, a constant instead.
    "dr_grpo": {"advantage": "grpo", "normalize_by_std": False, "aggregation": "seq-mean-token-sum-norm"},
    # arXiv 1707.06347, table 3: clip 0.2, lam 0.95. Its gamma 0.99 is for control; language models take 1 (arXiv
    # 1909.08593 and since), because a response of hundreds of tokens has its reward at the end. verl: lam 1, and a dual
    # clip of 3.
    "ppo": {
        "advantage": "gae",
        "gamma": 1.0,
        "lam": 0.95,
        "clip_low": 0.2,
        "clip_high": 0.2,
        "aggregation": "token-mean",
    },
    # arXiv 2504.05118: values from whole returns, advantages with lambda 1 - 1 / (0.05 length), clip-higher. Its group
    # sampling and its imitation term on right responses are choices of the run. verl has neither lambda apart.
    "vapo": {
        "advantage": "vapo_gae",
        "lam_critic": 1.0,
        "length_alpha": 0.05,
        "clip_high": 0.28,
        "aggregation": "token-mean",
    },
    # arXiv 2503.14476; its filter and its length penalty are in the filter and reward sections.
    "dapo": {"advantage": "grpo", "clip_low": 0.2, "clip_high": 0.28, "aggregation": "token-mean"},
    # arXiv 2402.14740 takes a response as one action, so its loss is summed over tokens.
    "rloo": {"advantage": "rloo", "policy_loss": "reinforce", "aggregation": "seq-mean-token-sum"},
    # arXiv 2310.10505, the same with a greedy response as the baseline.
    "remax": {"advantage": "remax", "policy_loss": "reinforce", "aggregation": "seq-mean-token-sum"},
    # arXiv 2501.03262: the penalty in the reward is k1 there, advantages are whitened over the batch.
    "reinforce_plus_plus": {"advantage": "reinforce_plus_plus", "aggregation": "token-mean"},
    "reinforce_plus_plus_baseline": {"advantage": "reinforce_plus_plus_baseline", "aggregation": "token-mean"},
    # arXiv 2505.23585: exactly on-policy, no divergence from a reference, no entropy bonus.
    "opo": {"advantage": "opo", "policy_loss": "reinforce", "aggregation": "token-mean"},
    # arXiv 2504.02546
    "gpg": {"advantage": "gpg", "policy_loss": "reinforce", "aggregation": "token-mean"},
    # arXiv 2503.19595
    "grpo_passk": {"advantage": "grpo_passk", "aggregation": "seq-mean-token-mean"},
    # arXiv 2601.05242
    "gdpo": {"advantage": "gdpo", "aggregation": "seq-mean-token-mean"},
    # arXiv 2505.10978
    "gigpo": {"advantage": "gigpo", "gamma": 0.95, "aggregation": "seq-mean-token-mean"},
    "otb": {"advantage": "optimal_token_baseline", "policy_loss": "reinforce", "aggregation": "token-mean"},
    # arXiv 2602.02710
    "maxrl": {"advantage": "maxrl", "policy_loss": "reinforce", "aggregation": "token-mean"},
    # arXiv 2507.18071, section 5.1: the clips are those of a length-normalised ratio.
    "gspo": {
        "advantage": "grpo",
        "policy_loss": "gspo",
        "clip_low": 3e-4,
        "clip_high": 4e-4,
        "aggregation": "seq-mean-token-mean",
    },
    # arXiv 2507.20673: clips at exp(-0.4) and exp(0.4), wider than those of a plain ratio. verl: as configured.
    "gmpo": {
        "advantage": "grpo",
        "policy_loss": "gmpo",
        "clip_low": 0.4,
        "clip_high": 0.4,
        "aggregation": "seq-mean-token-mean",
    },
    # arXiv 2511.20347
    "sapo": {"advantage": "grpo", "policy_loss": "sapo", "aggregation": "seq-mean-token-mean"},
    # arXiv 2506.13585: an upper bound alone, in effect. verl: 0.2 on both sides.
    "cispo": {
        "advantage": "grpo",
        "policy_loss": "cispo",
        "clip_low": 0.99,
        "clip_high": 0.28,
        "aggregation": "token-mean",
    },
    # arXiv 2505.22617
    "clip_cov": {"advantage": "grpo", "policy_loss": "clip_cov", "aggregation": "token-mean"},
    "kl_cov": {"advantage": "grpo", "policy_loss": "kl_cov", "aggregation": "token-mean"},
    # arXiv 2602.04879
    "dppo_tv": {"advantage": "grpo", "policy_loss": "dppo_tv", "aggregation": "token-mean"},
    "dppo_kl": {
        "advantage": "grpo",
        "policy_loss": "dppo_kl",
        "divergence_low": 0.05,
        "divergence_high": 0.05,
        "aggregation": "token-mean",
    },
    # arXiv 2405.19107
    "dro": {"advantage": "reinforce_plus_plus_baseline", "policy_loss": "dro", "aggregation": "seq-mean-token-sum"},
    # arXiv 2503.14286
    "topr": {"advantage": "grpo", "policy_loss": "topr", "aggregation": "seq-mean-token-sum"},
    # arXiv 2505.24298
    "decoupled_ppo": {"advantage": "grpo", "policy_loss": "decoupled_ppo", "aggregation": "token-mean"},
    # arXiv 2405.00675: a reward in [0, 1] is the share of responses that this one beats.
    "sppo": {
        "advantage": "grpo",
        "normalize_by_std": False,
        "policy_loss": "sppo",
        "aggregation": "seq-mean-token-mean",
    },
    # The reward is not read: every token is compared with model.reference, the teacher.
    "distillation": {"advantage": "distillation", "policy_loss": "reinforce", "aggregation": "token-mean"},
}
REJECTION_LEVELS: tuple[str, ...] = tuple(
    [f"token_{k}" for k in ("k1", "k2", "k3")]
    + [f"{level}_{k}" for level in ("seq_sum", "seq_mean") for k in ("k1", "k2", "k3")]
    + [f"seq_max_{k}" for k in ("k2", "k3")]
)
# verl's names. Each fills what is not given in algorithm.correction.
_TOKEN_IS: dict[str, Any] = {"weights": "token", "weight_cap": 2.0}
_SEQ_IS: dict[str, Any] = {"weights": "sequence", "weight_cap": 2.0}
_ICEPOP: dict[str, Any] = {"weights": "token", "weight_floor": 0.5, "weight_cap": 5.0}
_GEO: dict[str, Any] = {"reject": {"seq_mean_k1": [0.999, 1.001]}}
_K3: dict[str, Any] = {"reject": {"seq_mean_k3": [0.01]}}
CORRECTIONS: dict[str, dict[str, Any]] = {
    "disabled": {},
    "decoupled_token_is": {"mode": "decoupled", **_TOKEN_IS},
    "decoupled_seq_is": {"mode": "decoupled", **_SEQ_IS},
    "decoupled_token_icepop": {"mode": "decoupled", **_ICEPOP},
    "decoupled_seq_is_rs": {"mode": "decoupled", **_SEQ_IS, "reject": {"seq_sum_k1": [0.5, 2.0]}},
    "decoupled_geo_rs": {"mode": "decoupled", **_GEO},
    "decoupled_k3_rs": {"mode": "decoupled", **_K3},
    "decoupled_geo_rs_seq_tis": {"mode": "decoupled", **_SEQ_IS, **_GEO},
    "decoupled_geo_rs_token_tis": {"mode": "decoupled", **_TOKEN_IS, **_GEO},
    "decoupled_k3_rs_seq_tis": {"mode": "decoupled", **_SEQ_IS, **_K3},
    "decoupled_k3_rs_token_tis": {"mode": "decoupled", **_TOKEN_IS, **_K3},
    "bypass_ppo_clip": {"mode": "bypass"},
    "bypass_ppo_clip_geo_rs": {"mode": "bypass", **_GEO},
    "bypass_ppo_clip_k3_rs": {"mode": "bypass", **_K3},
    "bypass_pg_is": {"mode": "bypass", **_SEQ_IS},
    "bypass_pg_token_icepop": {"mode": "bypass", **_ICEPOP},
    "bypass_pg_geo_rs": {"mode": "bypass", **_GEO},
    "bypass_pg_geo_rs_seq_tis": {"mode": "bypass", **_SEQ_IS, **_GEO},
    "bypass_pg_geo_rs_token_tis": {"mode": "bypass", **_TOKEN_IS, **_GEO},
}

# A line on each preset: `hybridflow check --explain algorithm.preset`.
METHODS: dict[str, str] = {
    "grpo": "rewards minus their group's mean, divided by its standard deviation (DeepSeekMath)",
    "dr_grpo": "grpo without dividing by the standard deviation and by the response's length",
    "ppo": "a critic's advantages (GAE) and the clipped ratio; needs a critic",
    "vapo": "ppo with a lambda by length for the policy and 1 for the critic, and a higher upper clip; needs a critic",
    "dapo": "grpo with a higher upper clip, averaged over tokens; its filter and penalty are keys of filter and reward",
    "rloo": "each response minus the mean of the others; a response is one action",
    "remax": "each response minus a greedy response to the same prompt",
    "reinforce_plus_plus": "rewards whitened over the step, without groups",
    "reinforce_plus_plus_baseline": "rewards minus their group's mean, whitened over the step",
    "opo": "each response minus the group's mean weighted by length; exactly on-policy",
    "gpg": "the plain policy gradient with the group's mean as baseline; groups of equal reward do not count",
    "grpo_passk": "only the best response of a group gets an advantage, over the second best (pass@k)",
    "gdpo": "grpo for several reward components, each normalised separately",
    "gigpo": "grpo with a second advantage among steps that start from the same state",
    "otb": "a baseline for every token that minimises the gradient's variance",
    "maxrl": "rewards minus their group's mean, divided by that mean (maximum likelihood of success)",
    "gspo": "grpo with one clipped ratio for a whole response",
    "gmpo": "grpo with the geometric mean of a response's ratios",
    "sapo": "grpo with a soft gate instead of the clip",
    "cispo": "grpo in which the clipped ratio weights the gradient of every token",
    "clip_cov": "grpo in which a few tokens of high covariance have no loss, against the loss of entropy",
    "kl_cov": "grpo in which a few tokens of high covariance have a KL penalty, against the loss of entropy",
    "dppo_tv": "grpo with a bound on a token's total variation instead of its ratio",
    "dppo_kl": "grpo with a bound on a token's KL divergence instead of its ratio",
    "dro": "a squared loss towards the reward, without a ratio (direct reward optimisation)",
    "topr": "wrong responses are weighted by a bounded ratio, right ones by 1 (tapered off-policy)",
    "decoupled_ppo": "ppo's clip around the step's policy, weighted by its ratio to the sampler: for stale responses",
    "sppo": "a squared loss of a response's log-ratio towards its share of wins (self-play)",
    "distillation": "every token compared with a teacher, model.reference; the reward is not read",
}
