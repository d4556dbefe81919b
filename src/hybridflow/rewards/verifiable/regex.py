r"""The reward of responses that follow a pattern: 1 if a regular expression matches the whole response.

White space around the response does not count. The pattern is Python's (`re`); without flags ``.`` is not a line break,
``(?s)`` at its head makes it one. It runs in a process that can be killed, because some patterns practically never end
on a short text: the response then scores 0 and returns ``undecided: 1``. verl has no reward for these.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from hybridflow.errors import UserError
from hybridflow.rewards.verifiable import killable
from hybridflow.rewards.verifiable.text import required_text

SECONDS = 1.0  # of CPU time for a match


def score(
    response: str, ground_truth: Any = None, pattern: str | None = None, seconds: float = SECONDS
) -> dict[str, float]:
    r"""Returns ``score`` 1.0 for a match, else 0.0; ``undecided`` 1.0 if the pattern took too long.

    >>> score("2024-05-01\n", r"\d{4}-\d\d-\d\d"), score("on 2024-05-01", r"\d{4}-\d\d-\d\d")
    ({'score': 1.0, 'undecided': 0.0}, {'score': 0.0, 'undecided': 0.0})

    Args:
        response: what the policy generated.
        ground_truth: the row's pattern, where no other is given.
        pattern: one pattern for all rows.
        seconds: of CPU time for a match.

    Raises:
        ValueError: there is no pattern.
        RuntimeError: it is no regular expression.
    """
    wanted = required_text(ground_truth, "regex (or a pattern)") if pattern is None else pattern
    try:
        matches = killable.call(
            "hybridflow.rewards.verifiable.regex:matches", wanted, response.strip(), seconds=seconds
        )
    except killable.Undecided:
        return {"score": 0.0, "undecided": 1.0}
    return {"score": float(matches), "undecided": 0.0}


def matches(pattern: str, text: str) -> bool:
    """Returns whether the pattern matches the whole text."""
    return re.fullmatch(pattern, text) is not None


def check(kwargs: Mapping[str, Any]) -> None:
    """Checks that the pattern for all rows, if there is one, is a pattern.

    Raises:
        UserError: it is not.
    """
    if kwargs.get("pattern") is not None:
        try:
            re.compile(kwargs["pattern"])
        except re.error as error:
            raise UserError(
                f"the pattern {kwargs['pattern']!r} of the reward regex is no regular expression: {error}",
                fix="write it as Python's re has it; in YAML, in single quotes",
            ) from error
