"""Every command reads rows of every system's form, and every command refuses the same rows before it begins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from hybridflow.chat.template import turn_markers
from hybridflow.config.sections.data import PromptDataSection, SftDataSection
from hybridflow.config.sections.preference import PreferenceDataSection
from hybridflow.data.preference import load_preferences
from hybridflow.data.prompts import load_prompts
from hybridflow.data.reader import RowError
from hybridflow.data.sft import load_sft
from hybridflow.errors import UserError

from preferences import tokenizer, yaml_of
from runs import configuration, mistake, succeed
from tiny import CARRY

Output = pytest.CaptureFixture[str]
ASKED = {"role": "user", "content": "1+1="}
ANSWERED = {"role": "assistant", "content": "2"}
WRONG = {"role": "assistant", "content": "3"}
CALL = {"function": {"name": "add", "arguments": "{}"}}


def written(folder: Path, *rows: Any) -> str:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "rows.jsonl")


def load(folder: Path, kind: str, *rows: Any, words: PreTrainedTokenizerBase | None = None, **keys: Any) -> Any:
    """The rows as training, supervised training or a reward model reads them."""
    words, source = words or tokenizer(), written(folder, *rows)
    if kind == "rl":
        return load_prompts(source, PromptDataSection(**keys), words, seed=0)
    if kind == "sft":
        return load_sft(SftDataSection(train=source, **keys), words, seed=0)
    return load_preferences(source, PreferenceDataSection(train=source, **keys), words, seed=0)


# --- forms of other systems ---

VERL = {"data_source": "sums", "prompt": [ASKED], "ability": "math", "extra_info": {"index": 0, "answer": "2"}}
VERL |= {"reward_model": {"style": "rule", "ground_truth": "2"}}
SHAREGPT = [{"from": "human", "value": "1+1="}, {"from": "gpt", "value": "2"}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "1+1="}]}, ANSWERED]
FORMS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("rl", VERL, {}),
    ("sft", VERL, {"prompt_key": "prompt", "response_key": "extra_info.answer"}),
    ("rl", {"prompt": "1+1=", "ground_truth": "2"}, {}),
    ("rl", {"prompt": [ASKED], "solution": "2"}, {"ground_truth_key": "solution"}),  # TRL
    ("rl", {"question": "1+1=", "answer": "2"}, {"prompt_key": "question", "ground_truth_key": "answer"}),  # GSM8K
    ("rl", {"input": "1+1=", "label": 2}, {"prompt_key": "input", "ground_truth_key": "label"}),  # OpenRLHF
    ("rl", {"context_messages": PARTS[:1], "answer": "2"},
     {"prompt_key": "context_messages", "ground_truth_key": "answer"}),
    ("rl", {"conversations": SHAREGPT[:1], "answer": "2"},
     {"prompt_key": "conversations", "ground_truth_key": "answer"}),
    ("sft", {"messages": [ASKED, ANSWERED]}, {}),
    ("sft", {"messages": [{**ASKED, "name": None}, {**ANSWERED, "weight": 1}]}, {}),  # OpenAI's fine-tuning
    ("sft", {"messages": PARTS}, {}),
    ("sft", {"conversations": SHAREGPT, "id": "x1"}, {}),
    ("sft", {"prompt": [ASKED], "completion": [ANSWERED]}, {"prompt_key": "prompt", "response_key": "completion"}),
    ("sft", {"prompt": "1+1= ", "completion": [ASKED, ANSWERED]},
     {"prompt_key": "prompt", "response_key": "completion"}),
    ("sft", {"prompt": "1+1=", "completion": json.dumps([ANSWERED])},
     {"prompt_key": "prompt", "response_key": "completion"}),
    ("pairs", {"prompt": "1+1=", "chosen": json.dumps([ASKED, ANSWERED]), "rejected": json.dumps([WRONG])}, {}),
    ("sft", {"instruction": "1+1=", "input": "", "output": "2"},
     {"prompt_key": "instruction", "response_key": "output"}),  # Alpaca
    ("sft", {"text": "1+1=2"}, {"format": "text"}),
    ("pairs", {"prompt": "1+1=", "chosen": "2", "rejected": "3"}, {}),
    ("pairs", {"prompt": [ASKED], "chosen": [ANSWERED], "rejected": [WRONG]}, {}),
    ("pairs", {"chosen": [ASKED, ANSWERED], "rejected": [ASKED, WRONG]}, {}),
    ("pairs", {"prompt": "1+1= ", "chosen": [ASKED, ANSWERED], "rejected": [ASKED, WRONG]}, {}),
    ("pairs", {"chosen": SHAREGPT, "rejected": [SHAREGPT[0], {"from": "gpt", "value": "3"}]}, {}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "row", "keys"), FORMS)
def test_one_sum_in_the_form_of_every_system(
    tmp_path: Path, kind: str, row: dict[str, Any], keys: dict[str, Any]
) -> None:
    found = load(tmp_path, kind, row, row, **keys)
    asked = "<|user|>1+1=<|end|><|assistant|>"
    if kind == "rl":
        assert (found[1].text, str(found[1].ground_truth)) == (asked, "2")
    elif kind == "sft":
        batch = found.batch([1])
        learned = "+1=2<|end|>" if "format" in keys else "2<|end|>"
        assert tokenizer().decode(batch["input_ids_T"][batch["loss_mask_T"]]) == learned
    else:
        chosen, rejected = found.tokens([1])
        said = [text.replace("1+1= ", "1+1=") for text in map(tokenizer().decode, (chosen, rejected))]
        assert said == [f"{asked}2<|end|>", f"{asked}3<|end|>"]


# --- the same mistake in every command ---


def test_every_command_refuses_a_row_that_no_template_can_show(tmp_path: Path, capsys: Output) -> None:
    asked = {"role": "user", "text": "1+1="}
    prompts = written(tmp_path, {"prompt": [asked], "ground_truth": "2"})
    for command, config in [("check", "train"), ("train", "train"), ("eval", "eval")]:
        said = mistake(capsys, command, configuration(tmp_path, config), f"data.eval={prompts}")
        assert (
            f"prompt of row 0 of {prompts} has a message that has no content (message 0: its keys: role, text)" in said
        )
        assert "fix: write messages as {role, content}" in said
    said = mistake(capsys, "audit-reward", f"{tmp_path}/reward.py:score", "--data", prompts)
    assert f"prompt of row 0 of {prompts} has a message that has no content" in said
    talks = tmp_path / "talks.json"
    talks.write_text(json.dumps([{"messages": [asked, ANSWERED]}]))
    said = mistake(capsys, "sft", configuration(tmp_path, "sft"), f"data.train={talks}")
    assert f"messages of row 0 of {talks} has a message that has no content" in said
    pairs = tmp_path / "pairs.json"
    pairs.write_text(json.dumps([{"prompt": [asked], "chosen": "2", "rejected": "3"}]))
    said = mistake(capsys, "reward-model", yaml_of(tmp_path), f"data.train={pairs}")
    assert f"prompt of row 0 of {pairs} has a message that has no content" in said


def test_generate_refuses_what_no_template_can_show(capsys: Output) -> None:
    model = f"{CARRY}:tiny_qwen3"
    for prompt, what in [
        ("", "is empty"),
        ("bad \ud83d", "holds half of a surrogate"),
        ("1<|end|>", "holds '<|end|>'"),
    ]:
        assert f"prompt 2 {what}" in mistake(capsys, "generate", model, "1+1=", prompt).replace("message ", "")
    assert succeed(capsys, "generate", model, json.dumps(SHAREGPT[:1]), "--max-tokens", "2")


# --- what a template leaves out, and what it writes itself ---

NAMED = (  # tells roles apart as templates of real models do: no role but these is written
    "{% for m in messages %}{% if m.role == 'user' or m.role == 'assistant' or (m.role == 'system' and loop.first) %}"
    "<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize(
    ("messages", "lost"),
    [
        ([ASKED, {"role": "system", "content": "s"}, ASKED], "a turn of 'system'"),
        # Keys that no template reads do not hide a turn that is lost.
        ([{**ASKED, "id": 7}, {"role": "system", "content": "s", "id": 8}, ASKED], "a turn of 'system'"),
        ([ASKED, {"role": "tool", "content": "2", "tool_call_id": "x"}], "a turn of 'tool'"),
        ([{"from": "human", "value": "1"}, {"from": "observation", "value": "2"}], "a turn of 'tool'"),
        ([ASKED, {"role": "assistant", "content": None, "tool_calls": [CALL]}, ASKED], "tool calls"),
        ([ASKED, {**ANSWERED, "tool_calls": [CALL]}, ASKED], "tool calls"),
        ([ASKED, {**ANSWERED, "function_call": CALL["function"]}, ASKED], "tool calls"),
    ],
)
def test_what_a_template_leaves_out_is_found_whatever_the_text_is(
    tmp_path: Path, messages: list[dict[str, Any]], lost: str
) -> None:
    words = tokenizer()
    words.chat_template = NAMED
    with pytest.raises(RowError, match=f"has {lost} that the chat template leaves out"):
        load(tmp_path, "rl", {"prompt": messages, "ground_truth": "2"}, words=words)
    with pytest.raises(RowError, match=f"has {lost} that the chat template leaves out"):
        load(tmp_path, "sft", {"messages": [*messages, ANSWERED]}, words=words)


def test_a_thought_that_is_to_be_learned_must_be_written(tmp_path: Path) -> None:
    words, row = tokenizer(), {"messages": [ASKED, {**ANSWERED, "reasoning_content": "one and one"}]}
    with pytest.raises(RowError, match=r"a thought \(reasoning_content\) that the chat template leaves out"):
        load(tmp_path, "sft", row, words=words)
    words.chat_template = words.chat_template.replace("{{ m['content'] }}", "{{ m.reasoning_content }}{{ m.content }}")
    batch = load(tmp_path, "sft", row, words=words).batch([0])
    assert words.decode(batch["input_ids_T"][batch["loss_mask_T"]]) == "one and one2<|end|>"


def test_markers_are_what_the_template_writes_whether_the_tokenizer_knows_them_or_not() -> None:
    words = tokenizer()
    assert set(turn_markers(words)) == {"<|system|>", "<|user|>", "<|assistant|>", "<|end|>"}
    words.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<think>"
    )
    assert set(turn_markers(words)) == {"<|im_start|>", "<|im_end|>", "<|end|>"}  # the last ends sequences


# --- prompts, answers and ground truths ---


@pytest.mark.parametrize(
    ("kind", "row", "keys", "what"),
    [
        ("rl", {"prompt": [ASKED, ANSWERED], "ground_truth": "2"}, {}, "ends in an assistant's turn"),
        ("sft", {"p": [ASKED, ANSWERED], "r": "3"}, {"prompt_key": "p", "response_key": "r"}, "ends in an assistant's"),
        ("pairs", {"prompt": [ASKED, ANSWERED], "chosen": "2", "rejected": "3"}, {}, "ends in an assistant's turn"),
        ("rl", {"prompt": "1", "ground_truth": float("nan")}, {}, "has nan where a ground truth should be"),
        ("rl", {"prompt": "1", "ground_truth": [1, {"x": float("inf")}]}, {}, "has inf where a ground truth"),
        ("rl", {"prompt": "1", "ground_truth": "bad \ud83d"}, {}, "half of a surrogate pair"),
        ("pairs", {"prompt": "1", "chosen": "2", "rejected": "3<|end|>4"}, {}, "holds '<|end|>'"),
        ("rl", {"prompt": json.dumps(ASKED), "ground_truth": "2"}, {}, "is an object"),
        ("rl", {"prompt": f"array([{ASKED}], dtype=object)", "ground_truth": "2"}, {}, "is Python's text"),
        ("sft", {"p": "1", "r": str([ANSWERED])}, {"prompt_key": "p", "response_key": "r"}, "is Python's text"),
        (
            "sft",
            {"p": "1", "r": [ASKED, ANSWERED]},
            {"prompt_key": "p", "response_key": "r"},
            "begins with other turns",
        ),
        ("sft", {"messages": [ANSWERED]}, {}, "begins with an assistant's turn"),
        ("sft", {"messages": [ANSWERED, ASKED, ANSWERED]}, {}, "begins with an assistant's turn"),
        ("sft", {"messages": [ASKED, {**ANSWERED, "train": "no"}]}, {}, "neither true nor false"),
        ("sft", {"messages": [ASKED, {**ANSWERED, "train": 0}]}, {}, "no assistant message that is to be learned"),
        ("sft", {"text": " "}, {"format": "text"}, "is empty"),
        ("sft", {"text": "a\0"}, {"format": "text"}, "holds a zero character"),
    ],
)
def test_what_is_no_question_or_no_answer_is_refused(
    tmp_path: Path, kind: str, row: dict[str, Any], keys: dict[str, Any], what: str
) -> None:
    with pytest.raises(RowError, match=what):
        load(tmp_path, kind, row, **keys)


def test_a_greeting_that_is_not_learned_may_come_first(tmp_path: Path) -> None:
    words, greeting = tokenizer(), {"role": "assistant", "content": "9"}
    for talk, keys in [
        ([{**greeting, "train": False}, ASKED, ANSWERED], {}),
        ([greeting, ASKED, ANSWERED], {"loss_on": "last_assistant"}),
    ]:
        batch = load(tmp_path, "sft", {"messages": talk}, words=words, **keys).batch([0])
        assert words.decode(batch["input_ids_T"][batch["loss_mask_T"]]) == "2<|end|>"
    asked = {"role": "assistant", "content": '[{"role": "assistant", "name": "x"}]'}  # an answer may be JSON
    batch = load(tmp_path, "sft", {"p": "1", "r": asked["content"]}, words=words, prompt_key="p", response_key="r")
    assert asked["content"] in words.decode(batch.batch([0])["input_ids_T"])
    setting = {"role": "system", "content": "s"}
    row = {"prompt": [setting, ASKED], "chosen": [ASKED, ANSWERED], "rejected": [setting, ASKED, WRONG]}
    assert all(words.decode(ids).startswith("<|system|>s") for ids in load(tmp_path, "pairs", row).tokens([0]))


def test_pairs_that_differ_in_spaces_alone_are_one_answer_twice(tmp_path: Path) -> None:
    same = {"prompt": "1+1=", "chosen": "2", "rejected": [{"role": "assistant", "content": "2 "}]}
    other = {"prompt": "1+1=", "chosen": [ANSWERED], "rejected": [WRONG]}
    with pytest.raises(UserError, match="chosen and rejected are the same"):
        load(tmp_path, "pairs", {**same, "rejected": " 2"})
    config = PreferenceDataSection(train="x")
    (tmp_path / "mine.py").write_text(
        f"def rows(): return [{ {**same, 'rejected': ' 2'} }, {same | {'rejected': '3'}}]"
    )
    assert load_preferences(f"{tmp_path}/mine.py:rows", config, tokenizer(), seed=0).alike == 1
    assert len(load(tmp_path, "pairs", other)) == 1
