"""The reward of GSM8K: 1 if an answer ends in the right number, else 0. Cobbe et al. 2021, arXiv 2110.14168.

GSM8K's own answers end with ``#### 72``. `strict` wants that form; `flexible` takes the last number, whatever stands
around it. Both read the last 300 characters only, as verl's reward of the same name does, so that an answer cannot win
by listing numbers. They differ from it in three things: numbers are compared as numbers, so 72.0 is 72, and a full stop
after a number does not make it wrong; ``#### 18 or 19`` is not 18; and a ground truth that is no number raises. It may
be the whole of GSM8K's own answer: what stands after its ``####`` counts.
"""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from typing import Any

from hybridflow.rewards.text import plain, required_text

LAST_CHARACTERS = 300
_STRICT = re.compile(r"####[ \t]{1,9}([+-]?[0-9.,]+)([^\n#]*)")
_NUMBER = re.compile(r"(?<![0-9.,])-?\$?[0-9.,]*[0-9][0-9.,]*")  # 9-5 ends in 5, not in -5


def strict(response: str, ground_truth: Any) -> float:
    """1.0 if the number after the last ``####`` is the right one, and no other follows it on its line.

    >>> strict("9 * 2 = 18\\n#### 18", "18"), strict("#### 1,000", 1000), strict("#### 3 no, #### 4", "4")
    (1.0, 1.0, 1.0)
    >>> strict("the answer is 10", "10"), strict("#### 18 or 19", "18"), strict("####", "18")
    (0.0, 0.0, 0.0)
    """
    found = _STRICT.findall(plain(response[-LAST_CHARACTERS:]))
    said, rest = found[-1] if found else ("", "")
    return _equal("" if re.search("[0-9]", rest) else said, ground_truth)


def flexible(response: str, ground_truth: Any) -> float:
    """1.0 if the last number is the right one.

    >>> flexible("the answer is 10.", "10"), flexible("#### 1,000", 1000), flexible("it is $-2.50", "-2.5")
    (1.0, 1.0, 1.0)
    >>> flexible("10 or 11", "10"), flexible("ten", "10"), flexible("10" + 300 * " ", "10")
    (0.0, 0.0, 0.0)
    """
    found = _NUMBER.findall(plain(response[-LAST_CHARACTERS:]))
    return _equal(found[-1] if found else "", ground_truth)


def _equal(text: str, ground_truth: Any) -> float:
    true = _number(plain(required_text(ground_truth, "gsm8k")).rpartition("####")[2])
    if true is None or not true.is_finite():
        raise ValueError(f"the ground truth {ground_truth!r} is not a number")
    return float(_number(text) == true)


def _number(text: str) -> Decimal | None:
    try:
        return Decimal(text.strip().replace(",", "").replace("$", "").rstrip("."))
    except InvalidOperation:  # such as 1.2.3
        return None
