r"""Whether two mathematical answers say the same, as far as their texts and exact arithmetic tell. No sympy here.

A number is one that is worked out: ``1/2``, ``\frac{1}{2}``, ``0.5``, ``1{,}000``, ``3\frac{1}{2}``, ``2 \times 10^3``.
A unit, a dollar or a per cent sign may stand beside it, and does not count. Where the right answer is a number, the
answer must be one: for 1591, ``37 \cdot 43`` would only repeat the question. Numbers are compared exactly, so 0.333 is
not 1/3. Words are compared without case. For the rest, see `algebra`.
"""

from __future__ import annotations

import re
from fractions import Fraction

from hybridflow.rewards.text import decimal, plain

LONGEST = 2000  # characters of an answer that is looked at
LONGEST_UNIT = 60

_DROPPED = re.compile(
    r"\\(?:left|right|displaystyle|quad|limits)(?![a-zA-Z])|\\[!,;:()\[\]%$]|[$%]|\^\s*(?:\\circ|\{\s*\\circ\s*\})"
    r"|\\degree(?![a-zA-Z])"
)
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mbox|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}")
_FRACTION = re.compile(r"\\[dtc]?frac\s*(\{|[0-9])")
_BARE = re.compile(r"\\(frac|sqrt)\s*([0-9a-z])\s*(?:([0-9a-z])|(?=\{))?")
_WORDS = re.compile(r"[A-Za-z][A-Za-z' .-]*[A-Za-z.]")
_CHOICE = re.compile(r"\(?([A-Za-z])\)?")
_ONE_LETTER = re.compile(r"[a-zA-Z](?:\([a-zA-Z]\))?\s*=")
_LEFT_SIDE = re.compile(r"[^=]{1,40}=")
_QUOTIENT = re.compile(r"([+-]?)(?:\\frac\{([^{}]*)\}\{([^{}]*)\}|([0-9.,]+)/([0-9.,]+))")
_MIXED = re.compile(r"([+-]?)([0-9]+)(?: ([0-9]+)/([0-9]+)|\s*\\frac\{([0-9]+)\}\{([0-9]+)\})")
_SCIENTIFIC = re.compile(r"([+-]?[0-9.,]+)(?:(?:\\times|\\cdot|\*|x)10\^\{?([+-]?[0-9]{1,3})\}?|[eE]([+-]?[0-9]{1,3}))")
_ORDERED = re.compile(r"[(\[].*[)\]]")
_BOLD = re.compile(r"\*\*([^*]*)\*\*")
_SPACE = re.compile(r"(?<![0-9]) | (?![0-9])")  # but not between digits: 5 6 is not 56
_UNIT = re.compile(r"(?<![A-Za-z])(?:\\text\{([A-Za-z ./]*)\}|([A-Za-z][A-Za-z ./]*))(?:\^\{?[23]\}?)?$")
_NOT_UNITS = set("hundred thousand million billion trillion dozen half pi squared cubed or and not".split())  # noqa: SIM905
_UNITS = set(
    """
    degree degrees deg radian radians dollar dollars cent cents euro euros pound pounds percent unit units square
    cubic sq inch inches foot feet ft yard yards mile miles mph km cm mm nm meter meters metre metres kilometer
    kilometers centimeter centimeters kg mg gram grams liter liters litre litres ml ounce ounces second seconds
    sec minute minutes min hour hours hr hrs day days week weeks month months year years per point points way ways
    people student students digit digits integer integers number numbers pair pairs time times ton tons gallon
    gallons
    """.split()  # noqa: SIM905
)


def same(said: str, true: str) -> bool | None:
    r"""Whether an answer says what the right one says; None where only algebra can tell.

    >>> same(r"\frac12", "0.5"), same(r"18\text{ dollars}", "$18"), same("x = 1,000", "1000"), same(r"(\text{c})", "C")
    (True, True, True, True)
    >>> same("0.33", r"\frac13"), same("18 or 19", "18"), same(r"2 \cdot 9", "18"), same("", "18"), same("5", "yes")
    (False, False, False, False, False)
    >>> same("y + x", "x+y"), same("2", r"\sqrt{4}")
    (None, None)
    """
    if len(said) > LONGEST or len(true) > LONGEST:
        return True if said.strip() == true.strip() else None
    said, true = normal(said), normal(true)
    if "=" not in _without_letter(true):
        true, said = _without_letter(true), _without_left_side(said)
    if not said or ("=" in said and "=" not in true):
        return False
    if _packed(said) == _packed(true):
        return True
    if _is_set(said) != _is_set(true) and (_ORDERED.fullmatch(said) or _ORDERED.fullmatch(true)):
        return False
    number = value(true)
    if number is not None:
        return value(said) == number
    words, said_words = _word(true), _word(said)
    if words is not None:
        return said_words == words
    return None


def normal(latex: str) -> str:
    r"""The text without what does not change its meaning: spacing, sizes, delimiters, signs of currency and per cent.

    >>> normal(r"$\left( \dfrac12,\ \sqrt3 \right)$."), normal(r"1{,}000\%"), normal(r"\text{ Monday }")
    ('( \\frac{1}{2}, \\sqrt{3})', '1,000', 'Monday')
    """
    text = _DROPPED.sub("", plain(latex).replace("{,}", ",").replace("\\ ", " ").replace("~", " "))
    text = _FRACTION.sub(r"\\frac\1", text)
    text = _BARE.sub(_braced, text)
    text = " ".join(text.split())
    text = bold[1].strip() if (bold := _BOLD.fullmatch(text.removesuffix("."))) else text
    whole = _TEXT.fullmatch(text.removesuffix("."))
    text = whole[1].strip() if whole else _TEXT.sub(lambda m: f"\\text{{{m[1]}}}", text)
    return text[:-1].rstrip() if text.endswith(".") else text


def value(text: str) -> Fraction | None:
    r"""The number that a `normal` text is, exactly; None where it is none that is worked out.

    >>> value(r"-3\frac{1}{2}"), value("1.5 \\times 10^{3}"), value("7 1/2 cm"), value(r"12\text{ cm}^2"), value("2/0")
    (Fraction(-7, 2), Fraction(1500, 1), Fraction(15, 2), Fraction(12, 1), None)
    """
    text = _without_unit(text)
    mixed = _MIXED.fullmatch(text)
    if mixed is not None:
        parts = [int(group) for group in mixed.groups()[1:] if group is not None and len(group) < 100]
        if len(parts) < 3 or parts[2] == 0:
            return None
        amount = parts[0] + Fraction(parts[1], parts[2])
        return -amount if mixed[1] == "-" else amount
    text = _SPACE.sub("", text)
    quotient = _QUOTIENT.fullmatch(text)
    if quotient is not None:
        above, below = (decimal(part) for part in quotient.groups()[1:] if part is not None)
        if above is None or not below:
            return None
        return -above / below if quotient[1] == "-" else above / below
    scientific = _SCIENTIFIC.fullmatch(text)
    if scientific is not None:
        digits = decimal(scientific[1])
        return None if digits is None else digits * Fraction(10) ** int(scientific[2] or scientific[3])
    return decimal(text)


def _braced(found: re.Match[str]) -> str:
    """``\\frac12`` with its braces, and ``\\sqrt2``."""
    command, first, second = found.groups()
    if command == "sqrt":
        return f"\\sqrt{{{first}}}{second or ''}"
    return f"\\frac{{{first}}}" + (f"{{{second}}}" if second else "")


def _packed(text: str) -> str:
    text = _SPACE.sub("", text.replace("\\text{", "{"))
    found = _CHOICE.fullmatch(text)
    return found[1].upper() if found and text.startswith("(") else text


def _is_set(text: str) -> bool:
    return text.startswith("\\{") and text.endswith("\\}")


def _word(text: str) -> str | None:
    """Words in lower case, a letter in upper case; None for anything else."""
    text = _TEXT.sub(r"\1", text).strip()
    found = _CHOICE.fullmatch(text)
    if found is not None and (len(text) == 3 or found[1].isupper()):
        return found[1].upper()
    return " ".join(text.lower().rstrip(".").split()) if _WORDS.fullmatch(text) else None


def _without_letter(text: str) -> str:
    """Without ``x =`` before it."""
    return text[found.end() :].strip() if (found := _ONE_LETTER.match(text)) else text


def _without_left_side(text: str) -> str:
    """Without what is said to be equal to it, if that has a letter: ``x + y =`` can be dropped, ``4 =`` cannot."""
    found = _LEFT_SIDE.match(text)
    if found is None or text.count("=") != 1:
        return text
    return text[found.end() :].strip() if re.search(r"[a-zA-Z]", re.sub(r"\\[a-zA-Z]+", "", found[0])) else text


def _without_unit(text: str) -> str:
    found = _UNIT.search(text, max(0, len(text) - LONGEST_UNIT))
    if found is None or found.start() == 0:
        return text
    words = re.split(r"[ ./]+", (found[1] if found[2] is None else found[2]).strip(" ./").lower())
    known = all(w in _UNITS for w in words) if found[1] is None else not _NOT_UNITS & set(words)
    return text[: found.start()].rstrip() if known else text
