"""The reward of GSM8K: 1 if a response ends in the right number, else 0. Cobbe et al. 2021, arXiv 2110.14168.

GSM8K's own answers end with ``#### 72``. `strict` requires that form, and the last ``####`` decides: where no number
follows it after a space, there is no answer, whatever came before. `flexible` takes the last number, whatever is around
it, unless a multiple or a fraction right behind makes it another one (``18 million``, ``18 squared``). Both read the
last 300 characters only, as verl's reward of the same name does, so that a response cannot win by listing numbers.

They differ from verl's in how a number is read. Numbers are compared as numbers, so 72.0 is 72, and a full stop after a
number does not make it wrong. Commas separate thousands and nothing else: ``3,4`` is not 34. A unit may follow; what
makes another number of it (``18 or 19``, ``18 million``, ``18/4``) may not. A ground truth that is no number raises. It
may be the whole of GSM8K's own answer: the part after its ``####`` counts.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from hybridflow.rewards.verifiable.text import decimal, plain, required_text
from hybridflow.rewards.verifiable.units import MULTIPLIERS, changes

LAST_CHARACTERS = 300
_STRICT = re.compile(r"[ \t]{1,9}([+-]?[0-9.,]+)([^\n]*)")
# A quotient, a power or a time of day is one number, not the last of its parts; 9-5 ends in 5, not in -5.
_NUMBER = re.compile(
    r"(?:(?<![0-9.,)])(-))?(?:[$\u20ac\u00a3](-)?)?([0-9.,]*[0-9][0-9.,]*(?:(?:[/^:]|[eE][+-]?)[0-9.,]+)*)"
)
_MULTIPLIED = re.compile(
    rf"[ \t-]?(?:{'|'.join(MULTIPLIERS)})\b|[ \t]?[\u00bc-\u00be\u2150-\u215e\u00b2\u00b3]", re.IGNORECASE
)
_CURRENCIES = "$\u20ac\u00a3"
_EXPONENT = re.compile(r"[+-]?[0-9]+(?:\.[0-9]+)?[eE][+-]?[0-9]{1,3}")  # as Python writes large and small floats


def strict(response: str, ground_truth: Any) -> float:
    """Returns 1.0 if the number after the last ``####`` is the right one, and nothing on its line makes it another.

    >>> strict("9 * 2 = 18\\n#### 18", "18"), strict("#### 1,000", 1000), strict("#### 3 no, #### 4", "4")
    (1.0, 1.0, 1.0)
    >>> strict("the answer is 10", "10"), strict("#### 18 or 19", "18"), strict("#### 18\\n####", "18")
    (0.0, 0.0, 0.0)
    """
    _, marked, line = plain(response[-LAST_CHARACTERS:]).rpartition("####")
    found = _STRICT.match(line) if marked else None
    return _equal("" if found is None or changes(found[2]) else found[1], ground_truth)


def flexible(response: str, ground_truth: Any) -> float:
    """Returns 1.0 if the last number is the right one.

    >>> flexible("the answer is 10.", "10"), flexible("#### 1,000", 1000), flexible("it is $-2.50", "-2.5")
    (1.0, 1.0, 1.0)
    >>> flexible("10 or 11", "10"), flexible("ten", "10"), flexible("1/10", "10"), flexible("10" + 300 * " ", "10")
    (0.0, 0.0, 0.0, 0.0)
    """
    text = plain(response[-LAST_CHARACTERS:])
    found = list(_NUMBER.finditer(text))
    multiplied = bool(found) and _MULTIPLIED.match(text, found[-1].end()) is not None
    return _equal("".join(found[-1].groups("")) if found and not multiplied else "", ground_truth)


def _equal(text: str, ground_truth: Any) -> float:
    true = _truth(ground_truth)
    if true is None:
        raise ValueError(f"the ground truth {ground_truth!r} is not a number")
    return float(_number(text) == true)


def _truth(ground_truth: Any) -> Fraction | None:
    text = plain(required_text(ground_truth, "gsm8k")).rpartition("####")[2].strip()
    text = text.translate(dict.fromkeys(map(ord, _CURRENCIES)))
    return Fraction(text) if _EXPONENT.fullmatch(text) else _number(text)


def _number(text: str) -> Fraction | None:
    """Reads a number as decimals or a quotient of such; the end of a sentence or of a list may follow it."""
    above, divided, below = text.rstrip(".,").partition("/")
    numerator, denominator = decimal(above), decimal(below) if divided else Fraction(1)
    return numerator / denominator if numerator is not None and denominator else None
