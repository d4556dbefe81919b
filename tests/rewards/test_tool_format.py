"""Tool calls: their form, and what a part of the expected ones is worth."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridflow.rewards.verifiable.tool_format import score

CALLS = st.lists(
    st.fixed_dictionaries(
        {
            "name": st.sampled_from(["add", "find", "stop"]),
            "arguments": st.dictionaries(st.sampled_from("abc"), st.integers(0, 3) | st.text(max_size=3)),
        }
    ),
    max_size=4,
)


def block(call: Any) -> str:
    return f"<tool_call>\n{json.dumps(call)}\n</tool_call>"


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"name": name, "arguments": arguments}


@given(CALLS, st.randoms(use_true_random=False))
def test_the_expected_calls_in_any_order_are_all_right(calls: list[dict[str, Any]], rng: Any) -> None:
    said = rng.sample(calls, len(calls))
    response = "I look it up. " + "\n".join(map(block, said))
    for truth in (calls, json.dumps(calls), *(["\n".join(map(block, calls))] if calls else [])):
        assert score(response, truth) == {"score": 1.0, "exact": 1.0, "format": 1.0}


@given(CALLS, CALLS)
def test_nothing_but_the_expected_calls_is_all_right(said: list[dict[str, Any]], calls: list[dict[str, Any]]) -> None:
    graded = score("".join(map(block, said)), calls)
    equal = sorted(map(repr, map(sorted_call, said))) == sorted(map(repr, map(sorted_call, calls)))
    assert 0 <= graded["score"] <= 1 and graded["format"] == 1
    assert (graded["score"] == 1) == equal == bool(graded["exact"])
    assert score("".join(map(block, said)), calls, partial=False)["score"] == graded["exact"]


def sorted_call(call: dict[str, Any]) -> tuple[str, list[tuple[str, Any]]]:
    return call["name"], sorted(call["arguments"].items())


@pytest.mark.parametrize(
    ("said", "expected", "value"),
    [
        ([call("add", a=1, b=2)], [call("add", a=1, b=3)], 2 / 3),  # the name and one of two arguments
        ([call("add", a=1)], [call("add", a=1, b=3)], 2 / 3),
        ([call("add", a=1, b=3, c=0)], [call("add", a=1, b=3)], 3 / 4),  # an argument too many
        ([call("add", a=1)], [call("find", a=1)], 0),
        ([call("add", a=1), call("add", a=2)], [call("add", a=2)], 1 / 2),  # guesses share the reward
        ([call("add", a=i) for i in range(10)], [call("add", a=2)], 1 / 10),
        ([call("add", a=1)], [call("add", a=1), call("stop")], 1 / 2),
        ([call("add", a=1)] * 2, [call("add", a=1), call("stop")], 1 / 2),
        ([], [call("stop")], 0),
        ([call("stop")], [], 0),
        ([call("add", a=True)], [call("add", a=1)], 1 / 2),
    ],
)
def test_a_part_is_worth_a_part(said: list[Any], expected: list[Any], value: float) -> None:
    assert score("".join(map(block, said)), expected)["score"] == pytest.approx(value)


@pytest.mark.parametrize(
    "response",
    [
        "<tool_call>",
        "</tool_call>",
        "<tool_call>{}</tool_call>",
        '<tool_call>{"name": "add"}</tool_call>',
        '<tool_call>{"name": "add", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": 1, "arguments": {}}</tool_call>',
        "<tool_call>add(1)</tool_call>",
        block(call("add", a=1)) + "<tool_call>",
        "<tool_call>" + block(call("add", a=1)) + "</tool_call>",
        block(call("add", a=1)) * 65,
        "<tool_call>" + "[" * 10**6 + "</tool_call>",
        "<tool_call>" * 10**5,
    ],
)
def test_one_malformed_call_spoils_the_response(response: str) -> None:
    start = time.process_time()
    assert score(response, [call("add", a=1)]) == {"score": 0.0, "exact": 0.0, "format": 0.0}
    assert time.process_time() - start < 0.1


@pytest.mark.parametrize("truth", [None, "", "add(1)", 3, [{"name": "add"}], "<tool_call>{}</tool_call>", [1]])
def test_another_ground_truth_is_refused(truth: Any) -> None:
    with pytest.raises(ValueError, match="the ground truth of tool_format is a list of calls"):
        score("", truth)
