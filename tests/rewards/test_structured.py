"""Rewards of form: JSON, a regular expression, tags."""

from __future__ import annotations

import importlib.util
import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridflow.errors import UserError
from hybridflow.rewards.verifiable import json_answer, regex, tags
from hybridflow.rewards.verifiable.registry import CHECKS

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)
SCHEMA = {"type": "object", "properties": {"age": {"type": "integer", "minimum": 0}}, "required": ["age"]}
RIGHT, OTHER, INVALID = {"score": 1.0, "valid": 1.0}, {"score": 0.0, "valid": 1.0}, {"score": 0.0, "valid": 0.0}


@given(JSON)
def test_every_value_equals_itself_however_it_is_laid_out(value: Any) -> None:
    for text in (json.dumps(value), json.dumps(value, indent=2), f"Here:\n```json\n{json.dumps(value)}\n```\nDone."):
        assert json_answer.score(text, json.dumps(value)) == RIGHT
        assert json_answer.score(text, [value]) == OTHER


@pytest.mark.parametrize(
    ("response", "truth", "expected"),
    [
        ('{"a": 1, "b": 2}', '{"b": 2, "a": 1}', RIGHT),
        ("[1.0]", [1], RIGHT),
        ("[1, 2]", [2, 1], OTHER),
        ("true", "1", OTHER),
        ('"1"', "1", OTHER),
        ('{"a": 1}', '{"a": 1, "b": 2}', OTHER),
        ("```\n[1]\n```\nno:\n```\n[2]\n```", [1], OTHER),
        ("the answer is [1]", [1], INVALID),
        ("[1] [1]", [1], INVALID),
        ('{"a": 1, "a": 2}', '{"a": 2}', INVALID),
        ("NaN", "1", INVALID),
        ("[1,]", [1], INVALID),
        ("{'a': 1}", {"a": 1}, INVALID),
        ("", [1], INVALID),
        (" \n", [1], INVALID),
        ("[" * 10**6, [1], INVALID),
        ("[" * 10**5 + "]" * 10**5, [1], INVALID),
        ("1" * 10**6, [1], INVALID),
    ],
)
def test_json_is_valid_and_equal(response: str, truth: Any, expected: dict[str, float]) -> None:
    assert json_answer.score(response, truth) == expected


def test_json_of_a_form() -> None:
    def graded(response: str, **kwargs: Any) -> tuple[float, float]:
        found = json_answer.score(response, **kwargs)
        return found["score"], found["valid"]

    assert graded('{"age": 3}', schema=SCHEMA, compare=False) == (1, 1)
    assert graded('{"age": -3}', schema=SCHEMA, compare=False) == (0, 0)
    assert graded('{"age": 3}', schema=SCHEMA, ground_truth={"age": 4}) == (0, 1)
    assert graded('{"age": -3}', schema=SCHEMA, ground_truth={"age": -3}) == (0, 0)
    assert graded('{"a": 1, "b": 2}', required_keys=["a", "b"], compare=False) == (1, 1)
    assert graded('["a", "b"]', required_keys=["a", "b"], compare=False) == (0, 0)


def test_json_needs_something_to_compare_with() -> None:
    with pytest.raises(ValueError, match=r"the reward json \(with compare\) needs a ground_truth"):
        json_answer.score("[1]")
    with pytest.raises(ValueError, match=r"the ground truth '\[1' is not JSON"):
        json_answer.score("x", "[1")


def test_a_schema_is_checked_before_anything_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    CHECKS["json"]({"schema": SCHEMA})
    with pytest.raises(UserError, match="the schema of the reward json is not a JSON schema: 'strange' is not valid"):
        CHECKS["json"]({"schema": {"type": "strange"}})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    CHECKS["json"]({})
    with pytest.raises(UserError, match=r"jsonschema is not installed[\s\S]*pip install 'hybridflow\[json\]'"):
        CHECKS["json"]({"schema": SCHEMA})


def test_a_pattern_must_match_all_of_the_response() -> None:
    date = r"\d{4}-\d\d-\d\d"
    assert [regex.score(r, date)["score"] for r in ["2024-05-01", " 2024-05-01\n", "on 2024-05-01", ""]] == [1, 1, 0, 0]
    assert regex.score("b", "a", pattern="b") == {"score": 1.0, "undecided": 0.0}
    with pytest.raises(ValueError, match="needs a ground_truth"):
        regex.score("b")
    with pytest.raises(RuntimeError, match="unterminated subpattern"):
        regex.score("b", "(b")
    CHECKS["regex"]({})
    with pytest.raises(UserError, match=r"the pattern '\(b' of the reward regex is no regular expression"):
        CHECKS["regex"]({"pattern": "(b"})


def test_a_pattern_that_never_ends_is_undecided() -> None:
    start = time.monotonic()
    assert regex.score("a" * 60, "(a+)+b", seconds=0.2) == {"score": 0.0, "undecided": 1.0}
    assert time.monotonic() - start < 30
    assert regex.score("aab", "(a+)+b") == {"score": 1.0, "undecided": 0.0}
    assert regex.score("a" * 10**6, "a*") == {"score": 1.0, "undecided": 0.0}


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("<think>2+2</think><answer>4</answer>", True),
        ("\n<think>2+2</think>\n\n<answer>4</answer>\n", True),
        ("<think>a < b</think> <answer>4</answer>", True),
        ("<answer>4</answer> <think>2+2</think>", False),
        ("<think>2+2</think>", False),
        ("<think>2+2</think> so <answer>4</answer>", False),
        ("<think>2+2</think> <answer>4</answer>.", False),
        ("<think>2+2</think> <answer> </answer>", False),
        ("<think></think> <answer>4</answer>", False),
        ("<think>2+2</think> <answer>4</answer> <answer>5</answer>", False),
        ("<think><answer>4</answer></think>", False),
        ("<think>2+2<answer></think>4</answer>", False),
        ("<think>2+2</think> <answer>4", False),
        ("</think><think>2+2 <answer>4</answer>", False),
        ("", False),
        ("<think>" * 10**5, False),
    ],
)
def test_tags_stand_once_in_order_and_alone(response: str, right: bool) -> None:
    assert tags.score(response) == right
    assert tags.score(response.removeprefix("<think>"), opened="<think>") == (right and response.startswith("<think>"))


def test_tags_have_any_names() -> None:
    assert tags.score("<plan>a</plan><code>b</code><test>c</test>", tags=["plan", "code", "test"]) == 1
    assert tags.score("<plan>a</plan><test>c</test>", tags=["plan", "code", "test"]) == 0
