r"""The nodes of an expression's tree, and how they are joined.

Kinds of nodes, with their parts:

    number, name, constant, word    none; the text says which
    base, mixed, unit               text: digits and base; whole number and quotient; an amount, text: the unit
    neg, add, mul, div, pow, pm, mp, factorial, degree, percent, abs, call, ratio      terms and factors
    bracket, set, list, matrix, row, det, union, intersection, setminus, relation      structures
"""

from __future__ import annotations

from typing import NamedTuple

from hybridflow.rewards.verifiable.units import MULTIPLES

MEASURES = ("percent", "degree")


class Unreadable(Exception):
    """The text cannot be read as one expression without doubt; the message gives the reason."""


class Node(NamedTuple):
    """A part of an expression: its kind, its parts, and what else its kind needs."""

    kind: str
    parts: tuple[Node, ...] = ()
    text: str = ""


def joined(kind: str, node: Node, factor: Node, text: str = "") -> Node:
    """Makes a product or a quotient. A per cent sign or a degree after its last factor applies to all of it."""
    if factor.kind in MEASURES:
        return Node(factor.kind, (Node(kind, (node, *factor.parts), text),))
    return Node(kind, (node, factor), text)


def added(node: Node | None, sign: str, term: Node) -> Node:
    """Makes a sum with one more term, or its first term with its sign."""
    if sign in ("\\pm", "\\mp"):
        return Node("pm" if sign == "\\pm" else "mp", (term,) if node is None else (node, term))
    if sign == "-":
        term = Node("unit", (Node("neg", term.parts),), term.text) if term.kind == "unit" else Node("neg", (term,))
    return term if node is None else Node("add", (node, term))


def measured(node: Node, unit: str) -> Node:
    """Makes an amount with its unit; ``5 million dollars`` is 5 times a million first."""
    words = unit.split()
    while words and words[0] in MULTIPLES:
        node = Node("mul", (node, Node("number", (), "1" + "0" * MULTIPLES[words.pop(0)])), "million")
    return Node("unit", (node,), " ".join(words)) if words else node


def without_unit(node: Node) -> Node:
    """Returns the amount alone."""
    return node.parts[0] if node.kind == "unit" else node
