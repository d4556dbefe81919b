"""Reads an answer from a text; shared by the rewards. All of it is linear in the text's length."""

from __future__ import annotations

import numbers
import re
import unicodedata
from fractions import Fraction
from typing import Any

# Characters that look like ASCII ones: full-width forms, dashes that stand for a minus, spaces, and nothing at all.
_PLAIN = (
    {0xFEE0 + code: chr(code) for code in range(0x21, 0x7F)}
    | dict.fromkeys([*range(0x2010, 0x2014), 0x2212, 0xFE63], "-")
    | dict.fromkeys([0xA0, *range(0x2000, 0x200B), 0x202F, 0x205F, 0x3000], " ")
    | dict.fromkeys([*range(0x200B, 0x2010), 0x2060, 0xFEFF], None)
)
_OTHER_DIGIT = re.compile(r"(?![0-9])\d")
_BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![a-zA-Z])\s{0,9}\{")
# Without braces, the next token: a number, a letter, or a command with its arguments.
_BARE_BOX = re.compile(
    r"\\(?:boxed|fbox|framebox)(?![a-zA-Z])[ \t]{0,9}"
    r"((?>-?[0-9](?:[0-9.,]{0,99}[0-9])?|[a-zA-Z](?![a-zA-Z])"
    r"|\\[a-zA-Z]+(?:[ \t]?[0-9]{1,2}|(?:\{[^{}]{0,99}\}){0,2})))"
    # Text that continues it: 5^2, 5x, 5/2, 5 + 1, 5 6 and 5\cdot 2 are not 5.
    r"(?![a-zA-Z]|[ \t]{0,9}(?:(?:,[ \t]{0,9}-?)?[0-9]|[\^_/+*=<>!({\[|-]|[a-zA-Z](?![a-zA-Z])"
    r"|\\(?![)\]%,;:! \\]|q?quad(?![a-zA-Z]))))"
)
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)
_NUMBER = re.compile(r"([+-]?)([1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9])|[0-9]*)(\.[0-9]*)?")
LONGEST_NUMBER = 1000  # characters


def plain(text: str) -> str:
    """Returns the text in ASCII where a character only looks different, with digits of any script as 0 to 9 and without
    invisible characters.

    >>> plain("\\uff14\\uff12\\u00a0\\u2212 1\\u200b"), plain("\\u0661\\u0668")
    ('42 - 1', '18')
    """
    if text.isascii():
        return text
    return _OTHER_DIGIT.sub(lambda digit: str(unicodedata.decimal(digit[0])), text.translate(_PLAIN))


def required(ground_truth: Any, reward: str) -> Any:
    """Returns the ground truth, which must be given.

    Raises:
        ValueError: it is None or empty.
    """
    if ground_truth is None or (isinstance(ground_truth, str | list | tuple | dict) and not ground_truth):
        raise ValueError(f"the reward {reward} needs a ground_truth, and the row has none")
    return ground_truth


def required_text(ground_truth: Any, reward: str) -> str:
    """Returns the ground truth as text; it must be given, and be a text or a number.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(required(ground_truth, reward), str | numbers.Number):
        raise ValueError(
            f"the reward {reward} compares with a text or a number, and the ground_truth is {ground_truth!r}"
        )
    return str(ground_truth)


def last_boxed(text: str) -> tuple[str, int] | None:
    r"""Returns the content of the last ``\boxed{...}`` (or ``\fbox{...}``), and where it begins; None without one.

    Braces balance; escaped ones do not count. Without braces it holds a number, a letter or a command next to it. A
    last box that never closes, or holds nothing, is no answer, whatever came before it.

    >>> last_boxed(r"so \boxed{1}, no: $\boxed{\frac{1}{2}}$")[0], last_boxed(r"\boxed{1} \boxed{2"), last_boxed("1")
    ('\\frac{1}{2}', None, None)
    """
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"), text.rfind("\\framebox"))
    if start < 0:
        return None
    found = _BOX.match(text, start)
    if found is None:
        bare = _BARE_BOX.match(text, start)
        return None if bare is None else (bare[1], start)
    depth = 1
    for brace in _BRACES.finditer(text, found.end()):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[found.end() : brace.start()], start
    return None


def last_tag(text: str, tag: str) -> str | None:
    """Returns the content of the last ``<tag>...</tag>``, without white space around it; None without one.

    A last tag that never closes is no answer, whatever came before it.

    >>> last_tag("<a>1</a> <a> 2 </a> 3", "a"), last_tag("<a>1</a> <a>2", "a"), last_tag("1</a>", "a")
    ('2', None, None)
    """
    before, closed, after = text.rpartition(f"</{tag}>")
    _, opened, inside = before.rpartition(f"<{tag}>")
    return inside.strip() if closed and opened and f"<{tag}>" not in after else None


def decimal(text: str) -> Fraction | None:
    """Reads a number in decimal notation, exactly; commas may separate its thousands.

    >>> decimal("-1,000.50"), decimal("007"), decimal(".5"), decimal("1,00"), decimal("1e3"), decimal("-")
    (Fraction(-2001, 2), Fraction(7, 1), Fraction(1, 2), None, None, None)
    """
    found = _NUMBER.fullmatch(text) if len(text) <= LONGEST_NUMBER else None
    if found is None or not (found[2] or len(found[3] or "") > 1):
        return None
    return Fraction(found[1] + (found[2].replace(",", "") or "0") + (found[3] or "").rstrip("."))
