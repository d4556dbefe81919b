"""Rewards of questions with short answers: exact match and F1 of words, as SQuAD measures. Rajpurkar et al. 2016.

Answer and right answers are compared in lower case, without punctuation, articles and spare white space (arXiv
1606.05250; search-R1, arXiv 2503.09516). Unlike there, punctuation within a number is a part of it, so that 1.5 is not
15, -5 is not 5, and 1,000.0 is 1000; C++ is not C, and the A of vitamin A is no article. What counts is the last
``<answer>...</answer>``; with ``whole=True`` the response itself. verl, as search-R1, quarters the reward of a response
with more than ten tags; here the last answer is the answer, however many came before.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping
from typing import Any

from hybridflow.rewards.verifiable.text import decimal, last_tag, plain, required, required_text

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b(?=\s+\S)")
_NUMBER = re.compile(r"(?<![0-9a-z])(?:-{0,9}|[<>]=?)[.]?[0-9](?:[0-9.,:/_^+*=<>-]{0,99}[0-9])?")
_AFTER_NAME = re.compile(r"(?<=[a-z])[+#]+(?![a-z0-9])|(?<=\b[abo])-(?![\w-])|(?<=\bab)-(?![\w-])")  # C++, A-
_KEPT = str.maketrans(
    ".,:/_^-+#*=<>", "\u00b7\u201a\u2236\u2044\u203f\u02c4\u2212\uff0b\uff03\u2217\uff1d\uff1c\uff1e"
)  # what is no ASCII stays
_VERDICTS = ("yes", "no", "noanswer")  # right or wrong as a whole, as HotpotQA's evaluation has it


def exact_match(response: str, ground_truth: Any, whole: bool = False) -> float:
    """Returns 1.0 if the answer is one of the right ones, else 0.0.

    >>> exact_match("<answer>The Paris.</answer>", "paris")
    1.0
    >>> exact_match("<answer>NY</answer>", {"target": ["NYC", "NY"]})
    1.0
    >>> exact_match("Paris", "Paris"), exact_match("Paris", "Paris", whole=True)
    (0.0, 1.0)
    >>> exact_match("<answer>Rome</answer> <answer>Paris or Rome</answer>", "Rome")
    0.0

    Args:
        response: what the policy generated.
        ground_truth: a right answer, a list of them, or either as ``target`` of a mapping.
        whole: the whole response is the answer, without tags.

    Raises:
        ValueError: there is no right answer.
    """
    said, truths = _said(response, whole), [normal(true) for true in _truths(ground_truth, "qa_em")]
    return float(said != "" and said in truths)


def f1(response: str, ground_truth: Any, whole: bool = False) -> float:
    """Computes the harmonic mean of precision and recall of the answer's words, for the right answer that is nearest to
    it.

    >>> f1("<answer>Paris, France</answer>", ["Paris", "Rome"]), f1("<answer>no</answer>", "no way")
    (0.6666666666666666, 0.0)

    Args and errors are those of `exact_match`.
    """
    said, truths = _said(response, whole), [normal(true) for true in _truths(ground_truth, "qa_f1")]
    return max(_overlap(said, true) for true in truths)


def normal(text: str) -> str:
    """Returns a text in lower case, without punctuation or articles, with single spaces; a text that only has those is
    returned unchanged.

    >>> normal("The  U.S. Army!"), normal("The"), normal("1,000.0"), normal("C++") == normal("C")
    ('us army', 'the', '1000', False)
    """
    lower = _AFTER_NAME.sub(lambda found: found[0].translate(_KEPT), plain(text).lower())
    lower = _NUMBER.sub(_number, lower)
    return " ".join(_ARTICLES.sub(" ", lower.translate(_PUNCTUATION)).split()) or lower.strip()


def _number(found: re.Match[str]) -> str:
    value = decimal(found[0])
    if value is None:
        return found[0].translate(_KEPT)
    digits = found[0].replace(",", "")
    return (digits.rstrip("0").rstrip(".") if "." in digits else digits).translate(_KEPT)


def _said(response: str, whole: bool) -> str:
    said = response if whole else last_tag(response, "answer")
    return normal(said) if said is not None else ""


def _truths(ground_truth: Any, reward: str) -> list[str]:
    found = ground_truth.get("target") if isinstance(ground_truth, Mapping) else ground_truth
    truths = list(found) if isinstance(found, list | tuple) else [found]
    return [required_text(true, reward) for true in required(truths, reward)]


def _overlap(said: str, true: str) -> float:
    if said != true and (said in _VERDICTS or true in _VERDICTS):
        return 0.0
    said_words, true_words = said.split(), true.split()
    common = (Counter(said_words) & Counter(true_words)).total()
    return 2 * common / (len(said_words) + len(true_words)) if common else 0.0
