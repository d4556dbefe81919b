"""Rows of every system's form are read alike; what cannot be rendered as it stands is refused with its row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hybridflow.chat.messages import ALIASES, RefusedValue, read_messages
from hybridflow.chat.template import render_conversations
from hybridflow.config.locate import load_function
from hybridflow.config.sections.data import PromptDataSection, SftDataSection
from hybridflow.config.sections.preference import PreferenceDataSection
from hybridflow.data.preference import load_preferences
from hybridflow.data.prompts import PromptSet, load_prompts
from hybridflow.data.reader import RowError
from hybridflow.data.sft import SftSet, load_sft
from hybridflow.errors import UserError

from tiny import CARRY

TALK = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_function(f"{CARRY}:make_tokenizer")()


def written(folder: Path, *rows: Any) -> str:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "rows.jsonl")


def prompts(tokenizer: PreTrainedTokenizerBase, folder: Path, *values: Any) -> PromptSet:
    source = written(folder, *({"prompt": value, "ground_truth": "2"} for value in values))
    return load_prompts(source, PromptDataSection(), tokenizer, seed=0)


def sft(tokenizer: PreTrainedTokenizerBase, folder: Path, *rows: Any, **keys: Any) -> SftSet:
    return load_sft(SftDataSection(train=written(folder, *rows), **keys), tokenizer, seed=0)


# --- forms that are read ---

SAME = [
    TALK,
    [{"from": "human", "value": "1+1="}, {"from": "gpt", "value": "2"}],
    [{"from": "user", "value": "1+1=", "weight": None}, {"from": "assistant", "value": "2"}],
    [{"role": "User", "content": "1+1="}, {"role": "model", "content": "2"}],
    [{"role": "user", "content": [{"type": "text", "text": "1+"}, {"type": "text", "text": "1="}]}, TALK[1]],
    [{"role": "user", "content": ["1+1="]}, {"role": "assistant", "content": [{"type": "output_text", "text": "2"}]}],
    # As Parquet fills it in.
    [{**TALK[0], "from": None, "value": None, "tool_calls": None}, {**TALK[1], "train": None, "name": None}],
    json.dumps(TALK),
    json.dumps([{"from": "human", "value": "1+1="}, {"from": "gpt", "value": "2"}], indent=1),
]


@pytest.mark.parametrize("value", SAME)
def test_one_conversation_in_many_forms(tokenizer: PreTrainedTokenizerBase, tmp_path: Path, value: Any) -> None:
    assert read_messages(value) == TALK
    whole = sft(tokenizer, tmp_path, {"messages": TALK}).batch([0])
    read = sft(tokenizer, tmp_path, {"messages": value}).batch([0])
    assert read["input_ids_T"].equal(whole["input_ids_T"]) and read["loss_mask_T"].equal(whole["loss_mask_T"])


@pytest.mark.parametrize(
    ("row", "keys"),
    [
        ({"conversations": SAME[1]}, {}),  # ShareGPT's column
        ({"prompt": "1+1=", "completion": "2"}, {"prompt_key": "prompt", "response_key": "completion"}),  # TRL
        ({"prompt": TALK[:1], "completion": TALK[1:]}, {"prompt_key": "prompt", "response_key": "completion"}),
        ({"instruction": "1+1=", "output": "2"}, {"prompt_key": "instruction", "response_key": "output"}),  # Alpaca
        ({"messages": [*TALK, {"role": "user", "content": "?"}]}, {}),
    ],
)
def test_rows_of_other_systems_are_learned_alike(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, row: dict[str, Any], keys: dict[str, str]
) -> None:
    batch = sft(tokenizer, tmp_path, row, **keys).batch([0])
    assert tokenizer.decode(batch["input_ids_T"][batch["loss_mask_T"]]) == "2<|end|>"


@pytest.mark.parametrize("value", ["1+1=", TALK[:1], *(v[:1] for v in SAME[1:7]), json.dumps(TALK[:1])])
def test_one_prompt_in_many_forms(tokenizer: PreTrainedTokenizerBase, tmp_path: Path, value: Any) -> None:
    found = prompts(tokenizer, tmp_path, value)[0]
    assert found.text == "<|user|>1+1=<|end|><|assistant|>" and found.messages == TALK[:1]


def test_what_an_assistant_may_leave_empty_and_what_is_not_learned(tokenizer: PreTrainedTokenizerBase) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    assert read_messages([TALK[0], call])[1]["content"] == ""
    assert read_messages([{**TALK[0], "weight": 1}, {**TALK[1], "weight": 0}])[1] == {**TALK[1], "train": False}
    assert read_messages([{"role": "tool", "content": "", "name": "f"}]) == [
        {"role": "tool", "content": "", "name": "f"}
    ]
    for alias, role in ALIASES.items():
        assert read_messages([{"from": alias, "value": "x"}])[0]["role"] == role
    # A template that names the role itself means it; one that names both means what others mean by it.
    assert read_messages([{"role": "bot", "content": "x"}], template="{% if role == 'bot' %}")[0]["role"] == "bot"
    gemma = "{% if m.role == 'assistant' %}{% set role = 'model' %}{% endif %}"
    assert read_messages([{"role": "model", "content": "x"}], template=gemma)[0]["role"] == "assistant"


# --- what is refused ---

REFUSED = [
    ([{"role": "user", "value": None}], "has no content"),
    ([{"role": "user", "text": "2+2"}], "has no content"),
    ([{"content": "2+2"}], "has no role"),
    ([{"from": "narrator", "value": "2+2"}], "from an unknown role"),
    ([{"role": "critic", "content": "2+2"}], "from an unknown role"),
    ([{"role": "usr", "content": "2+2"}], "from an unknown role"),
    ([{"role": "user", "content": "2\0+2"}], "holds a zero character"),
    ("\0", "holds a zero character"),
    ("<|user|>2+2", "holds '<|user|>'"),
    ("<|system|>be brief", "holds '<|system|>'"),
    ([{"role": 7, "content": "2+2"}], "has a role that is no name"),
    ([{"role": "user", "from": "gpt", "content": "2"}], "has two roles"),
    ([{"role": "user", "content": "1", "value": "2"}], "both content and value"),
    ([{"role": "user", "content": None}], "has no content"),
    ([{"role": "user", "content": 4}], "has a number as its content"),
    ([{"role": "user", "content": float("nan")}], "has a number as its content"),
    ([{"role": "user", "content": {"text": "x"}}], "has an object as its content"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": "x.png"}]}], "has a part without text"),
    ([{"role": "user", "content": [{"type": "text"}]}], "has a part without text"),
    ([{"role": "user", "content": ""}], "is empty"),
    ([{"role": "user", "content": " \n"}], "is empty"),
    ([{"role": "user", "content": []}], "is empty"),
    ([TALK[0], {"role": "assistant", "content": ""}], "is empty"),
    ([TALK[0], "yes"], "is a string, not an object"),
    ([TALK[0], None], "is null, not an object"),
    ([], "is an empty list"),
    ({"role": "user", "content": "x"}, "is an object, not a string"),
    (7, "is a number, not a string"),
    (None, "is null, not a string"),
    ("", "is empty"),
    ("  ", "is empty"),
    ("bad \ud83d", "half of a surrogate pair"),
    ([{"role": "user", "content": "bad \ude00!"}], "half of a surrogate pair"),
    (str(TALK[:1]), "is Python's text of a list of messages"),
    ("1+1=<|end|>", "holds '<|end|>', which the chat template writes around turns"),
    ([TALK[0], {"role": "assistant", "content": "2<|end|><|user|>3"}], "which the chat template writes around turns"),
]


@pytest.mark.parametrize(("value", "what"), REFUSED)
@pytest.mark.parametrize("place", ["prompt", "messages", "chosen"])
def test_what_cannot_be_rendered_as_it_stands_is_refused_with_its_row(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, value: Any, what: str, place: str
) -> None:
    reads = {
        "prompt": lambda: prompts(tokenizer, tmp_path, value),
        "messages": lambda: sft(tokenizer, tmp_path, {"messages": value}),
        "chosen": lambda: pairs(tokenizer, tmp_path, prompt=value, chosen="a", rejected="b"),
    }
    with pytest.raises(UserError) as caught:
        reads[place]()
    assert what in caught.value.what and "row 0 of" in caught.value.what and caught.value.fix


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["role", "content", "from", "value", "type", "text", "x"]), inner, max_size=4
            )
        ),
        max_leaves=12,
    )
)
def test_any_value_is_read_as_messages_with_text_or_refused(value: Any) -> None:
    messages: list[dict[str, Any]] = []
    refused = None
    try:
        messages = read_messages(value)
    except RefusedValue as error:
        refused = error
    assert (refused.what and refused.fix) if refused else messages
    assert all(isinstance(m["role"], str) and isinstance(m["content"], str) for m in messages)
    assert all(m["content"].strip() for m in messages if m["role"] == "user")


def test_all_kinds_of_mistakes_are_told_at_once_with_their_counts(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    chat = [{"role": "user", "content": "1"}]
    rows = [chat, [], chat, [{"role": "user", "content": ""}], [], [{"role": "user", "text": "1"}], []]
    with pytest.raises(RowError) as caught:
        prompts(tokenizer, tmp_path, *rows)
    said = str(caught.value)
    assert "prompt of row 1 of" in said and "is an empty list; so are 2 other rows" in said
    assert "also: prompt of row 3 of" in said and "also: prompt of row 5 of" in said and "its keys: role, text" in said
    assert (caught.value.number, caught.value.column) == (1, "prompt")


# --- turns that a template loses, prompts that end in an answer ---


def test_turns_that_the_template_leaves_out_are_refused(tmp_path: Path) -> None:
    tokenizer = load_function(f"{CARRY}:make_tokenizer")()
    system = [{"role": "system", "content": "be brief"}, *TALK]
    assert prompts(tokenizer, tmp_path, system[:2])[0].text.startswith("<|system|>")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role in ('user', 'assistant') or (m.role == 'system' and loop.first) %}"
        "<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    prompts(tokenizer, tmp_path, system[:2], TALK[:1])
    for role, lost in [
        ("system", [TALK[0], system[0], TALK[0]]),
        ("tool", [{"role": "tool", "content": "2"}, TALK[0]]),
    ]:
        with pytest.raises(RowError, match=f"has a turn of '{role}' that the chat template leaves out"):
            prompts(tokenizer, tmp_path, lost)
        with pytest.raises(RowError, match="leaves out"):
            sft(tokenizer, tmp_path, {"messages": [*lost, TALK[1]]})
    tokenizer.chat_template = tokenizer.chat_template.replace(" or (m.role == 'system' and loop.first)", "")
    config = PromptDataSection(system_prompt="be brief")
    with pytest.raises(RowError, match=r"'system' \(data\.system_prompt\) that the chat template leaves out"):
        load_prompts(written(tmp_path, {"prompt": "1", "ground_truth": "1"}), config, tokenizer, seed=0)


def test_a_prompt_that_ends_in_an_answer_is_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    with pytest.raises(RowError, match="ends in an assistant's turn"):
        prompts(tokenizer, tmp_path, TALK)


# --- the border of prompt and answer ---


def test_a_token_with_the_prompts_last_space_is_seen_where_offsets_leave_spaces_out() -> None:
    vocabulary = ["<|end|>", "Q", "Ġ", "a", "Ġa", "Ċ"]
    for trim in (False, True):
        core = Tokenizer(models.BPE({t: i for i, t in enumerate(vocabulary)}, [("Ġ", "a")]))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.post_processor = processors.ByteLevel(trim_offsets=trim)
        core.add_special_tokens(["<|end|>"])
        fast = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>")
        talk = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "a\n"}]
        for opened, answered in (("\n", [0, 0, 1, 1, 1]), (" ", None)):
            fast.chat_template = (
                f"{{% for m in messages %}}{{{{ {opened!r} if m.role == 'assistant' else '' }}}}{{{{ m.content }}}}"
                "{{ '<|end|>' if m.role == 'assistant' else '' }}{% endfor %}"
                f"{{{{ {opened!r} if add_generation_prompt else '' }}}}"
            )
            if answered is None:
                with pytest.raises(UserError, match="a token spans the border"):
                    render_conversations(fast, [talk])
            else:
                [(ids, mask)] = render_conversations(fast, [talk])
                assert [int(m) for m in mask] == answered and ids == [1, 5, 3, 5, 0], trim


# --- pairs ---


def pairs(tokenizer: PreTrainedTokenizerBase, folder: Path, **row: Any) -> Any:
    config = PreferenceDataSection(train="x.jsonl")
    return load_preferences(written(folder, row), config, tokenizer, seed=0).pair(0)[0]


def test_the_prompt_is_asked_once_whatever_the_answers_repeat(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    def answer(text: str, *before: dict[str, str]) -> list[dict[str, str]]:
        return [*before, {"role": "assistant", "content": text}]

    user = {"role": "user", "content": "q"}
    sharegpt = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    for prompt in ("q", "q ", [user], [{"from": "human", "value": " q"}]):
        for chosen in (
            "a",
            answer("a"),
            answer("a", user),
            sharegpt,
            answer("a", {"role": "system", "content": "s"}, user),
        ):
            talk = pairs(tokenizer, tmp_path, prompt=prompt, chosen=chosen, rejected=answer("b", user))
            assert [m["role"] for m in talk if m["role"] != "system"] == ["user", "assistant"], (prompt, chosen)
            assert [m["content"].strip() for m in talk if m["role"] != "system"] == ["q", "a"]
    assert pairs(tokenizer, tmp_path, chosen=answer("a", user), rejected=answer("b", user)) == answer("a", user)  # TRL
    with pytest.raises(RowError, match="begins with other turns than the prompt"):
        pairs(tokenizer, tmp_path, prompt="other", chosen=answer("a", user), rejected="b")
    with pytest.raises(RowError, match="responds to another prompt than chosen"):
        pairs(tokenizer, tmp_path, chosen=answer("a", user), rejected=answer("b", {"role": "user", "content": "p"}))
    with pytest.raises(RowError, match="ends in a turn of 'user'"):
        pairs(tokenizer, tmp_path, chosen=answer("a", user), rejected=[*answer("b", user), user])
