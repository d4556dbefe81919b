"""What holds for every built-in reward: its name, its weight, and that no text at all makes it fail."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridflow.config.kinds.eval import EvalConfig
from hybridflow.config.load import validate
from hybridflow.config.sections.rewards import REWARDS as NAMES
from hybridflow.errors import UserError
from hybridflow.rewards.verifiable.registry import CHECKS, REWARDS, builtin

# For each reward but `code`: a ground truth, a right response, what is given besides, and a wrong response.
CALL = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
CASES: dict[str, tuple[Any, str, dict[str, Any], str]] = {
    "gsm8k": ("18", "#### 18", {}, "#### 19"),
    "gsm8k_flexible": ("18", "it is 18", {}, "it is 19"),
    "math": (r"x+\frac12", r"\boxed{\frac{1}{2} + x}", {}, r"\boxed{x}"),
    "math_dapo": ("18", "Answer: 18", {}, "Answer: 19"),
    "multiple_choice": ("C", "Answer: C", {}, "Answer: D"),
    "countdown": ({"target": 3, "numbers": [1, 2]}, "<answer>1 + 2</answer>", {}, "<answer>1 - 2</answer>"),
    "qa_em": (["Paris"], "<answer>Paris</answer>", {}, "<answer>Rome</answer>"),
    "qa_f1": (["Paris"], "<answer>Paris</answer>", {}, "<answer>Rome</answer>"),
    "geo3k": ("4", r"<think>a</think>\boxed{4}", {}, r"\boxed{5}"),
    "json": ([1], "[1]", {}, "[2]"),
    "regex": (r"\d+", "18", {}, "x"),
    "format": (None, "<think>a</think><answer>b</answer>", {}, "b"),
    "tool_format": ([{"name": "add", "arguments": {"a": 1}}], CALL, {"partial": True}, CALL.replace("add", "sub")),
}
PIECES = st.sampled_from(
    [*(right for _, right, _, _ in CASES.values()), "<answer>", "</answer>", r"\boxed{", "}", "Answer:", "####", "\n"]
    + [
        "```json\n",
        "```\n",
        "<tool_call>",
        r"\frac",
        r"\text{",
        "(C)",
        "-",
        "=",
        ",",
        "1",
        "18",
        "x",
        " ",
        "\0",
        "\ud800",
    ]
)
TEXTS = st.text() | st.lists(PIECES | st.text(max_size=4), max_size=12).map("".join)


def graded(name: str, response: str) -> dict[str, float]:
    truth, _, kwargs, _ = CASES[name]
    found = builtin(name)(response, **({} if truth is None else {"ground_truth": truth}), **kwargs)
    return dict(found) if isinstance(found, Mapping) else {"score": found}


def test_the_configuration_knows_the_names() -> None:
    assert tuple(REWARDS) == NAMES == (*CASES, "code", "environment")
    assert set(CHECKS) < set(REWARDS)
    values = {"run": {"folder": "x"}, "model": {"path": "m"}, "data": {"eval": "t.jsonl"}}
    for name in NAMES:
        assert validate(EvalConfig, values | {"reward": {"function": name}}).reward.function == name
    with pytest.raises(UserError, match=r"'gsm8' is neither file.py:function, .* did you mean 'gsm8k'"):
        validate(EvalConfig, values | {"reward": {"function": "gsm8"}})


@pytest.mark.parametrize("name", CASES)
def test_right_is_right_and_wrong_is_wrong(name: str) -> None:
    _, right, _, wrong = CASES[name]
    assert graded(name, right)["score"] == 1
    assert graded(name, wrong)["score"] <= 0


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=40)
@given(response=TEXTS)
def test_every_text_has_a_score(name: str, response: str) -> None:
    found = graded(name, response)
    assert found.keys() == graded(name, CASES[name][1]).keys()
    assert all(math.isfinite(value) for value in found.values())
    assert -1 <= found["score"] <= 1


@pytest.mark.parametrize("name", CASES)
def test_a_right_answer_and_then_a_wrong_one_is_not_right_and_neither_is_nothing(name: str) -> None:
    _, right, _, wrong = CASES[name]
    for response in (f"{right}\n{wrong}", "", " \n\t" * 100):
        assert graded(name, response)["score"] < 1


@pytest.mark.parametrize("name", CASES)
def test_a_million_characters_around_an_answer_take_no_time(name: str) -> None:
    right = CASES[name][1]
    for text in (right * (10**6 // len(right)), "x" * 10**6 + right, right + "x" * 10**6, " " * 10**6 + right):
        start = time.process_time()
        graded(name, text)
        assert time.process_time() - start < 0.25


@pytest.mark.parametrize("name", CASES)
def test_threads_see_the_same_scores(name: str) -> None:
    _, right, _, wrong = CASES[name]
    found: list[tuple[float, float]] = []
    threads = [
        threading.Thread(target=lambda: found.append((graded(name, right)["score"], graded(name, wrong)["score"])))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [(1.0, graded(name, wrong)["score"])] * 4


def test_rewards_are_light_to_import() -> None:
    program = (
        "import json, sys; from hybridflow.rewards.verifiable.registry import builtin; "
        "[builtin(name) for name in sys.argv[1:]]; from hybridflow.rewards.graders import routing; "
        "print(json.dumps(sorted({m.partition('.')[0] for m in sys.modules})))"
    )
    out = subprocess.run([sys.executable, "-c", program, *CASES], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "transformers", "numpy", "sympy", "math_verify", "jsonschema"} & set(json.loads(out))
