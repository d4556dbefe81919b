"""Tools in prompts and in supervised rows, calls read from text, and what does not fit a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from hybridflow.chat.certificate import certificate
from hybridflow.chat.fit import require_fit
from hybridflow.chat.template import Style, apply_template, render_conversations, render_prompt
from hybridflow.chat.tool_calls import FORMATS, Hermes, WrittenCall, message_of, read_turn
from hybridflow.config.sections.data import SftDataSection
from hybridflow.data.sft import SftSet, load_sft
from hybridflow.errors import UserError
from talks import (
    CALCULATOR,
    PLAIN,
    STRICT,
    THOUGHT,
    WITHOUT_TOOLS,
    answer,
    byte_tokenizer,
    hermes,
    real_tokenizer,
    turn,
    user,
)

TALK = [user("1+2?"), turn("", "1+2"), answer("3"), turn("It is 3."), user("and 4?"), turn("7")]
SAID = [hermes("1+2") + "<|im_end|>", "It is 3.<|im_end|>", "7<|im_end|>"]


def stretches(tokenizer: PreTrainedTokenizerBase, ids: list[int], mask: list[bool]) -> list[str]:
    """The learned stretches as text."""
    found: list[list[int]] = []
    for i, (token, inside) in enumerate(zip(ids, mask)):
        if inside and (not i or not mask[i - 1]):
            found.append([])
        if inside:
            found[-1].append(token)
    return [tokenizer.decode(part) for part in found]


def sft(tokenizer: PreTrainedTokenizerBase, tmp_path: Path, *rows: dict[str, Any]) -> SftSet:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_sft(SftDataSection(train=str(file), max_tokens=4096), tokenizer, seed=0)


# --- in supervised rows ---


def test_the_loss_is_on_the_turns_of_the_assistant_and_on_its_calls(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(PLAIN)
    bare = CALCULATOR["function"]
    as_text = [
        {**m, "tool_calls": [{"function": {"name": "calculator", "arguments": '{"text": "1+2"}'}}]} if i == 1 else m
        for i, m in enumerate(TALK)
    ]
    filled = [{**m, "tool_calls": m.get("tool_calls"), "tool_call_id": m.get("tool_call_id")} for m in TALK]
    filled[1]["tool_calls"] = [
        {"id": None, "function": {"name": "calculator", "arguments": {"text": "1+2", "other": None}}}
    ]
    data = sft(
        tokenizer,
        tmp_path,
        {"messages": TALK, "tools": [CALCULATOR]},
        {"messages": as_text, "tools": json.dumps([CALCULATOR])},
        {"messages": filled, "tools": [bare | {"strict": None}]},
        {"messages": [m for i, m in enumerate(TALK) if i not in (1, 2)], "tools": None},
    )
    batch = data.batch([0, 1, 2, 3])
    rows = list(zip(batch.rows("input_ids_T"), batch.rows("loss_mask_T")))
    first = rows[0][0].tolist()
    assert stretches(tokenizer, first, rows[0][1].tolist()) == SAID
    assert tokenizer.decode(first).startswith("<|im_start|>system\n" + json.dumps(CALCULATOR))
    assert rows[1][0].tolist() == first and rows[2][0].tolist() == first
    assert (
        tokenizer.decode(rows[3][0].tolist()).startswith("<|im_start|>user")
        and data.lengths() == batch.lengths().tolist()
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": TALK, "tools": "calculator"}, "tools of row 0 .* has tools in a text that is no JSON"),
        ({"messages": TALK, "tools": ["{}"]}, "has a tool without a name"),
        ({"messages": TALK, "tools": [CALCULATOR, CALCULATOR]}, "has two tools of one name"),
        ({"messages": TALK, "tools": 3}, "is a number, not a list of tools"),
        (
            {"messages": [user("a"), {**turn("", "1"), "tool_calls": [{"function": {"arguments": {}}}]}]},
            "without a name",
        ),
        (
            {"messages": [user("a"), {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "1+2"}]}]},
            "has a call whose arguments are no object",
        ),
        ({"messages": [user("a"), turn("", "1<|im_end|>")]}, "holds '<|im_end|>', which the chat template writes"),
    ],
)
def test_rows_whose_tools_or_calls_cannot_be_read_are_refused(
    tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message.replace("|", r"\|")):
        sft(byte_tokenizer(PLAIN), tmp_path, row)


def test_tools_that_the_template_leaves_out_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has a list of tools that the chat template leaves out"):
        sft(byte_tokenizer(WITHOUT_TOOLS), tmp_path, {"messages": [user("a"), turn("b")], "tools": [CALCULATOR]})
    with pytest.raises(UserError, match="has tool calls that the chat template leaves out"):
        sft(byte_tokenizer(WITHOUT_TOOLS), tmp_path, {"messages": TALK})


@pytest.mark.slow
def test_a_conversation_with_tools_is_learned_on_the_template_of_qwen3() -> None:
    """Its template writes an empty thought into the last turn alone; turns before are learned as they stand."""
    tokenizer = real_tokenizer("qwen3")
    [(ids, mask)] = render_conversations(tokenizer, [TALK[:4]], Style(tools=(CALCULATOR,)))
    assert stretches(tokenizer, ids, mask) == [SAID[0], "<think>\n\n</think>\n\n" + SAID[1]]
    thinking = [user("1+2?"), turn(THOUGHT, "1+2"), answer("3"), turn(THOUGHT + "It is 3.")]
    [(ids, mask)] = render_conversations(tokenizer, [thinking], Style(tools=(CALCULATOR,)))
    assert stretches(tokenizer, ids, mask) == [THOUGHT + SAID[0], THOUGHT + SAID[1]]
    with pytest.raises(UserError, match="rewrites turns before message 1"):  # the thoughts would not be in the text
        render_conversations(tokenizer, [[*thinking, user("and 4?"), turn("7")]], Style(tools=(CALCULATOR,)))


def test_prompts_list_tools() -> None:
    text, ids = render_prompt(tokenizer := byte_tokenizer(PLAIN), "1+2?", Style(tools=(CALCULATOR,)))
    assert json.dumps(CALCULATOR) in text and tokenizer.decode(ids) == text


# --- calls in text ---


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("no call", "no call", []),
        (hermes("1+2"), "", [WrittenCall("calculator", {"text": "1+2"})]),
        (
            "so \n" + hermes("1", "\u00e9{}") + " and on",
            "so",
            [WrittenCall("calculator", {"text": t}) for t in ("1", "\u00e9{}")],
        ),
        ('<tool_call>{"name": "f", "arguments": {"a": {"b": [1, {}]}}}', "", [WrittenCall("f", {"a": {"b": [1, {}]}})]),
        ('<tool_call>{"name": "f"}</tool_call>', "", [WrittenCall("f", {})]),
        ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [WrittenCall("f", {"a": 1})]),
        (hermes("a </tool_call> b"), "", [WrittenCall("calculator", {"text": "a </tool_call> b"})]),
    ],
)
def test_calls_are_read_from_text(text: str, content: str, calls: list[WrittenCall]) -> None:
    assert Hermes().parse(text) == (content, calls)


@pytest.mark.parametrize(
    ("body", "name", "error"),
    [
        ('{"name": "f", "arguments": {"a": 1}', "", "no valid JSON"),
        ('{"name": "f", "arguments": [1]}', "f", "are an object"),
        ('{"name": "f", "arguments": "a=1"}', "f", "arguments are no valid JSON"),
        ('{"arguments": {}}', "", 'has no "name"'),
        ("[" * 100_000, "", "no valid JSON"),
        ("", "", "no valid JSON"),
        ('{"name": "f", "arguments": {"a": NaN}}', "", "NaN is no number of JSON"),
    ],
)
def test_a_call_that_cannot_be_read_says_why(body: str, name: str, error: str) -> None:
    """And the calls behind it are read."""
    _, [broken, good] = Hermes().parse(f"<tool_call>{body}</tool_call>" + hermes("1"))
    assert broken.name == name and error in broken.error
    assert good == WrittenCall("calculator", {"text": "1"})


def test_what_stands_in_a_thought_is_no_call() -> None:
    drafted = THOUGHT.replace("well", hermes("9"))
    call = [WrittenCall("calculator", {"text": "1"})]
    assert read_turn(drafted + hermes("1"), Hermes()) == (drafted, call)
    assert read_turn(drafted.removeprefix("<think>") + "so\n" + hermes("1"), Hermes()) == (
        drafted.removeprefix("<think>") + "so",
        call,
    )
    cut = "<think>\n" + hermes("9")
    assert read_turn(cut, Hermes()) == (cut, [])


def test_a_turn_becomes_a_message_that_the_template_writes_as_the_model_did() -> None:
    """Also a turn whose call cannot be read: it stays text."""
    tokenizer = byte_tokenizer(PLAIN)
    broken = 'so\n<tool_call>\n{"name": "calculator", "arguments": {\n</tool_call>'
    for text in ("It is 3.", hermes("1+2"), "so\n" + hermes("1", "2"), THOUGHT + hermes("1"), broken):
        message = message_of(text, Hermes(), ["abcdefghi", "abcdefghj"][: text.count("<tool_call>")])
        rendered = apply_template(tokenizer, [user("a"), message], Style())
        assert rendered.endswith(f"<|im_start|>assistant\n{text}<|im_end|>\n")


# --- what does not fit ---


def test_what_fits_passes() -> None:
    require_fit(byte_tokenizer(PLAIN), Style(tools=(CALCULATOR,)), "hermes")
    require_fit(byte_tokenizer(STRICT, "</s>"), Style(tools=(CALCULATOR,)), "hermes")
    require_fit(byte_tokenizer(WITHOUT_TOOLS), Style(), "hermes")  # an environment without tools


NEEDS_TYPES = PLAIN.replace("{{ t | tojson }}", "{{ t.function.parameters.properties.text.type + t.function.name }}")
OTHER_CALLS = PLAIN.replace("<tool_call>", "<call>").replace("</tool_call>", "</call>")
NO_RESULTS = PLAIN.replace("{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (WITHOUT_TOOLS, "the chat template does not list tools"),
        (PLAIN.replace("tool_calls", "calls"), "the chat template shows no calls of tools"),
        (OTHER_CALLS, r"agent.format=hermes does not fit the chat template\n  why: .*<call>"),
        (NO_RESULTS, "leaves out the results of calls"),
        (NEEDS_TYPES, "cannot render the tool odd: .*has no attribute 'text'"),
    ],
)
def test_what_does_not_fit_is_refused(template: str, message: str) -> None:
    odd = {"type": "function", "function": {"name": "odd", "parameters": {"type": "object", "properties": {}}}}
    tools = (CALCULATOR, odd) if template == NEEDS_TYPES else (CALCULATOR,)
    with pytest.raises(UserError, match=message):
        require_fit(byte_tokenizer(template), Style(tools=tools), "hermes")


def test_a_tokenizer_without_the_characters_of_a_call_is_refused() -> None:
    from hybridflow.config.locate import load_function

    from tiny import CARRY

    carry = load_function(f"{CARRY}:make_tokenizer")()
    carry.chat_template = PLAIN.replace("<|im_start|>", "").replace("<|im_end|>", "<|end|>")
    tool = {"type": "function", "function": {**CALCULATOR["function"], "name": "r\u00e4chner"}}
    with pytest.raises(UserError, match="does not fit the tokenizer"):
        require_fit(carry, Style(tools=(tool,)), "hermes")


def test_the_certificate_says_what_appends() -> None:
    tokenizer, style = byte_tokenizer(PLAIN), Style(tools=(CALCULATOR,))
    found = certificate(tokenizer, style, FORMATS["hermes"])
    assert {line.outcome for line in found} == {"appends"} and len(found) == 9


@pytest.mark.slow
def test_the_certificate_of_qwen3() -> None:
    found = certificate(real_tokenizer("qwen3"), Style(tools=(CALCULATOR,)), FORMATS["hermes"])
    forks = {line.kind: line.why for line in found if line.outcome != "appends"}
    dropped = "thoughts dropped"
    assert forks == {"a thought, then the user": dropped, "after thoughts and calls, the user": dropped}
    hidden = certificate(real_tokenizer("qwen3"), Style(tools=(CALCULATOR,), thinking=False), FORMATS["hermes"])
    assert {line.outcome for line in hidden} == {"forks"}
    kept = certificate(real_tokenizer("qwen3"), Style(tools=(CALCULATOR,)), FORMATS["hermes"], history="append")
    assert {line.outcome for line in kept} == {"appends"}
