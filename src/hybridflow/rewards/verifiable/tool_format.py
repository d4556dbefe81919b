"""The reward of tool calls in the form of Hermes: ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``.

Every block must be a JSON object with a name and arguments, no key twice, and no tag may be unpaired; otherwise the
response scores 0. Calls are compared with the expected ones, in any order, each with one at most. A call with the right
name earns (1 + arguments of equal value) / (1 + names of arguments in either), and the score is the sum of these over
the number of calls expected or made, whichever is greater: exactly the expected calls score 1, and further ones lower
the score.

After ToolRL (arXiv 2504.13958), whose reward (verl's rlla) divides by the expected calls only, so that many guesses
lose little, reads one block, and runs from -3 to 4 with the form in it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from hybridflow.rewards.verifiable.json_answer import read, same

MOST_CALLS = 64
_BLOCK = re.compile(r"<tool_call>|</tool_call>")


def score(response: str, ground_truth: Any, partial: bool = True) -> dict[str, float]:
    r"""Returns ``score`` between 0 and 1, ``exact`` 1.0 where that is 1, and ``format`` 1.0 for well-formed calls.

    >>> call = '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>'
    >>> score(call, [{"name": "add", "arguments": {"b": 2, "a": 1}}])
    {'score': 1.0, 'exact': 1.0, 'format': 1.0}
    >>> score(call, {"name": "add", "arguments": {"a": 1, "b": 3}})["score"], score(call + call, call)["score"]
    (0.6666666666666666, 0.5)
    >>> score(call, [])["score"], score("It is 3.", [])["score"], score('<tool_call>{"name": "add"}', call)
    (0.0, 1.0, {'score': 0.0, 'exact': 0.0, 'format': 0.0})

    Args:
        response: what the policy generated.
        ground_truth: the expected calls, a list (an empty one: no call is right), as JSON text, or as blocks.
        partial: whether a part of the calls, or of their arguments, earns a part of the score.

    Raises:
        ValueError: the ground truth is none of these.
    """
    expected = _expected(ground_truth)
    made = _calls(response)
    if made is None:
        return {"score": 0.0, "exact": 0.0, "format": 0.0}
    accuracy = _accuracy(made, expected)
    exact = float(accuracy == 1)
    return {"score": accuracy if partial else exact, "exact": exact, "format": 1.0}


def _calls(text: str) -> list[dict[str, Any]] | None:
    """Returns the calls in a text; None where they are not well formed."""
    calls: list[dict[str, Any]] = []
    start = None
    for mark in _BLOCK.finditer(text):
        if (mark[0] == "<tool_call>") != (start is None) or len(calls) == MOST_CALLS:
            return None
        if start is None:
            start = mark.end()
            continue
        call = _call(text[start : mark.start()])
        if call is None:
            return None
        calls.append(call)
        start = None
    return calls if start is None else None


def _call(text: str) -> dict[str, Any] | None:
    try:
        call = read(text)
    except (ValueError, RecursionError):
        return None
    return call if _is_call(call) else None


def _is_call(call: Any) -> bool:
    return isinstance(call, dict) and isinstance(call.get("name"), str) and isinstance(call.get("arguments"), dict)


def _expected(ground_truth: Any) -> list[dict[str, Any]]:
    found = ground_truth
    if isinstance(found, str):
        try:
            found = _calls(found) if "<tool_call>" in found else json.loads(found)
        except ValueError:
            found = None
    calls = [found] if isinstance(found, Mapping) else found
    if not isinstance(calls, list) or not all(_is_call(call) for call in calls):
        raise ValueError(f"the ground truth of tool_format is a list of calls (name, arguments), not {ground_truth!r}")
    return calls


def _accuracy(made: list[dict[str, Any]], expected: list[dict[str, Any]]) -> float:
    """Computes the accuracy with the best pairs first, so that the order of equal names does not matter."""
    pairs = sorted(
        ((_likeness(m, e), -i, -j) for i, m in enumerate(made) for j, e in enumerate(expected)), reverse=True
    )
    taken_made: set[int] = set()
    taken_expected: set[int] = set()
    total = 0.0
    for likeness, i, j in pairs:
        if likeness > 0 and i not in taken_made and j not in taken_expected:
            taken_made.add(i)
            taken_expected.add(j)
            total += likeness
    return total / max(len(made), len(expected)) if made or expected else 1.0


def _likeness(made: dict[str, Any], expected: dict[str, Any]) -> float:
    if made["name"] != expected["name"]:
        return 0.0
    given, wanted = made["arguments"], expected["arguments"]
    equal = sum(name in given and same(given[name], value) for name, value in wanted.items())
    return (1 + equal) / (1 + len(given.keys() | wanted.keys()))
