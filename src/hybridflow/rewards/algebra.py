"""Whether two LaTeX expressions are equal by algebra: math-verify (Kydlicek 2024), which rests on sympy.

`equal` may take for ever, so `math` calls it through `killable`, and nothing else imports this module. The time limits
of math-verify are off: they rest on signals, and in any thread but the main one they make every answer wrong.
"""

from __future__ import annotations

import logging
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify

DECIMALS = 12  # to which a decimal number must agree with an exact one

# The whole text is one LaTeX expression. math-verify's reader of plain text is left out: it uses eval.
_TARGETS = (LatexExtractionConfig(try_extract_without_anchor=False, boxed_match_priority=0),)


def equal(said: str, true: str) -> bool:
    """Whether an answer equals the right one. What cannot be read as an expression equals nothing.

    Sets have no order, tuples have one; ``x = 2`` equals 2; names of variables matter.
    """
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time limits are off
    expected, found = _parse(true), _parse(said)
    if not expected or not found:
        return False
    return bool(verify(expected, found, float_rounding=DECIMALS, strict=True, timeout_seconds=None))


def _parse(latex: str) -> list[Any]:
    return list(parse(f"\\boxed{{{latex}}}", _TARGETS, fallback_mode="no_fallback", parsing_timeout=None))
