r"""The reward of DAPO-Math-17k and AIME: +1 for the right answer, -1 for any other. Yu et al. 2025, arXiv 2503.14476.

The last 300 characters count. In them the last statement does: an ``Answer: ...`` line, as DAPO's prompt asks for, or a
``\boxed{...}``. (In verl an ``Answer:`` line counts even where a box comes after it, and a box only in the last 100
characters.) Answers are compared as texts and numbers, see `expressions`, without algebra: they are whole numbers in
these sets. 042 is 42, as AIME writes it.
"""

from __future__ import annotations

import re
from typing import Any

from hybridflow.rewards.verifiable.expressions import same
from hybridflow.rewards.verifiable.text import last_boxed, required_text

LAST_CHARACTERS = 300
_LINE = re.compile(r"answer[ \t*]{0,9}:([^\n]*)", re.IGNORECASE)


def score(response: str, ground_truth: Any) -> dict[str, float]:
    r"""Returns ``score`` 1.0 or -1.0, and ``acc`` 1.0 or 0.0.

    >>> score("Answer: $42$", "42"), score("Answer: 41", 42)
    ({'score': 1.0, 'acc': 1.0}, {'score': -1.0, 'acc': 0.0})
    >>> [score(r, "42")["acc"] for r in [r"Answer: \boxed{042}", r"\boxed{42}.", r"Answer: 41, no, \boxed{42}"]]
    [1.0, 1.0, 1.0]
    >>> [score(r, "42")["acc"] for r in ["42", "Answer: 42 or 43", "Answer: 42" + 300 * " ", r"\boxed{42} Answer: 43"]]
    [0.0, 0.0, 0.0, 0.0]

    Raises:
        ValueError: there is no ground truth.
    """
    true = required_text(ground_truth, "math_dapo")
    box = last_boxed(true)
    said = _said(response[-LAST_CHARACTERS:])
    right = said is not None and bool(same(said, true if box is None else box[0]))
    return {"score": 1.0 if right else -1.0, "acc": float(right)}


def _said(tail: str) -> str | None:
    lines = list(_LINE.finditer(tail))
    marker = max(tail.rfind("\\boxed"), tail.rfind("\\fbox"))
    if lines and lines[-1].start() > marker:
        return lines[-1][1].strip(" \t*")
    box = last_boxed(tail)  # an Answer: line may hold it; one that never closes is no answer
    return None if box is None else box[0]
