r"""The reward of multiple-choice questions: 1 if the letter stated last is the right one.

A letter is stated in one of these forms; the last of them in the response counts:

- ``\boxed{C}``, ``\boxed{(c)}``, ``\boxed{\text{C}}``
- ``Answer: C``, ``the answer is (c)``, ``answer is **C**``
- ``(C)`` with nothing but white space and full stops after it
- ``C``, ``C.`` or ``C) Paris`` as the whole last line

Outside brackets and boxes it is a capital letter, for "the answer is a matter of taste" states nothing. Two letters in
one statement (``Answer: A or C``) are wrong; a statement in quotation marks is none. After a last ``Answer:`` or box
without a letter there is no answer. Sets: GPQA (arXiv 2311.12022),
MMLU (2009.03300), ARC (1803.05457). verl has no reward for these.
"""

from __future__ import annotations

import functools
import re
from typing import Any

from hybridflow.rewards.verifiable.text import plain, required_text

LAST_CHARACTERS = 1000
_MARKER = re.compile(r"(?i:\banswer\b)(?:[ \t*]{0,5}:|[ \t]{1,5}is[\s*$(?]*\Z)|\\boxed")


def score(response: str, ground_truth: Any, choices: str = "ABCD") -> float:
    r"""Returns 1.0 for the right letter, else 0.0.

    >>> [score(r, "C") for r in [r"\boxed{\text{C}}", "The answer is (c)", "**Answer:** C", "Not B. (C).", "C) Rome"]]
    [1.0, 1.0, 1.0, 1.0, 1.0]
    >>> [score(r, "C") for r in ["Answer: B or C", "Answer: C\nAnswer: D", "C is a letter", "(A) (B) (C) (D)", ""]]
    [0.0, 0.0, 0.0, 0.0, 0.0]

    Args:
        response: what the policy generated; its last `LAST_CHARACTERS` are read.
        ground_truth: the letter, in brackets or not, or its place, counted from 0.
        choices: the letters that there are.

    Raises:
        ValueError: the ground truth is none of them.
    """
    true = _truth(ground_truth, choices)
    text = plain(response[-LAST_CHARACTERS:]).rstrip()
    statements = list(_forms(choices).finditer(text))
    markers = list(_MARKER.finditer(text))
    if not statements or (markers and markers[-1].start() >= statements[-1].end()):
        return 0.0
    stated = statements[-1]
    place = next(number for number in range(1, len(stated.groups()) + 1) if stated[number])
    another = _another(choices).match(text, stated.end(place))
    return float(stated[place].upper() == true and (another is None or (another[1] or "").upper() == true))


def _truth(ground_truth: Any, choices: str) -> str:
    if isinstance(ground_truth, int) and not isinstance(ground_truth, bool) and 0 <= ground_truth < len(choices):
        return choices[ground_truth]
    letter = plain(required_text(ground_truth, "multiple_choice")).strip(" ().").upper()
    if len(letter) == 1 and letter in choices:
        return letter
    raise ValueError(f"the ground truth {ground_truth!r} is none of the choices {choices}")


@functools.cache
def _forms(choices: str) -> re.Pattern[str]:
    upper, any_case = re.escape(choices.upper()), re.escape(choices.upper() + choices.lower())
    bracketed = rf"\([ \t*]{{0,3}}([{any_case}])[ \t*.]{{0,3}}\)"
    styled = r"(?:\\(?:text|textbf|mathrm|mathbf)[ \t]?\{)?"
    named = r"(?:[ \t*.]{0,3}\}|\)?[.):]?[ \t][^\n{}]{0,200}\})"  # what the letter stands for may follow
    boxed = (
        rf"\\boxed(?:[ \t]?\{{[ \t]?{styled}[ \t*]{{0,3}}\(?([{any_case}])\)?{named}|[ \t]([{upper}])(?![A-Za-z0-9]))"
    )
    announced = r"(?i:\b(?:answer|option|choice)(?:[ \t]{1,5}is\b|[ \t*]{0,5}:)(?:[ \t]{0,5}(?:option|choice)\b)?)"
    marked = rf"{announced}[ \t*:$]{{0,9}}{styled}"
    alone = rf"^[ \t*]{{0,9}}([{upper}])[*]{{0,3}}(?:[ \t]*[.)]?$|[.):][ \t][^\n]*$)(?![\s\S])"
    letter = rf"([{upper}])(?![A-Za-z0-9'])(?<!A(?=[ \t][a-z]))(?![-+#=?])"
    at_the_end = r"(?=[\s.*$}]*$(?![\s\S]))"
    quote = f'["{chr(0x201D)}]'
    return re.compile(
        rf"{boxed}|{marked}(?:{boxed}|{bracketed}|{letter})(?![.)]{{0,2}}{quote})|{bracketed}{at_the_end}|{alone}",
        re.MULTILINE,
    )


@functools.cache
def _another(choices: str) -> re.Pattern[str]:
    """Returns a pattern for a further letter, right after a first one, or for a word that takes the first one back."""
    letters = re.escape(choices.upper())
    word = r"(?:or|nor|maybe|is(?![ \t]+(?:the[ \t]+)?(?:right|correct)))\b"
    joined = rf"(?:,|/|&|;|\||\+|=|\?|\band\b|\bor\b)[ \t*]{{0,5}}(?:or[ \t])?\(?([{letters}])(?![A-Za-z0-9])"
    doubt = r"(?i:but|no|possibly|perhaps|then|versus|vs)\b[ \t,.:]{0,3}(?:(?!not)[a-z]{1,9}[ \t,]{1,3}){0,2}"
    beside = rf"(?:[ \t,.(]{{0,3}}{doubt}|(?<=[ \t])(?<![.)][ \t]))\(?[{letters}](?![A-Za-z0-9']|[ \t]+[a-z])"
    return re.compile(rf"[ \t.*)}}$]{{0,5}}(?:{joined}|[ \t,.(]{{0,3}}(?i:{word})|{beside})")
