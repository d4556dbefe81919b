"""What each piece of an algorithm needs, in one table, so that wrong combinations are refused without torch.

A test holds these tables and the registries in `algorithms/` together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Needs:
    """What a piece needs from the run."""

    needs_group: bool = False
    """several answers to one prompt"""
    needs_critic: bool = False
    """values of states, from a critic that it trains"""
    values: tuple[str, ...] = ()
    """the keys of the algorithm section that it takes"""


ADVANTAGES: dict[str, Needs] = {
    "gae": Needs(needs_critic=True, values=("gamma", "lam")),
    "grpo": Needs(needs_group=True, values=("normalize_by_std",)),
}

POLICY_LOSSES: dict[str, Needs] = {"ppo_clip": Needs(values=("clip_low", "clip_high", "clip_dual"))}

KL_ESTIMATORS: tuple[str, ...] = ("k1", "abs", "k2", "k3", "k3_clamped")

AGGREGATIONS: dict[str, Needs] = {
    "token-mean": Needs(),
    "seq-mean-token-mean": Needs(),
    "seq-mean-token-sum-norm": Needs(),
}

# Where paper and verl differ, the preset follows the paper; the comment says what verl does.
PRESETS: dict[str, dict[str, Any]] = {
    # arXiv 2402.03300 averages tokens within an answer, then answers; verl's default is token-mean.
    "grpo": {"advantage": "grpo", "normalize_by_std": True, "aggregation": "seq-mean-token-mean"},
    # arXiv 2503.20783: no division by the standard deviation nor by the answer's length, a constant instead.
    "dr_grpo": {"advantage": "grpo", "normalize_by_std": False, "aggregation": "seq-mean-token-sum-norm"},
    # arXiv 1707.06347, table 3: clip 0.2, lam 0.95. Its gamma 0.99 is for control; language models take 1 (arXiv
    # 1909.08593 and since), because an answer of hundreds of tokens has its reward at the end. verl: lam 1, and a dual
    # clip of 3.
    "ppo": {
        "advantage": "gae",
        "gamma": 1.0,
        "lam": 0.95,
        "clip_low": 0.2,
        "clip_high": 0.2,
        "aggregation": "token-mean",
    },
}
