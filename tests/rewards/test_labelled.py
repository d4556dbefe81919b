"""Responses to questions of every kind, with whether they are right: no reward but `code` takes one for the other."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridflow.rewards.verifiable.qa import exact_match
from hybridflow.rewards.verifiable.registry import REWARDS, builtin

ROWS = [json.loads(line) for line in Path(__file__).with_name("answers.jsonl").read_text().splitlines()]
NAMES = sorted({row["reward"] for row in ROWS})


def score(row: Mapping[str, Any], response: str) -> float:
    truth = {} if row["truth"] is None else {"ground_truth": row["truth"]}
    found = builtin(row["reward"])(response, **truth, **row.get("kwargs", {}))
    return float(found["score"] if isinstance(found, Mapping) else found)


def test_every_reward_has_labelled_responses() -> None:
    assert sorted(set(REWARDS) - {"code", "environment"}) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_labelled_response_is_scored_as_it_is_labelled(name: str) -> None:
    rows = [row for row in ROWS if row["reward"] == name]
    assert [(row["truth"], said) for row in rows for said in row["right"] if score(row, said) < 1] == []
    assert [(row["truth"], said) for row in rows for said in row["wrong"] if score(row, said) >= 1] == []


MARKERS = {
    "gsm8k": ("#### @", "#### "),
    "math": (r"\boxed{@}", r"\boxed{"),
    "geo3k": (r"<think>x</think>\boxed{@}", r"\boxed{"),
    "math_dapo": ("Answer: @", "Answer:"),
    "multiple_choice": ("Answer: @", "Answer:"),
    "qa_em": ("<answer>@</answer>", "<answer>"),
    "qa_f1": ("<answer>@</answer>", "<answer>"),
    "countdown": ("<answer>@</answer>", "<answer>"),
}


@pytest.mark.parametrize("name", MARKERS)
@given(after=st.sampled_from(["", " ", "\n", "?", " unknown", "}{", " no idea.", "\n\nDone."]))
def test_the_last_marker_decides_or_there_is_no_answer(name: str, after: str) -> None:
    truth: Any = {"multiple_choice": "C", "countdown": {"target": 3, "numbers": [1, 2]}}.get(name, "18")
    answer = {"multiple_choice": "C", "countdown": "1 + 2"}.get(name, "18")
    form, marker = MARKERS[name]
    row = {"reward": name, "truth": truth}
    right = form.replace("@", answer)
    assert score(row, right) == 1
    assert score(row, f"{right}\n{marker}{after}") < 1


@given(st.integers(0, 10**7), st.data())
def test_punctuation_in_a_number_is_a_part_of_it(value: int, data: st.DataObject) -> None:
    digits = str(value)
    assert exact_match(f"{value:,}", digits, whole=True) == exact_match(f"{value:,}.0", value, whole=True) == 1
    assert exact_match(f"-{value}", digits, whole=True) == 0
    if value > 9:
        cut = data.draw(st.integers(1, len(digits) - 1))
        for mark in ".:/-_^":
            said = f"{digits[:cut]}{mark}{digits[cut:]}"
            assert exact_match(said, digits, whole=True) == exact_match(digits, said, whole=True) == 0
            assert exact_match(f"It was {said}.", [f"it was {said}"], whole=True) == 1
