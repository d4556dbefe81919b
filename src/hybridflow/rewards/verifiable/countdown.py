"""The reward of the countdown game: reach a number with the four operations from given numbers, each used once.

As in TinyZero (Pan et al. 2025), whose rows hold ``{"target": 98, "numbers": [44, 19, 35]}``. What counts is the last
``<answer>...</answer>``, or the last line of a response without one; ``= 98`` may follow, or ``98 =`` come before, if
that is the target. The expression, also in LaTeX, is read, never run, and worked out in fractions. TinyZero gives its
format score to any text in the tags; here the expression must be one over exactly the given numbers. verl's own table
does not route it.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from hybridflow.rewards.verifiable.text import decimal, last_tag, plain, required

LONGEST = 300  # characters of an expression
_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}")
_NOTHING = re.compile(r"\\(?:left|right|boxed)(?![a-zA-Z])|\\[()\[\],;! ]|[$`]")
_TIMES = re.compile(r"\\times(?![a-zA-Z])|\\cdot(?![a-zA-Z])|[\u00d7\u00b7\u22c5]|(?<=[0-9) ])[xX](?=[0-9( ])")
_DIVIDED = re.compile(r"\\div(?![a-zA-Z])|\u00f7")
_BRACKETS = str.maketrans("[]{}", "()()")
_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_ALLOWED = re.compile(r"[0-9+\-*/() ]+")


def score(response: str, ground_truth: Any, format_score: float = 0.0) -> dict[str, float]:
    """Returns ``score`` 1.0 if the target is reached, ``valid`` 1.0 if the given numbers are used, each once.

    >>> goal = {"target": 98, "numbers": [44, 19, 35]}
    >>> score("<think>44 + 19 = 63</think> <answer>(44 + 19) + 35 = 98</answer>", goal)
    {'score': 1.0, 'valid': 1.0}
    >>> score("<answer>44 + 19 - 35</answer>", goal), score("<answer>98</answer>", goal)["valid"]
    ({'score': 0.0, 'valid': 1.0}, 0.0)

    Args:
        response: what the policy generated.
        ground_truth: ``target`` and ``numbers``.
        format_score: for an expression over exactly the given numbers that misses the target.

    Raises:
        ValueError: the ground truth is not of that form.
    """
    required(ground_truth, "countdown")
    if not isinstance(ground_truth, Mapping) or not {"target", "numbers"} <= set(ground_truth):
        raise ValueError(f"the ground truth of countdown is {{'target': ..., 'numbers': [...]}}, not {ground_truth!r}")
    target = Fraction(str(ground_truth["target"]))
    found = _evaluate(_expression(response), target)
    if found is None or sorted(found[1]) != sorted(int(number) for number in ground_truth["numbers"]):
        return {"score": 0.0, "valid": 0.0}
    return {"score": 1.0 if found[0] == target else format_score, "valid": 1.0}


def _expression(response: str) -> str:
    inside = last_tag(response, "answer")
    if inside is not None:
        return inside
    return "" if "<answer>" in response else response.rstrip().rpartition("\n")[2]


def _evaluate(text: str, target: Fraction) -> tuple[Fraction | None, list[int]] | None:
    """Returns value (None: a division by zero) and numbers of an expression; None where it is none."""
    if len(text) > LONGEST:
        return None
    text = _FRACTION.sub(r"((\1)/(\2))", plain(text).strip(" *`$").removesuffix("."))
    text = _DIVIDED.sub("/", _TIMES.sub("*", _NOTHING.sub("", text))).translate(_BRACKETS)
    text, equals, right = (part.strip() for part in text.partition("="))
    if equals and decimal(text) == target:  # 98 = 44 + 19 + 35
        text, right = right, text
    if not _ALLOWED.fullmatch(text) or (equals and decimal(right) != target):
        return None
    try:
        tree = ast.parse(text, mode="eval").body
        numbers: list[int] = []
        return _value(tree, numbers), numbers
    except (SyntaxError, ValueError, MemoryError, RecursionError):  # the last two: brackets too deep for the parser
        return None


def _value(node: ast.expr, numbers: list[int]) -> Fraction | None:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        numbers.append(node.value)
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        operand = _value(node.operand, numbers)
        return -operand if operand is not None and isinstance(node.op, ast.USub) else operand
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left, numbers), _value(node.right, numbers)
        if type(node.op) in _OPERATORS:
            impossible = left is None or right is None or (isinstance(node.op, ast.Div) and right == 0)
            return None if impossible else _OPERATORS[type(node.op)](left, right)
    raise ValueError("neither a whole number nor one of the four operations")
