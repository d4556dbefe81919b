r"""Decides whether two mathematical answers mean the same, as far as structure and exact arithmetic can. No sympy here.

Both are read as trees (`latex`), and trees are compared part by part: entries of tuples, intervals and matrices in
their order, items of lists and sets in any, each as often as it occurs. What cannot be read equals only its own text. A
unit is compared with a unit, and may be left out. A base counts, and so do names of variables.

Where the right answer is a number, the answer must be one that is worked out: ``1/2``, ``\frac{1}{2}``, ``0.5``,
``1{,}000``, ``3\frac{1}{2}``, ``2 \times 10^3``. For 1591, ``37 \cdot 43`` would only repeat the question. Numbers are
compared exactly, so 0.333 is not 1/3. Words are compared without case. For the rest, see `algebra`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from fractions import Fraction

from hybridflow.rewards.verifiable.latex import read_tokens
from hybridflow.rewards.verifiable.latex_tokens import Token, tokens
from hybridflow.rewards.verifiable.latex_tree import Node, Unreadable
from hybridflow.rewards.verifiable.text import decimal

LONGEST = 2000  # characters of an answer; longer ones are not parsed
CALCULUS = frozenset(["\\int", "\\iint", "\\oint", "\\sum", "\\prod", "\\lim", "\\partial"])
_LARGEST_POWER = 999  # of ten, in a number that is worked out
_CHOICE = re.compile(r"\( ?([A-Za-z]) ?\)|([A-Z])")
_WORDS = re.compile(r"[A-Za-z][A-Za-z' .-]*[A-Za-z.]")
_DIFFERENCE = re.compile(r"\s-|-\s|(?<![A-Za-z])[A-Za-z]-[A-Za-z](?![A-Za-z])")
_PRODUCT = re.compile(r"[b-df-hj-np-tv-z]{2}|[xyz]{2,3}")  # letters that are no word
_OF_VALUES = ("y", "f", "g", "h")  # names whose value may be a formula: y = 2x is f(x) = 2x
_NAMES = ("name", "call", "abs")


def same(said: str, true: str) -> bool | None:
    r"""Returns whether an answer means the same as the right one; None where only algebra can decide.

    >>> same(r"\frac12", "0.5"), same(r"18\text{ dollars}", "$18"), same("x = 1,000", "1000"), same(r"(\text{c})", "C")
    (True, True, True, True)
    >>> same("0.33", r"\frac13"), same("18 or 19", "18"), same(r"2 \cdot 9", "18"), same("", "18"), same("5", "yes")
    (False, False, False, False, False)
    >>> same("10_3", "10_2"), same("1, 2, 2", "1, 1, 2"), same("1, 234", "1234"), same("(2, 1)", "(1, 2)")
    (False, False, False, False)
    >>> same("y + x", "x+y"), same("2", r"\sqrt{4}")
    (None, None)
    """
    if len(said) > LONGEST or len(true) > LONGEST:
        return True if said.strip() == true.strip() else None
    if (said_number := decimal(said.strip("$ "))) is not None and (number := decimal(true.strip("$ "))) is not None:
        return said_number == number
    answer, expected = _reading(said), _reading(true)
    if not answer.texts or answer.texts == expected.texts:
        return bool(answer.texts)
    if expected.word is not None:
        if answer.word == expected.word:
            return True
        if not _PRODUCT.fullmatch(expected.word):  # xy is yx
            return False
    found, wanted = answer.node, expected.node
    if found is None or wanted is None:
        return None if CALCULUS.intersection(answer.texts + expected.texts) else False
    return Comparison().answers(found, wanted)


class _Reading:
    """A text: its tokens as texts, the words that it is, and its tree, where it has them."""

    def __init__(self, text: str) -> None:
        self._tokens = tokens(text)
        self.texts = _texts(self._tokens)

    @functools.cached_property
    def word(self) -> str | None:
        return _word(self._tokens)

    @functools.cached_property
    def node(self) -> Node | None:
        try:
            return read_tokens(list(self._tokens))
        except Unreadable:
            return None


_reading = functools.lru_cache(maxsize=1024)(_Reading)  # all responses to a prompt have one ground truth


def _texts(found: list[Token]) -> tuple[str, ...]:
    """Returns the tokens as texts, without spaces except where these count: 5 6 is not 56, and 1, 234 is not 1,234."""
    texts = []
    for index, token in enumerate(found):
        before, first = (found[at].kind if at >= 0 else "" for at in (index - 1, index - 2))
        beside = before in ("number", "letters") and token.kind in ("number", "letters")
        group = (
            first == token.kind == "number" and found[index - 1].text == "," and len(token.text.partition(".")[0]) == 3
        )
        counts = beside or group
        texts.append(" " * (counts and token.space != "") + token.text)
    return tuple(texts)


def _word(found: list[Token]) -> str | None:
    """Returns words in lower case, a letter of a choice in upper case; None for anything else."""
    if not all(token.kind in ("text", "letters") or token.text in "()'-." for token in found):
        return None
    text = "".join(" " * (token.space != "" or token.kind == "text") + token.text for token in found)
    text = " ".join(text.split()).replace("( ", "(")
    choice = _CHOICE.fullmatch(text)
    if choice is not None:
        return (choice[1] or choice[2]).upper()
    return text.lower().rstrip(".") if _WORDS.fullmatch(text) and not _DIFFERENCE.search(text) else None


def value(node: Node) -> Fraction | None:
    """Returns the number that a tree is, exactly; None where it is none, or none that is worked out."""
    match node.kind:
        case "number":
            return decimal(node.text)
        case "neg":
            amount = value(node.parts[0]) if node.parts[0].kind not in ("neg", "add") else None
            return None if amount is None else -amount
        case "div":
            above, below = (_plain_number(part) for part in node.parts)
            return above / below if above is not None and below else None
        case "mixed":
            whole, rest = value(node.parts[0]), value(node.parts[1])
            return None if whole is None or rest is None else whole + rest
        case "mul":
            digits = _plain_number(node.parts[0])
            power = _power_of_ten(node.parts[1], million=node.text == "million")
            return None if digits is None or power is None else digits * power
        case "pow":
            return _power_of_ten(node, million=False)
        case "base":
            digits_text, _, base = node.text.partition("_")
            return decimal(digits_text) if base == "10" else None
    return None


def _plain_number(node: Node) -> Fraction | None:
    if node.kind == "neg" and node.parts[0].kind == "number":
        return value(node)
    return value(node) if node.kind == "number" else None


def _power_of_ten(node: Node, million: bool) -> Fraction | None:
    if million:
        return value(node)
    if node.kind != "pow" or node.parts[0] != Node("number", (), "10"):
        return None
    power = _plain_number(node.parts[1])
    if power is None or power.denominator != 1 or abs(power) > _LARGEST_POWER:
        return None
    return Fraction(10) ** int(power)


class Comparison:
    """Compares trees by structure. None means undecided; `algebra` decides, and overrides `by_algebra`."""

    def answers(self, said: Node, true: Node) -> bool | None:
        """Returns whether an answer is the right one. Where the right one is a number, the answer must be one too."""
        number = value(_amount(_right_side(true))[0])
        if said != true and any(map(_is_list_of_inequalities, (said, true))):
            return self.by_algebra(said, true)  # x < 1 or x > 2
        if number is None or said.kind == "list":
            return self.lists(_items(said), _items(true))
        return self.items(said, true, worked_out=True)

    def by_algebra(self, said: Node, true: Node) -> bool | None:
        """Returns whether two trees are equal that exact arithmetic cannot compare."""
        return None

    def lists(self, said: Sequence[Node], true: Sequence[Node]) -> bool | None:
        """Compares lists in any order, each item as often as it occurs; but a = 1, b = 2 are values in their order."""
        if len(said) != len(true):
            return False
        if len(said) > 1 and not any(item.kind == "relation" for item in true) and _names_differ(said):
            return _all(self.items(one, other) for one, other in zip(said, true))
        left, unsure = list(true), False
        for one in said:
            verdicts = [self.items(one, other) for other in left]
            if True in verdicts:
                del left[verdicts.index(True)]
            elif None in verdicts:
                unsure = True
            else:
                return False
        return None if unsure else True

    def items(self, said: Node, true: Node, worked_out: bool = False) -> bool | None:
        """Compares two items of a list, or two answers that are no lists."""
        said, true = _without_estimate(said), _without_estimate(true)
        if said == true:
            return True
        if true.kind == "relation":
            return self._relation(said, true, worked_out)
        if said.kind == "relation" and (sides := _sides_of_value(said, true)) is not None:
            return _all(self.values(side, true, worked_out) for side in sides)
        return self.values(said, true, worked_out)

    def _relation(self, said: Node, true: Node, worked_out: bool) -> bool | None:
        if true.text not in ("=", "in"):
            return self.by_algebra(said, true)
        if said.kind != "relation":
            return self.values(said, true.parts[1], worked_out) if _is_named(true.parts[0]) else False
        if said.text.replace("=", "").strip() and said.text != "in":
            return self.by_algebra(said, true) if true.text == "in" else False
        sides = _sides_of_name(said, true.parts[0])
        if sides is not None:
            return _all(self.values(side, true.parts[1], worked_out) for side in sides)
        if true.text == said.text == "=" and (true.parts[0].kind not in _NAMES or _has_name(true.parts[1])):
            return self.by_algebra(said, true)
        return False

    def values(self, said: Node, true: Node, worked_out: bool = False) -> bool | None:
        """Compares two values of any kind."""
        if said == true:
            return True
        (said, said_unit), (true, true_unit) = _amount(said), _amount(true)
        if said_unit and true_unit and said_unit != true_unit:
            return False
        said, true = _as_matrix(said), _as_matrix(true)
        exact, said_exact = value(true), value(said)
        if exact is not None and (worked_out or said_exact is not None):
            return said_exact == exact
        kinds = {said.kind, true.kind}
        if kinds == {"bracket"}:
            return self._brackets(said, true)
        if kinds == {"matrix"}:
            return self._matrices(said, true)
        if kinds <= {"set", "list"}:
            return self.lists(said.parts, true.parts)
        if kinds == {"ratio"} or (kinds == {"ratio", "div"} and value(said) != value(true)):
            return self._ratios(said, true)
        if kinds & _OWN_KINDS:
            return False if kinds <= _OWN_KINDS else self._of_other_kinds(said, true)
        if (said_exact is not None and _is_infinite(true)) or (exact is not None and _is_infinite(said)):
            return False
        return self.by_algebra(said, true)

    def _of_other_kinds(self, said: Node, true: Node) -> bool | None:
        """Compares a structure and another kind: a product may be a matrix, a relation or a union an interval."""
        kinds = {said.kind, true.kind}
        if "matrix" in kinds:
            return self.by_algebra(said, true) if any(map(_has_matrix, (said, true))) else False
        if kinds & {"bracket", "set"} and kinds & {"union", "intersection", "setminus", "relation", "constant"}:
            return self.by_algebra(said, true)
        if "ratio" in kinds:
            return self._ratios(said, true)
        return False

    def _brackets(self, said: Node, true: Node) -> bool | None:
        signs = {said.text, true.text}
        if len(signs) > 1 and not (signs == {"()", "[]"} and len(true.parts) > 2):  # no interval has three ends
            return False
        return self._in_order(said.parts, true.parts)

    def _matrices(self, said: Node, true: Node) -> bool | None:
        if len(said.parts) != len(true.parts):
            return False
        return _all(self._in_order(row.parts, other.parts) for row, other in zip(said.parts, true.parts))

    def _in_order(self, said: Sequence[Node], true: Sequence[Node]) -> bool | None:
        if len(said) != len(true):
            return False
        return _all(self.values(one, other) for one, other in zip(said, true))

    def _ratios(self, said: Node, true: Node) -> bool | None:
        """Compares ratios: 3:4 is 6:8 and 3/4; but 12:30 may be a time of day, which is no ratio."""
        if _is_time(said) or _is_time(true):
            return self._in_order(said.parts, true.parts) if said.kind == true.kind else False
        said_parts, true_parts = (node.parts if node.kind == "ratio" else _quotient(node) for node in (said, true))
        if len(said_parts) != len(true_parts) or not true_parts:
            return False
        numbers = [[value(part) for part in parts] for parts in (said_parts, true_parts)]
        if any(number is None for row in numbers for number in row):
            return self._in_order(said_parts, true_parts)
        first, second = ([number for number in row if number is not None] for row in numbers)
        return all(a * second[0] == b * first[0] for a, b in zip(first, second)) and any(first) == any(second)


_OWN_KINDS = frozenset(["bracket", "matrix", "set", "list", "word", "base", "ratio"])


def _all(verdicts: Iterator[bool | None]) -> bool | None:
    found: bool | None = True
    for verdict in verdicts:
        if verdict is False:
            return False
        found = found and verdict
    return found


def _items(node: Node) -> list[Node]:
    """Returns the items of a list or a set; of any other answer the answer itself. Where there is a plus-minus sign,
    both values.
    """
    items = node.parts if node.kind in ("list", "set") else (node,)
    found: list[Node] = []
    for item in items:
        found += [_signed(item, "pm"), _signed(item, "mp")] if _contains(item, "pm", "mp") else [item]
    return found


def _is_list_of_inequalities(node: Node) -> bool:
    return node.kind == "list" and node.text != "" and not any(_is_value(item) for item in node.parts)


def _is_value(node: Node) -> bool:
    return node.kind != "relation" or _is_equation(node)


def _signed(node: Node, plus: str) -> Node:
    """Returns the tree with the upper sign in the place of every plus-minus sign (plus is "pm"), or the lower."""
    parts = tuple(_signed(part, plus) for part in node.parts)
    if node.kind not in ("pm", "mp"):
        return Node(node.kind, parts, node.text)
    last = parts[-1] if node.kind == plus else Node("neg", parts[-1:])
    return last if len(parts) == 1 else Node("add", (parts[0], last))


def _contains(node: Node, *kinds: str) -> bool:
    return node.kind in kinds or any(_contains(part, *kinds) for part in node.parts)


def _has_name(node: Node) -> bool:
    return _contains(node, "name")


def _has_matrix(node: Node) -> bool:
    """Returns whether a tree that is not a matrix itself can have a matrix as its value."""
    return node.kind not in ("matrix", "bracket", "list", "set") and _contains(node, "matrix")


def _is_infinite(node: Node) -> bool:
    return node == Node("constant", (), "oo") or (node.kind == "neg" and _is_infinite(node.parts[0]))


def _amount(node: Node) -> tuple[Node, str]:
    """Returns the amount, and the unit, or "". The dollar of ``-\\$5`` stands inside."""
    if node.kind == "unit":
        return node.parts[0], node.text
    if node.kind in ("percent", "degree"):
        return node.parts[0], node.kind
    if node.kind == "neg" and node.parts[0].kind in ("unit", "percent", "degree"):
        inside, unit = _amount(node.parts[0])
        return Node("neg", (inside,)), unit
    return node, ""


def _as_matrix(node: Node) -> Node:
    """Returns brackets in brackets, all of one length, as a matrix; ``[x]`` as x."""
    if node.kind == "bracket" and node.text == "[]":
        rows = [Node("row", part.parts) for part in node.parts if part.kind == "bracket" and part.text == "[]"]
        if len(rows) == len(node.parts):
            return Node("matrix", tuple(rows)) if len({len(row.parts) for row in rows}) == 1 else node
        if len(node.parts) == 1:
            return node.parts[0]
    return node


def _quotient(node: Node) -> tuple[Node, ...]:
    return node.parts if node.kind == "div" else ()


def _is_time(node: Node) -> bool:
    if node.kind != "ratio" or len(node.parts) != 2:
        return False
    hour, minute = (_amount(part)[0].text for part in node.parts)
    return len(minute) == 2 and minute.isdigit() and hour.isdigit() and int(minute) < 60 and int(hour) <= 24


def _without_estimate(node: Node) -> Node:
    """Returns ``x = \\pi`` for ``x = \\pi \\approx 3.14``, and ``x = 3.14`` for ``x \\approx 3.14``."""
    if node.kind != "relation" or "~" not in node.text:
        return node
    signs = node.text.split()
    if signs[0] == "~" and len(signs) == 1 and node.parts[0].kind in _NAMES:
        return Node("relation", node.parts, "=")
    kept = signs.index("~")
    return Node("relation", node.parts[: kept + 1], " ".join(signs[:kept])) if kept else node.parts[0]


def _right_side(node: Node) -> Node:
    """Returns the right side of an equation that states the value of a name; else the node itself."""
    node = _without_estimate(node)
    return node.parts[1] if node.kind == "relation" and node.text == "=" and node.parts[0].kind in _NAMES else node


def _is_equation(node: Node) -> bool:
    return node.kind == "relation" and set(node.text.split()) == {"="}


def _sides_of_value(said: Node, true: Node) -> tuple[Node, ...] | None:
    """Returns the sides of an answer's equation, or of ``x \\in``, that must equal a value; None where it is none of
    these.

    ``x = 5`` and ``x + y = 5`` state 5, and ``4 = 5`` does not. Of a formula, ``y =`` can be left out.
    """
    if said.text == "in" and said.parts[0].kind in _NAMES:
        return said.parts[1:]
    if not _is_equation(said):
        return None
    first, *others = said.parts
    if first.kind in _NAMES or (_has_name(first) and not _has_name(true)):
        return tuple(others)
    if said.parts[-1].kind in _NAMES and len(said.parts) == 2 and not _has_name(true):
        return said.parts[:1]  # 5 = x
    return said.parts


def _is_named(node: Node) -> bool:
    """Returns whether a tree is a name, or a tuple of names such as (x, y), whose value an answer can state."""
    return node.kind in _NAMES or (node.kind == "bracket" and all(part.kind in _NAMES for part in node.parts))


def _names_differ(items: Sequence[Node]) -> bool:
    """Returns whether each item states the value of another name: a = 1, b = 2, but not x_1 = 1, x_2 = 2."""
    if not all(_is_equation(item) and item.parts[0].kind == "name" for item in items):
        return False
    return len({item.parts[0].text.partition("_")[0] for item in items}) == len(items)


def _sides_of_name(said: Node, name: Node) -> tuple[Node, ...] | None:
    """Returns the sides of an answer's equation that must equal the value that the right answer gives to a name."""
    if said.parts[0] == name or _values_name(said.parts[0]) == _values_name(name) == "y":
        return said.parts[1:]
    if said.parts[-1] == name and len(said.parts) == 2 and said.text == "=":
        return said.parts[:1]
    return None


def _values_name(node: Node) -> str:
    """Returns y for y and f(x)."""
    return "y" if node.text in _OF_VALUES and (node.kind == "call" or node.text == "y") else node.text
