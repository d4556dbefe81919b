r"""The reward of MATH and similar sets: 1 if the last ``\boxed{...}`` equals the right answer. Hendrycks et al. 2021.

The set: arXiv 2103.03874. Only the last box counts. A response without any box may say ``Answer: ...`` or
``the answer is ...`` in its last `LAST_CHARACTERS`; then what follows the last of these counts, to the end of the line.
Answers are read as trees and compared by structure and exact arithmetic (`expressions`: what is equal to what, and why
37 * 43 is not 1591); what these leave open is compared by algebra (`algebra`), in a process that can be killed. A
comparison that does not end within its limits scores 0 and returns ``undecided: 1``.

verl compares normalised texts, so there 0.25 is not 1/4 and x + 1 is not 1 + x; verl's grader for Numina sets also
refuses 3/6 for 1/2. Here whatever is equal is right, except that a number must be worked out.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from typing import Any

from hybridflow.errors import UserError
from hybridflow.rewards.verifiable import expressions, killable
from hybridflow.rewards.verifiable.text import last_boxed, required, required_text

LAST_CHARACTERS = 300
SECONDS = 3.0  # of CPU time for a comparison

_STATED = re.compile(r"\banswer(?:[ \t]{1,9}is\b|[ \t*]{0,9}:)([^\n]*)", re.IGNORECASE)


def score(response: str, ground_truth: Any, symbolic: bool = True, seconds: float = SECONDS) -> dict[str, float]:
    r"""Returns ``score`` 1.0 if the answer is right, else 0.0; ``undecided`` 1.0 if it cannot be decided.

    >>> score(r"so $\boxed{\frac{1}{2}}$", r"\frac12"), score(r"\boxed{0.5}", r"\frac{1}{2}")
    ({'score': 1.0, 'undecided': 0.0}, {'score': 1.0, 'undecided': 0.0})
    >>> [score(r, "18")["score"] for r in [r"\boxed{\$18.00}", "The answer is 18 dollars.", r"\boxed{9 + 9}", "18"]]
    [1.0, 1.0, 0.0, 0.0]
    >>> score(r"\boxed{(x+1)^2}", "x^2 + 2x + 1"), score(r"\boxed{x^2} or \boxed{2x}", "x^2")
    ({'score': 1.0, 'undecided': 0.0}, {'score': 0.0, 'undecided': 0.0})

    Args:
        response: what the policy generated.
        ground_truth: LaTeX, a number, a text with a box in it, or a list of such, of which any is right.
        symbolic: compare by algebra what differs as text and is not a number.
        seconds: of CPU time for each such comparison.

    Raises:
        ValueError: there is no ground truth.
    """
    said = answer(response)
    truths = ground_truth if isinstance(ground_truth, list | tuple) else [ground_truth]
    found: list[bool | None] = []
    for truth in required(truths, "math"):
        true = required_text(truth, "math")
        box = last_boxed(true)
        verdict = None if said is None else _equal(said, true if box is None else box[0], symbolic, seconds)
        if verdict is True:
            return {"score": 1.0, "undecided": 0.0}
        if said is not None:
            found.append(verdict)
    return {"score": 0.0, "undecided": float(None in found)}


def answer(response: str) -> str | None:
    r"""Returns the final answer of a response; None where it gives none.

    >>> answer(r"\boxed{1} no, \boxed{2}"), answer("**Answer:** $3$\n"), answer(r"\boxed{1"), answer("4")
    ('2', '$3$', None, None)
    """
    if "\\boxed" in response or "\\fbox" in response or "\\framebox" in response:
        box = last_boxed(response)
        return None if box is None else box[0]
    stated = _STATED.findall(response[-LAST_CHARACTERS:])
    return stated[-1].strip(" \t*:") if stated else None


def check(kwargs: Mapping[str, Any]) -> None:
    """Checks that expressions can be compared.

    Raises:
        UserError: math-verify is not installed, and these arguments do not say to do without.
    """
    if not kwargs.get("symbolic", True):
        return
    if importlib.util.find_spec("math_verify") is None or importlib.util.find_spec("antlr4") is None:
        raise UserError(
            "answers are compared by algebra, and math-verify is not installed",
            fix="pip install 'hybridflow[math]', or compare texts and numbers only: reward.kwargs='{symbolic: false}'",
        )


def _equal(said: str, true: str, by_algebra: bool, seconds: float) -> bool | None:
    """Returns whether two answers are equal; None if it cannot be decided."""
    verdict = expressions.same(said, true)
    if verdict is not None:
        return verdict
    if max(len(said), len(true)) > expressions.LONGEST:
        return None
    if not by_algebra:
        return False
    try:
        return bool(killable.call("hybridflow.rewards.verifiable.algebra:equal", said, true, seconds=seconds))
    except killable.Undecided:
        return None
