"""The built-in rewards, in the table `REWARDS`; docs/rewards.md says what each accepts.

The tables hold references, which are imported where they are used: processes that score start often.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

REWARDS: dict[str, str] = {
    "gsm8k": "hybridflow.rewards.verifiable.gsm8k:strict",
    "gsm8k_flexible": "hybridflow.rewards.verifiable.gsm8k:flexible",
    "math": "hybridflow.rewards.verifiable.math:score",
    "math_dapo": "hybridflow.rewards.verifiable.math_dapo:score",
    "multiple_choice": "hybridflow.rewards.verifiable.multiple_choice:score",
    "countdown": "hybridflow.rewards.verifiable.countdown:score",
    "qa_em": "hybridflow.rewards.verifiable.qa:exact_match",
    "qa_f1": "hybridflow.rewards.verifiable.qa:f1",
    "geo3k": "hybridflow.rewards.verifiable.geo3k:score",
    "json": "hybridflow.rewards.verifiable.json_answer:score",
    "regex": "hybridflow.rewards.verifiable.regex:score",
    "format": "hybridflow.rewards.verifiable.tags:score",
    "tool_format": "hybridflow.rewards.verifiable.tool_format:score",
    "code": "hybridflow.rewards.verifiable.code:score",
    "environment": "hybridflow.rewards.verifiable.environment:score",
}

# Where the model acted, these judge all that it wrote; the others judge its last turn, which has the answer.
OF_ALL_TURNS = ("tool_format",)


def builtin(name: str) -> Callable[..., Any]:
    """Returns the built-in reward of that name; the name must be in `REWARDS`."""
    return _resolve(REWARDS[name])


def check_row(name: str, ground_truth: Any, row: Mapping[str, Any]) -> None:
    """Checks that a reward can score responses to a row.

    Raises:
        UserError: it cannot.
    """
    if name in ROW_CHECKS:
        _resolve(ROW_CHECKS[name])(ground_truth, row)


def _resolve(reference: str) -> Callable[..., Any]:
    module, _, function = reference.partition(":")
    resolved: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return resolved


def _on_use(reference: str) -> Callable[[Mapping[str, Any]], None]:
    def check(kwargs: Mapping[str, Any]) -> None:
        _resolve(reference)(kwargs)

    return check


# By the name of a reward: makes sure, before anything is scored, that a ground truth (and its row) is one that it can
# judge responses by, or raises UserError. A reward that is not here takes any.
ROW_CHECKS: dict[str, str] = {"code": "hybridflow.rewards.verifiable.code:check_row"}

# By the name of a reward: makes sure, before anything is scored, that it can work with these keyword arguments, or
# raises UserError. A reward that is not here needs no check.
CHECKS: dict[str, Callable[[Mapping[str, Any]], None]] = {
    "math": _on_use("hybridflow.rewards.verifiable.math:check"),
    "geo3k": _on_use("hybridflow.rewards.verifiable.math:check"),
    "json": _on_use("hybridflow.rewards.verifiable.json_answer:check"),
    "regex": _on_use("hybridflow.rewards.verifiable.regex:check"),
    "code": _on_use("hybridflow.rewards.verifiable.code:check"),
}
