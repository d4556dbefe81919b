"""The reward of GSM8K: 1 if an answer ends in the right number, else 0. Cobbe et al. 2021, arXiv 2110.14168.

GSM8K's own answers end with ``#### 72``. `strict` wants that form; `flexible` takes the last number, whatever stands
around it. Both read the last 300 characters only, as verl's reward of the same name does, so that an answer cannot win
by listing numbers. They differ from it in one thing: numbers are compared as numbers, so 72.0 is 72, and a full stop
after a number does not make it wrong.
"""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from typing import Any

LAST_CHARACTERS = 300
_STRICT = re.compile(r"#### (-?[0-9.,]+)")
_NUMBER = re.compile(r"-?[0-9.,]*[0-9][0-9.,]*")


def strict(response: str, ground_truth: Any) -> float:
    """1.0 if the number after the last ``####`` is the right one.

    >>> strict("9 * 2 = 18\\n#### 18", "18"), strict("#### 1,000", 1000), strict("#### 3 no, #### 4", "4")
    (1.0, 1.0, 1.0)
    >>> strict("the answer is 10", "10"), strict("#### 18 eggs or #### 19", "18"), strict("####", "18")
    (0.0, 0.0, 0.0)
    """
    found = _STRICT.findall(response[-LAST_CHARACTERS:])
    return _equal(found[-1], ground_truth) if found else 0.0


def flexible(response: str, ground_truth: Any) -> float:
    """1.0 if the last number is the right one.

    >>> flexible("the answer is 10.", "10"), flexible("#### 1,000", 1000), flexible("it is $-2.50", "-2.5")
    (1.0, 1.0, 1.0)
    >>> flexible("10 or 11", "10"), flexible("ten", "10"), flexible("10" + 300 * " ", "10")
    (0.0, 0.0, 0.0)
    """
    found = _NUMBER.findall(response[-LAST_CHARACTERS:])
    return _equal(found[-1], ground_truth) if found else 0.0


def _equal(text: str, ground_truth: Any) -> float:
    said, true = _number(text), _number(str(ground_truth))
    return float(said is not None and said == true)


def _number(text: str) -> Decimal | None:
    try:
        return Decimal(text.strip().replace(",", "").rstrip("."))
    except InvalidOperation:  # such as 1.2.3
        return None
