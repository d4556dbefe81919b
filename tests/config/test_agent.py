"""The section `agent`: what does not go together is refused with the keys to change."""

from __future__ import annotations

from typing import Any

import pytest

from hybridflow.config.kinds.rl import RlConfig
from hybridflow.config.load import validate
from hybridflow.errors import UserError

PLAIN: dict[str, Any] = {
    "run": {"folder": "runs/x"},
    "model": {"path": "model"},
    "data": {"train": "rows.jsonl", "max_prompt_tokens": 100},
    "reward": {"function": "gsm8k"},
    "rollout": {"max_response_tokens": 50},
    "train": {"steps": 1, "prompts_per_step": 2, "samples_per_prompt": 2, "tokens_per_microbatch": 2400},
}
TOOLS, WORLD = {"tools": ["t.py:add"]}, {"environment": "e.py:World"}


@pytest.mark.parametrize(
    ("agent", "more", "told"),
    [
        ({}, {}, "names nothing that the model acts on"),
        (TOOLS | WORLD, {}, "tools and an environment"),
        ({"tools": ["t.py:add", "t.py:add"]}, {}, "named twice"),
        ({"tools": ["add"]}, {}, "file.py:function"),
        (TOOLS | {"tasks": 5}, {}, "belong to agent.environment"),
        (WORLD | {"window": 2}, {}, "agent.history=steps"),
        (WORLD | {"tasks": 5}, {}, "both give the rows"),
        (TOOLS | {"format": "xml"}, {}, "hermes"),
        (
            TOOLS | {"max_turns": 40, "max_observation_tokens": 100},
            {},
            "agent.max_turns 40 x agent.max_observation_tokens",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(agent: dict[str, Any], more: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        validate(RlConfig, PLAIN | {"agent": agent} | more)


def test_the_longest_sequence_counts_observations() -> None:
    agent = TOOLS | {"max_turns": 2, "max_observation_tokens": 100}
    assert validate(RlConfig, PLAIN | {"agent": agent}).longest == 100 + 50 + 2 * 100
    assert validate(RlConfig, PLAIN | {"agent": agent | {"max_tokens": 80}}).longest == 180
