"""Which tokens the assistant wrote, and templates for which that cannot be said."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hybridflow.batch import Batch
from hybridflow.config.locate import load_function
from hybridflow.config.sections import SftDataSection
from hybridflow.data.chat import render_conversations, render_prompt, require_template
from hybridflow.data.sft import SftSet
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


def sft_set(tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]], max_tokens: int = 50) -> SftSet:
    return SftSet(rows, "mine.jsonl", SftDataSection(train="mine.jsonl", max_tokens=max_tokens), tokenizer)


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
        ({"messages": []}, "messages of row 1 of mine.jsonl holds no assistant message"),
        ({"messages": TALK * 3}, "row 1 of mine.jsonl has 66 tokens, data.max_tokens is 50"),
    ],
)
def test_rows_without_a_usable_conversation_are_named(
    tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        sft_set(tokenizer, [{"messages": TALK}, row]).batch([0, 1])
