"""Known right and wrong responses for the built-in rewards whose answers are documents, tool calls or programs."""

from __future__ import annotations

import json
from typing import Any

from hybridflow.rewards.audit.audit import CaseSet
from hybridflow.rewards.audit.mutations import KnownCase
from hybridflow.rewards.audit.programs import PROGRAMS

_PERSON = {"name": "Ada", "born": 1815, "tags": ["maths", None], "alive": False}
_CITY = {"city": "Oslo", "population": 709037.0}


def _fenced(text: str, language: str = "json") -> str:
    return f"Here it is:\n\n```{language}\n{text}\n```\n"


def _json(question: str, truth: dict[str, Any], *wrong: str) -> KnownCase:
    text, first = json.dumps(truth), next(iter(truth))
    return KnownCase(
        question,
        truth,
        text,
        right_responses=(
            json.dumps(truth, indent=2),
            _fenced(text),
            _fenced(json.dumps(dict(reversed(truth.items())))),
            json.dumps(truth, separators=(",", ":")),
            f"{_fenced('{}')}\n{_fenced(text)}",
        ),
        wrong_responses=(
            json.dumps(truth | {first: "Bob"}),
            json.dumps(truth | {"more": 1}),
            text[:-1],
            text[:-1] + ",}",
            text + text,
            f"It is {text}",
            str(truth),
            json.dumps([truth]),
            json.dumps(text),
            f"// right\n{text}",
            json.dumps({k: v for k, v in truth.items() if k != first}),
            text[:-1] + f', "{first}": "Bob"}}',
            f"{_fenced(text)}\n{_fenced('{}')}",
            f"```json\n{text}",
            "NaN",
            "null",
            "true",
            "Infinity",
            *wrong,
        ),
    )


_JSON = CaseSet(
    (
        _json(
            "Describe Ada in JSON.", _PERSON, json.dumps(_PERSON | {"born": "1815"}), json.dumps(_PERSON | {"alive": 0})
        ),
        _json("Describe Oslo in JSON.", _CITY, json.dumps(_CITY | {"population": "709037"})),
    ),
    ("text",),
    by_design={"the ground truth as an object": ("any", "the JSON text of the ground truth is the right answer")},
)

_REGEX = CaseSet(
    (
        KnownCase(
            "Which day?",
            r"[0-9]{4}-[0-9]{2}-[0-9]{2}",
            "2024-05-01",
            wrong_responses=(
                "2024-5-1",
                "on 2024-05-01",
                "2024-05-01 or 2024-05-02",
                "2024-05-01\n2024-05-02",
                "2024\u221205\u221201",
            ),
        ),
        KnownCase(
            "Name a colour.",
            r"#[0-9a-f]{6}",
            "#00ff7f",
            wrong_responses=("#00FF7F", "00ff7f", "#00ff7f0", "#00ff7f #00ff7f"),
        ),
        KnownCase("Only the letter a.", r"(a+)+", "aaaa", wrong_responses=("b", "a" * 40 + "!", "aaaa b")),
    ),
    ("text",),
)

_FORM = CaseSet(
    (
        KnownCase(
            "What is 2 + 2?",
            "4",
            "<think>2 + 2 = 4</think>\n<answer>4</answer>",
            right_responses=(
                "<think>a\n\nb</think><answer>c</answer>",
                "\n<think>1 < 2 > 0</think>\n\n<answer>5</answer>\n",
            ),
            wrong_responses=(
                "<answer>4</answer>",
                "<think>4</think>",
                "<answer>4</answer><think>2 + 2</think>",
                "<think>2</think>4<answer>4</answer>",
                "<think>2</think><answer>4</answer> done",
                "so <think>2</think><answer>4</answer>",
                "<think>2</think><answer>4",
                "<think>2<answer>4</answer></think>",
                "<think>2</think><answer> \n</answer>",
                "<think>2</think><answer>4</answer><answer>5</answer>",
                "<think><think>2</think></think><answer>4</answer>",
                "<THINK>2</THINK><ANSWER>4</ANSWER>",
                "<think>2</think ><answer>4</answer >",
                "</think><think></answer><answer>",
                "<think>2</think><think>3</think><answer>4</answer>",
                "&lt;think&gt;2&lt;/think&gt;<answer>4</answer>",
            ),
        ),
    ),
    ("text",),
)

_ADD = {"name": "add", "arguments": {"a": 1, "b": 2}}


def _call(call: Any) -> str:
    return f"<tool_call>\n{json.dumps(call)}\n</tool_call>"


_TOOLS = CaseSet(
    (
        KnownCase(
            "Add 1 and 2.",
            [_ADD],
            f"I need a sum.\n{_call(_ADD)}",
            right_responses=(
                _call(_ADD),
                _call({"arguments": {"b": 2, "a": 1.0}, "name": "add"}),
                f"{_call(_ADD)} That is it.",
                f"<tool_call>{json.dumps(_ADD)}</tool_call>",
            ),
            wrong_responses=(
                _call(_ADD | {"name": "sub"}),
                _call({"name": "add"}),
                _call({"name": "add", "arguments": {}}),
                _call({"name": "add", "arguments": {"a": 1, "b": "2"}}),
                _call({"name": "add", "arguments": {"a": 1, "b": 2, "c": 3}}),
                _call({"name": "add", "arguments": json.dumps({"a": 1, "b": 2})}),
                _call(_ADD) * 2,
                _call([_ADD]),
                "It is 3.",
                f"{_call(_ADD)}{_call({'name': 'sub', 'arguments': {}})}",
                f"{_call(_ADD)}<tool_call>",
                f"{_call(_ADD)}</tool_call>",
                _call(_ADD).replace("</tool_call>", ""),
                json.dumps(_ADD),
                f"<tool_call>{_ADD}</tool_call>",
                f"<tool_call>{_call(_ADD)}</tool_call>",
                _call(_ADD).upper(),
                "".join(_call({"name": "add", "arguments": {"a": a, "b": b}}) for a in range(8) for b in range(8)),
            ),
        ),
        KnownCase(
            "Add 1 and 2, then add 3 and 4.",
            [_ADD, {"name": "add", "arguments": {"a": 3, "b": 4}}],
            f"{_call(_ADD)}\n{_call({'name': 'add', 'arguments': {'a': 3, 'b': 4}})}",
            right_responses=(f"{_call({'name': 'add', 'arguments': {'a': 3, 'b': 4}})}{_call(_ADD)}",),
            wrong_responses=(_call(_ADD), _call(_ADD) * 2, _call(_ADD) * 20),
        ),
    ),
    ("text",),
    partial=True,
)

DOCUMENTS: dict[str, CaseSet] = {
    "json": _JSON,
    "regex": _REGEX,
    "format": _FORM,
    "tool_format": _TOOLS,
    "code": PROGRAMS,
}
