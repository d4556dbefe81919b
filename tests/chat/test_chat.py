"""Which tokens the assistant wrote, and templates for which that cannot be said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hybridflow.batch import Batch
from hybridflow.chat.template import Style, render_conversations, render_prompt, render_texts, require_template
from hybridflow.config.locate import load_function
from hybridflow.config.sections.data import SftDataSection
from hybridflow.data.sft import SftSet, load_sft
from hybridflow.data.sources import RowSet
from hybridflow.errors import UserError

from tiny import CARRY

# Opens an answer with a newline after the role, and writes a newline after every message's end.
CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# Drops what an earlier answer thought, as templates of thinking models do.
FORGETFUL = (
    "{% for m in messages %}<|{{ m['role'] }}|>"
    "{{ m['content'] if loop.last else m['content'].split('=')[-1] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TALK = [
    {"role": "user", "content": "1+1"},
    {"role": "assistant", "content": "so=2"},
    {"role": "user", "content": "so=2"},  # the same text as the answer, but not written by the assistant
    {"role": "assistant", "content": "yes"},
]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return load_function(f"{CARRY}:make_tokenizer")()


def written(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> list[str]:
    """The masked-in stretches as text, special tokens included."""
    [(ids, mask)] = render_conversations(tokenizer, [messages])
    assert len(ids) == len(mask)
    stretches, before = [], False
    for token, inside in zip(ids, mask):
        if inside:
            stretches[len(stretches) if not before else -1 :] = [(stretches[-1] if before else []) + [token]]
        before = inside
    return [tokenizer.decode(s) for s in stretches]


def test_the_answers_and_their_closing_tokens_are_masked_in(tokenizer: PreTrainedTokenizerBase) -> None:
    [(ids, mask)] = render_conversations(tokenizer, [TALK])
    text = "<|user|>1+1<|end|><|assistant|>so=2<|end|><|user|>so=2<|end|><|assistant|>yes<|end|>"
    assert tokenizer.decode(ids) == text
    expected = [0] * 6 + [1] * 5 + [0] * 7 + [1] * 4
    assert [int(m) for m in mask] == expected
    assert written(tokenizer, TALK) == ["so=2<|end|>", "yes<|end|>"]


def test_text_of_the_template_around_answers_is_masked_out(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = CHATML
    assert written(tokenizer, TALK) == ["so=2<|end|>", "yes<|end|>"]


def test_conversations_are_rendered_apart(tokenizer: PreTrainedTokenizerBase) -> None:
    both = render_conversations(tokenizer, [TALK, TALK[:2]])
    assert both == [*render_conversations(tokenizer, [TALK]), *render_conversations(tokenizer, [TALK[:2]])]


def test_a_system_message_first_and_no_answer_last(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = CHATML
    talk = [{"role": "user", "content": "be brief"}, *TALK, {"role": "user", "content": "bye"}]
    assert written(tokenizer, talk) == ["so=2<|end|>", "yes<|end|>"]


def test_an_empty_answer_is_its_closing_token(tokenizer: PreTrainedTokenizerBase) -> None:
    assert written(tokenizer, [TALK[0], {"role": "assistant", "content": ""}]) == ["<|end|>"]


def test_a_template_that_rewrites_history_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = FORGETFUL
    assert written(tokenizer, TALK[:2]) == ["so=2<|end|>"]
    with pytest.raises(UserError, match="rewrites turns before message 1") as caught:
        render_conversations(tokenizer, [TALK])
    assert "only appends" in caught.value.fix


def test_a_token_across_the_border_of_an_answer_is_refused() -> None:
    core = Tokenizer(BPE({"a": 0, "b": 1, "ab": 2, "<|end|>": 3}, [("a", "b")]))
    core.add_special_tokens(["<|end|>"])
    joining = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>")
    joining.chat_template = (
        "{% for m in messages %}{{ 'a' if m['role'] == 'assistant' }}{{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}a{% endif %}"
    )
    talk = [{"role": "user", "content": "b"}, {"role": "assistant", "content": "a"}]
    assert render_conversations(joining, [talk]) == [([1, 3, 0, 0, 3], [False, False, False, True, True])]
    with pytest.raises(UserError, match="a token spans the border"):
        render_conversations(joining, [[talk[0], {"role": "assistant", "content": "ba"}]])


def test_the_prompt_is_the_conversation_up_to_the_answer(tokenizer: PreTrainedTokenizerBase) -> None:
    for template in (tokenizer.chat_template, CHATML):
        tokenizer.chat_template = template
        text, ids = render_prompt(tokenizer, "1+1")
        [(full, mask)] = render_conversations(tokenizer, [TALK[:2]])
        assert full[: len(ids)] == ids and mask.index(True) == len(ids)
        assert tokenizer.decode(ids) == text
        assert render_prompt(tokenizer, TALK[:1]) == (text, ids)


def test_a_tokenizer_without_template_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        require_template(tokenizer)


def sft_set(
    tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]], max_tokens: int = 50, **values: Any
) -> SftSet:
    config = SftDataSection(train="mine.jsonl", max_tokens=max_tokens, **values)
    return SftSet(RowSet(rows, tuple(config.train), (0,), range(len(rows))), config, tokenizer)


def test_a_supervised_batch_is_ragged_with_loss_on_answers(tokenizer: PreTrainedTokenizerBase) -> None:
    batch = sft_set(tokenizer, [{"messages": TALK}, {"messages": TALK[:2]}]).batch([1, 0, 1])
    assert isinstance(batch, Batch) and batch.lengths().tolist() == [11, 22, 11]
    assert batch["trajectory_B"].tolist() == [1, 0, 1]
    assert [int(m.sum()) for m in batch.rows("loss_mask_T")] == [5, 9, 5]
    assert tokenizer.decode(batch["input_ids_T"][batch["loss_mask_T"]][:5]) == "so=2<|end|>"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"mesages": TALK}, r"row 1 of mine.jsonl has no column 'messages'"),
        ({"messages": TALK[:1]}, "messages of row 1 of mine.jsonl holds no assistant message"),
        ({"messages": "so=2"}, "messages of row 1 of mine.jsonl holds no assistant message"),
        ({"messages": []}, "messages of row 1 of mine.jsonl is an empty list"),
        ({"messages": TALK * 3}, "row 1 of mine.jsonl has 66 tokens, data.max_tokens is 50"),
    ],
)
def test_rows_without_a_usable_conversation_are_named(
    tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        sft_set(tokenizer, [{"messages": TALK}, row]).batch([0, 1])


# --- which turns are learned, and how rows become conversations ---

# A switch for thinking, as in Qwen3's template: without it the answer opens with an empty thought.
SWITCH = CHATML.replace("<|assistant|>\n{% endif %}", "<|assistant|>\n{{ '' if enable_thinking else '()' }}{% endif %}")


def learned(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], **options: Any) -> str:
    [(ids, mask)] = render_conversations(tokenizer, [messages], **options)
    return tokenizer.decode([i for i, inside in zip(ids, mask) if inside])


def test_only_the_last_turn_or_chosen_turns_are_learned(tokenizer: PreTrainedTokenizerBase) -> None:
    assert learned(tokenizer, TALK, loss_on="last_assistant") == "yes<|end|>"
    chosen = [TALK[0], {**TALK[1], "train": False}, TALK[2], {**TALK[3], "train": True}]
    assert learned(tokenizer, chosen) == "yes<|end|>"
    chosen = [TALK[0], {**TALK[1], "train": None}, TALK[2], {**TALK[3], "train": False}]  # null, as Parquet fills it
    assert learned(tokenizer, chosen) == "so=2<|end|>"
    tokenizer.chat_template = FORGETFUL.replace("if loop.last", "if loop.last or m['role'] == 'user'")
    with pytest.raises(UserError, match="rewrites turns before message 1") as caught:
        learned(tokenizer, TALK)
    assert "data.loss_on=last_assistant" in caught.value.fix
    assert learned(tokenizer, TALK, loss_on="last_assistant") == "yes<|end|>"
    for messages, loss_on in [(chosen, "last_assistant"), ([TALK[0], {**TALK[1], "train": False}], "all_assistant")]:
        with pytest.raises(UserError, match=r"row 0 of mine\.jsonl holds no assistant message that is to be learned"):
            sft_set(tokenizer, [{"messages": messages}], loss_on=loss_on).batch([0])


def test_a_system_prompt_comes_first_unless_there_is_one(tokenizer: PreTrainedTokenizerBase) -> None:
    brief = Style(system_prompt="be brief")
    tokenizer.chat_template = CHATML
    assert (
        render_prompt(tokenizer, "1+1", brief)[0]
        == "<|system|>\nbe brief<|end|>\n<|user|>\n1+1<|end|>\n<|assistant|>\n"
    )
    own = [{"role": "system", "content": "be long"}, *TALK]
    assert render_prompt(tokenizer, own, brief) == render_prompt(tokenizer, own)
    [(ids, mask)] = render_conversations(tokenizer, [TALK], brief)
    assert tokenizer.decode(ids).startswith("<|system|>\nbe brief<|end|>") and sum(mask) == 9


def test_the_thinking_switch_reaches_a_template_that_has_one_and_no_other(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match=r"data\.thinking is false, but the chat template has no such switch") as caught:
        require_template(tokenizer, Style(thinking=False))
    assert "enable_thinking" in caught.value.why
    tokenizer.chat_template = SWITCH
    require_template(tokenizer, Style(thinking=False))
    ends = {t: render_prompt(tokenizer, "1", Style(thinking=t))[0].rpartition("\n")[2] for t in (True, False, None)}
    assert ends == {True: "", False: "()", None: "()"}


def test_prompt_and_response_columns_are_a_conversation(tokenizer: PreTrainedTokenizerBase) -> None:
    whole = sft_set(tokenizer, [{"messages": TALK[:2]}, {"messages": TALK}]).batch([0, 1])
    rows = [{"q": "1+1", "a": {"text": "so=2"}}, {"q": TALK[:3], "a": {"text": "yes"}}]
    keys = {"prompt_key": "q", "response_key": "a.text"}
    batch = sft_set(tokenizer, rows, **keys, loss_on="all_assistant").batch([0, 1])
    assert batch["input_ids_T"].equal(whole["input_ids_T"]) and batch["loss_mask_T"].equal(whole["loss_mask_T"])
    with pytest.raises(
        UserError, match=r"a of row 1 of mine.jsonl is a number, not a string or a list of chat messages"
    ):
        sft_set(tokenizer, [rows[0], {"q": "1", "a": 3}], prompt_key="q", response_key="a").batch([1])


# --- plain text ---


def test_plain_text_is_learned_but_for_its_first_token_and_ends(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = None  # not needed
    batch = sft_set(tokenizer, [{"text": "1+1"}], format="text").batch([0])
    assert tokenizer.decode(batch["input_ids_T"]) == "1+1<|end|>"
    assert batch["loss_mask_T"].tolist() == [False, True, True, True]
    [(ids, _)] = render_texts(tokenizer, [("", "1<|end|>")])
    assert tokenizer.decode(ids) == "1<|end|>"  # not a second one
    batch = sft_set(tokenizer, [{"p": "1+", "r": "1"}], format="text", prompt_key="p", response_key="r").batch([0])
    assert batch["loss_mask_T"].tolist() == [False, False, True, True]
    with pytest.raises(UserError, match=r"text of row 0 of mine\.jsonl is a list, not a string"):
        sft_set(tokenizer, [{"text": TALK}], format="text").batch([0])


def test_a_token_across_the_end_of_a_plain_prompt_is_refused() -> None:
    core = Tokenizer(BPE({"a": 0, "b": 1, "ab": 2, "<|end|>": 3}, [("a", "b")]))
    joining = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>")
    assert render_texts(joining, [("ab", "a")]) == [([2, 0, 3], [False, True, True])]
    with pytest.raises(UserError, match="a token spans the border"):
        render_texts(joining, [("ba", "b")])


# --- too long ---


@pytest.mark.parametrize("format", ["chat", "text"])
def test_long_conversations_are_refused_left_out_or_cut(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, format: str
) -> None:
    def row(question: str, answer: str) -> dict[str, str]:
        return {"p": question, "r": answer}

    # In chat: 3 + 1 template tokens around; in text: the closing token alone.
    extra = 4 if format == "chat" else 1
    rows = [row("12", "34"), row("12", "345678"), row("1234567890", "1"), row("1", "2")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    keys = {"train": str(tmp_path / "rows.jsonl"), "prompt_key": "p", "response_key": "r", "format": format}
    limit = 4 + extra
    refusing = load_sft(SftDataSection(**keys, max_tokens=limit), tokenizer, seed=0)
    with pytest.raises(UserError, match=f"row 1 of .*rows.jsonl has {8 + extra} tokens, data.max_tokens is {limit}"):
        refusing.batch([0, 1])
    left = load_sft(SftDataSection(**keys, max_tokens=limit, over_long="filter"), tokenizer, seed=0)
    assert left.data.rows == [rows[0], rows[3]]
    assert left.notes() == [f"conversations of more than {limit} tokens, left out: 2"]
    assert left.batch([0, 1]).lengths().tolist() == [limit, 2 + extra]
    cut = load_sft(SftDataSection(**keys, max_tokens=limit, over_long="truncate"), tokenizer, seed=0)
    assert cut.data.rows == [rows[0], rows[1], rows[3]]
    assert cut.notes() == [
        f"conversations of more than {limit} tokens, cut at their end: 1",
        "left out, because the cut would leave nothing to learn: 1",
    ]
    whole, short = refusing.batch([0]), cut.batch([1])
    assert short["input_ids_T"].tolist()[: limit - 1] == whole["input_ids_T"].tolist()[: limit - 1]
    assert tokenizer.decode(short["input_ids_T"][short["loss_mask_T"]]) == "345"
    with pytest.raises(UserError, match=r"all rows of .*rows.jsonl are too long"):
        load_sft(SftDataSection(**keys, max_tokens=extra + 1, over_long="filter"), tokenizer, seed=0)
