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


ADVANTAGES: dict[str, Needs] = {"grpo": Needs(needs_group=True)}

POLICY_LOSSES: dict[str, Needs] = {"ppo_clip": Needs()}

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
}
