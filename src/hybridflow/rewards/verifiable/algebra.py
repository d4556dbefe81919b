"""Decides whether two expressions are equal by algebra: sympy (Meurer 2017); for integrals, sums and limits
math-verify.

`equal` may never end, so `math` calls it through `killable`, and nothing else imports this module. The time limits of
math-verify are off: they use signals, and in any thread but the main one they make every answer wrong.
"""

from __future__ import annotations

import logging
from fractions import Fraction
from typing import Any

import sympy

from hybridflow.rewards.verifiable.expressions import Comparison
from hybridflow.rewards.verifiable.latex import read
from hybridflow.rewards.verifiable.latex_names import TRIGONOMETRIC
from hybridflow.rewards.verifiable.latex_tree import Node, Unreadable
from hybridflow.rewards.verifiable.text import decimal

_SAMPLES = (Fraction(37, 29), Fraction(-53, 31), Fraction(71, 13))  # where expressions in names are compared first
_DIGITS = 50
_NEAR = sympy.Float(10) ** -30
_CONSTANTS: dict[str, Any] = {
    "pi": sympy.pi, "e": sympy.E, "i": sympy.I, "oo": sympy.oo, "empty": sympy.S.EmptySet, "set R": sympy.S.Reals,
    "set Z": sympy.S.Integers, "set N": sympy.S.Naturals, "set Q": sympy.S.Rationals, "set C": sympy.S.Complexes,
}  # fmt: skip
_FUNCTIONS: dict[str, Any] = {
    "sin": sympy.sin, "cos": sympy.cos, "tan": sympy.tan, "cot": sympy.cot, "sec": sympy.sec, "csc": sympy.csc,
    "arcsin": sympy.asin, "arccos": sympy.acos, "arctan": sympy.atan, "arccot": sympy.acot, "sinh": sympy.sinh,
    "cosh": sympy.cosh, "tanh": sympy.tanh, "ln": sympy.log, "exp": sympy.exp, "floor": sympy.floor,
    "ceiling": sympy.ceiling, "arg": sympy.arg, "Re": sympy.re, "Im": sympy.im, "binom": sympy.binomial,
    "gcd": sympy.gcd, "lcm": sympy.lcm, "max": sympy.Max, "min": sympy.Min,
    "lg": lambda x: sympy.log(x, 10), "log": lambda x, base=10: sympy.log(x, base),
}  # fmt: skip
_SIGNS: dict[str, Any] = {"<": sympy.Lt, "<=": sympy.Le, ">": sympy.Gt, ">=": sympy.Ge, "=": sympy.Eq, "!=": sympy.Ne}
_MIRRORED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!="}
_SETS = frozenset(["bracket", "set", "union", "intersection", "setminus", "constant"])


def equal(said: str, true: str) -> bool:
    """Returns whether an answer equals the right one. What cannot be read as an expression equals nothing."""
    try:
        return Algebra().answers(read(said), read(true)) is True
    except Unreadable:
        return _by_library(said, true)


def _by_library(said: str, true: str) -> bool:
    from math_verify import LatexExtractionConfig, parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time limits are off
    # The whole text is one LaTeX expression. math-verify's reader of plain text is left out: it uses eval.
    target = (LatexExtractionConfig(try_extract_without_anchor=False, boxed_match_priority=0),)
    found, expected = (
        parse(f"\\boxed{{{text}}}", target, fallback_mode="no_fallback", parsing_timeout=None) for text in (said, true)
    )
    return bool(found and expected) and bool(verify(expected, found, float_rounding=12, timeout_seconds=None))


class Algebra(Comparison):
    """Compares by algebra what structure and exact arithmetic cannot decide."""

    def by_algebra(self, said: Node, true: Node) -> bool:
        """Returns whether two trees are equal; trees that sympy cannot compare are not."""
        kinds = {said.kind, true.kind}
        try:
            if kinds == {"relation"} and (same := _same_relation(said, true)) is not None:
                return same
            if (
                kinds & {"relation", "list"}
                or kinds & {"union", "intersection", "setminus"}
                or kinds & {"bracket", "set"}
            ):
                return _same_set(said, true)
            return _same_value(_sympy(said), _sympy(true))
        except (Unreadable, TypeError, ValueError, NotImplementedError, AttributeError, ZeroDivisionError):
            return False  # sympy's ways to say that it has no such thing


def _same_value(said: Any, true: Any) -> bool:
    if isinstance(said, sympy.MatrixBase) or isinstance(true, sympy.MatrixBase):
        both = isinstance(said, sympy.MatrixBase) and isinstance(true, sympy.MatrixBase) and said.shape == true.shape
        return both and all(_same_value(a, b) for a, b in zip(said, true))
    if isinstance(said, sympy.Set) or isinstance(true, sympy.Set):
        return bool(said == true)
    if said == true:
        return said not in (sympy.nan, sympy.zoo)
    if said.has(sympy.oo, sympy.nan, sympy.zoo) or true.has(sympy.oo, sympy.nan, sympy.zoo):
        return False
    difference = said - true
    if difference == 0:
        return True
    names = sorted(difference.free_symbols, key=str)
    for sample in _SAMPLES if names else _SAMPLES[:1]:
        at = difference.subs({name: sample + Fraction(place, 7) for place, name in enumerate(names)})
        found = at.evalf(_DIGITS)
        if found.is_number and found.is_finite and abs(found) > _NEAR:
            return False
    return sympy.expand(difference) == 0 or sympy.simplify(difference) == 0 or difference.equals(0) is True


def _same_relation(said: Node, true: Node) -> bool | None:
    """Returns whether two relations of two sides are the same one up to a factor; None where only sets can decide."""
    if " " in said.text or " " in true.text or said.text not in _SIGNS or true.text not in _SIGNS:
        return None
    difference, expected = (_sympy(node.parts[0]) - _sympy(node.parts[1]) for node in (said, true))
    ratio = sympy.simplify(difference / expected)
    if not ratio.is_number or ratio.is_zero or not ratio.is_finite:
        return None if said.text != "=" else False
    sign = said.text if ratio.is_positive else _MIRRORED[said.text]
    return bool(sign == true.text)


def _same_set(said: Node, true: Node) -> bool:
    (found, name), (expected, true_name) = _set(said), _set(true)
    if name is not None and true_name is not None and name != true_name:
        return False
    if found == expected:
        return True
    if isinstance(found, sympy.Complement | sympy.Intersection) or isinstance(expected, sympy.Complement):
        return False
    return found.is_subset(expected) is True and expected.is_subset(found) is True


def _set(node: Node) -> tuple[Any, Any]:
    """Returns the set of numbers that a tree is, or that a relation of one name allows, and the name."""
    parts = node.parts
    if node.kind == "bracket" and len(parts) == 2:
        ends = [_sympy(part) for part in parts]
        if not all(end.is_extended_real for end in ends) or (ends[0] >= ends[1]) == True:  # noqa: E712
            raise Unreadable("no interval")
        return sympy.Interval(*ends, left_open=node.text[0] == "(", right_open=node.text[1] == ")"), None
    if node.kind == "set":
        return sympy.FiniteSet(*map(_sympy, parts)), None
    if node.kind == "constant" and isinstance(_CONSTANTS.get(node.text), sympy.Set):
        return _CONSTANTS[node.text], None
    if node.kind in ("union", "intersection", "setminus"):
        made = {"union": sympy.Union, "intersection": sympy.Intersection, "setminus": sympy.Complement}[node.kind]
        return made(*(_set(part)[0] for part in parts)), None
    if node.kind == "list" and node.text in ("or", "and"):
        sets, names = zip(*map(_set, parts))
        if len(set(names)) != 1:
            raise Unreadable("relations of several names")
        return (sympy.Union if node.text == "or" else sympy.Intersection)(*sets), names[0]
    if node.kind == "relation" and node.text == "in" and len(parts) == 2:
        return _set(parts[1])[0], _sympy(parts[0])
    if node.kind != "relation" or not all(sign in _SIGNS for sign in node.text.split()):
        raise Unreadable("no set of numbers")
    sides = [_sympy(part) for part in parts]
    free = {name for side in sides for name in side.free_symbols}
    if len(free) != 1:
        raise Unreadable("a relation of other than one name")
    found = sympy.S.Reals
    for left, sign, right in zip(sides, node.text.split(), sides[1:]):
        found = sympy.Intersection(found, _SIGNS[sign](left, right).as_set())
    return found, free.pop()


def _sympy(node: Node) -> Any:
    """Returns a tree as an expression of sympy."""
    match node.kind:
        case "number":
            number = decimal(node.text)
            assert number is not None
            return sympy.Rational(number.numerator, number.denominator)
        case "name":
            return sympy.Symbol(node.text, real=True)
        case "constant":
            return _CONSTANTS[node.text] if node.text in _CONSTANTS else sympy.Symbol(node.text)
        case "base":
            digits, _, base = node.text.partition("_")
            return sympy.Integer(int(digits, int(base)))
        case "matrix" | "det":
            matrix = sympy.Matrix([[_sympy(cell) for cell in row.parts] for row in node.parts])
            return matrix if node.kind == "matrix" else matrix.det()
        case "call":
            return _called(node)
        case "bracket" if node.text == "[]" and len(node.parts) == 1:
            return _sympy(node.parts[0])
    parts = [_sympy(part) for part in node.parts]
    match node.kind:
        case "neg":
            return -parts[0]
        case "add" | "mixed":
            return parts[0] + parts[1]
        case "mul":
            return parts[0] * parts[1]
        case "div" | "ratio" if len(parts) == 2:
            return parts[0] / parts[1]
        case "pow":
            return parts[0] ** parts[1]
        case "abs":
            return sympy.Abs(parts[0])
        case "factorial":
            return sympy.factorial(parts[0])
        case "degree":
            return parts[0]
    raise Unreadable(f"{node.kind} is no value")


def _called(node: Node) -> Any:
    items = node.parts[0].parts if node.parts[0].kind == "list" else node.parts
    if node.text in TRIGONOMETRIC:
        items = tuple(_in_radians(item) for item in items)
    arguments = [_sympy(item) for item in items]
    if node.text == "root":
        return _root(*arguments)
    if node.text == "^T":
        return arguments[0].T
    if node.text == "det":
        return arguments[0].det()
    if node.text in _FUNCTIONS:
        return _FUNCTIONS[node.text](*arguments)
    return sympy.Function(node.text, real=True)(*arguments)


def _root(of: Any, degree: Any) -> Any:
    """Returns the root; of a negative number, a root of odd degree is the real one."""
    if of.is_negative and degree.is_odd:
        return -sympy.root(-of, degree)
    return sympy.root(of, degree)


def _in_radians(node: Node) -> Node:
    """Converts degrees in the argument of a trigonometric function to radians."""
    parts = tuple(_in_radians(part) for part in node.parts)
    if node.kind == "degree":
        half_turn = Node("div", (Node("constant", (), "pi"), Node("number", (), "180")))
        return Node("mul", (*parts, half_turn))
    return Node(node.kind, parts, node.text)
