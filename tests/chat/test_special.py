"""Tags that a tokenizer has as special tokens: rewards and stops see them where they are to, and check tells."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerBase

from hybridflow.chat.special_tokens import answer_decoder, stop_decoder
from hybridflow.config.locate import load_function
from hybridflow.rollout.stopping import StopText

from runs import configuration, succeed
from tiny import CARRY

Output = pytest.CaptureFixture[str]
TAGS = ("<think>", "</think>", "<answer>", "</answer>", "<|call|>")

MODEL = f"""
from hybridflow.config.locate import load_function

def model(seed=0, opening="", eos=None, closing=None):
    model, tokenizer = load_function({str(CARRY)!r} + ":tiny_qwen3")(seed=seed)
    tokenizer.add_special_tokens({{"additional_special_tokens": {list(TAGS)!r}}})
    model.resize_token_embeddings(len(tokenizer))
    tokenizer.chat_template = tokenizer.chat_template.replace("<|assistant|>{{%", "<|assistant|>" + opening + "{{%")
    if closing is not None:
        tokenizer.chat_template = tokenizer.chat_template.replace("<|end|>", closing)
    if eos is not None:
        tokenizer.eos_token, model.generation_config.eos_token_id = eos, None
    return model, tokenizer

def opened(seed=0):
    return model(seed, opening="<think>")

def other_end(seed=0):
    return model(seed, eos="<|pad|>")

def no_end(seed=0):
    return model(seed, closing="")
"""


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    made: PreTrainedTokenizerBase = load_function(f"{CARRY}:make_tokenizer")()
    made.add_special_tokens({"additional_special_tokens": list(TAGS)})
    return made


def ids_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return found


@pytest.mark.parametrize(
    ("answer", "kept", "plain"),
    [
        ("<think>1</think><answer>2</answer><|end|>", "<think>1</think><answer>2</answer>", "12"),
        ("<answer>2</answer>", "<answer>2</answer>", "2"),
        ("2<|end|>", "2", "2"),
        ("<|call|>f(1)<|pad|>", "<|call|>f(1)", "f(1)"),
        ("2<|user|>3", "2<|user|>3", "23"),
        ("plain", "plain", "plain"),
        ("", "", ""),
    ],
)
def test_rewards_see_special_tokens_where_they_are_kept_and_never_those_that_end_an_answer(
    answer: str, kept: str, plain: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    ids, ends = ids_of(tokenizer, answer), [tokenizer.eos_token_id]
    assert answer_decoder(tokenizer, ends, keep=True)(ids) == kept
    assert answer_decoder(tokenizer, ends, keep=False)(ids) == plain
    assert plain == tokenizer.decode(ids, skip_special_tokens=True)


def end_of(tokenizer: PreTrainedTokenizerBase, text: str, stop: list[str], regex: str | None) -> str | None:
    """The text up to the token that completes a stop."""
    ids = ids_of(tokenizer, text)
    reader = StopText(stop, regex, stop_decoder(tokenizer, [*stop, regex]))
    for i, token in enumerate(ids):
        if reader.ends_with(token):
            return str(tokenizer.decode(ids[: i + 1]))
    return None


@pytest.mark.parametrize(
    ("text", "stop", "regex", "expected"),
    [
        ("1<answer>2</answer>3", ["</answer>"], None, "1<answer>2</answer>"),
        ("1<answer>2</answer>3", ["2</answer>"], None, "1<answer>2</answer>"),
        ("<answer>2</answer>\n3", ["</answer>\n"], None, "<answer>2</answer>\n"),
        ("a<|call|>b", ["<|call|>"], None, "a<|call|>"),
        ("a<|call|>b", [], r"<\|call\|>b", "a<|call|>b"),
        ("a<answer>22</answer>", [], r"<answer>\d", "a<answer>2"),
        ("12;34", [";"], None, "12;"),
        ("1<think>|2", ["|"], None, "1<think>|"),  # not within a special token that no stop names
        ("1<think>2", ["k"], None, None),
        ("1<think>2</think>", ["</answer>"], None, None),
    ],
)
def test_a_stop_may_be_or_hold_a_special_token(
    text: str, stop: list[str], regex: str | None, expected: str | None, tokenizer: PreTrainedTokenizerBase
) -> None:
    assert end_of(tokenizer, text, stop, regex) == expected


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., str]:
    (tmp_path / "mine.py").write_text(MODEL)
    (tmp_path / "reward.py").write_text("")

    def write(command: str = "train", model: str = "model", **sections: dict[str, Any]) -> str:
        if command != "sft":
            sections["reward"] = {"pool": {"processes": 0}} | sections.get("reward", {})
        return configuration(tmp_path, command, **{"model": {"path": f"{tmp_path}/mine.py:{model}"}, **sections})

    return write


def advice(said: str) -> list[str]:
    return [line for line in said.splitlines() if "advice:" in line]


@pytest.mark.parametrize(
    ("reward", "named"),
    [
        ({"function": "format"}, "</answer>, </think>, <answer>, <think>"),
        ({"function": "format", "kwargs": {"tags": ["answer"]}}, "</answer>, <answer>"),
        ({"function": "file"}, "<answer>"),
        ({"terms": {"a": {"function": "qa_em"}, "b": {"function": "gsm8k"}}}, "</answer>, <answer>"),
        ({"function": "regex", "kwargs": {"pattern": r"<\\|call\\|>.*"}}, ""),
        ({"function": "regex", "kwargs": {"pattern": r"<answer>\d+</answer>"}}, "</answer>, <answer>"),
        ({"function": "gsm8k"}, ""),
    ],
)
def test_check_names_special_tokens_that_a_reward_looks_for(
    reward: dict[str, Any], named: str, config: Callable[..., str], tmp_path: Path, capsys: Output
) -> None:
    own = tmp_path / "own.py"
    own.write_text("def score(response, ground_truth):\n    return len(response.split('<answer>')) - 1.0\n")
    section = {"function": f"{own}:score"} if reward.get("function") == "file" else reward
    file = config()
    values = json.dumps(section | {"pool": {"processes": 0}})
    said = succeed(capsys, "check", file, f"reward={values}")
    wanted = f"{named}: special tokens of this tokenizer, which the reward looks for and does not see"
    assert (wanted in said) if named else ("special tokens of this tokenizer" not in said), said
    if named:
        kept = succeed(capsys, "check", file, f"reward={values}", "reward.keep_special_tokens=true")
        assert "special tokens of this tokenizer" not in kept


@pytest.mark.parametrize(
    ("command", "model", "wanted"),
    [
        ("train", "other_end", "closes a response with '<|end|>', and responses end at '<|pad|>'"),
        ("sft", "other_end", "set eos_token to '<|end|>' in tokenizer_config.json"),
        ("sft", "no_end", "closes a response with no special token, and responses end at '<|end|>'"),
        ("eval", "no_end", "have the template write '<|end|>' after a response"),
        ("sft", "model", ""),
        ("train", "model", ""),
    ],
)
def test_check_says_where_a_template_does_not_end_answers_as_generation_does(
    command: str, model: str, wanted: str, config: Callable[..., str], capsys: Output
) -> None:
    said = succeed(capsys, "check", config(command, model))
    assert wanted in said if wanted else "closes a response" not in said


def test_check_says_where_the_template_opens_the_answer(config: Callable[..., str], capsys: Output) -> None:
    file = config(
        "train", "opened", reward={"function": "format", "keep_special_tokens": True, "pool": {"processes": 0}}
    )
    said = succeed(capsys, "check", file)
    assert "begins every response with <think>" in said and "give the reward kwargs.opened=<think>" in said
    for more in ('reward.kwargs={"opened": "<think>"}', 'reward.kwargs={"tags": ["answer"]}', "reward.function=gsm8k"):
        assert "begins every response" not in succeed(capsys, "check", file, more)


@pytest.mark.slow
def test_a_run_gives_its_reward_the_tokens_that_were_kept(
    config: Callable[..., str], tmp_path: Path, capsys: Output
) -> None:
    own = tmp_path / "count.py"
    own.write_text("def score(response):\n    return float(response.count('<') + response.count('|'))\n")
    file = config("train", reward={"function": f"{own}:score"}, rollout={"temperature": 2.0, "max_response_tokens": 64})
    responses = {}
    for keep in ("true", "false"):
        folder = tmp_path / keep
        more = ("train.steps=1", f"run.folder={folder}", f"reward.keep_special_tokens={keep}", "data.eval=null")
        succeed(capsys, "train", file, *more)
        [parquet] = (folder / "rollouts").glob("*.parquet")
        responses[keep] = pq.read_table(parquet)["response"].to_pylist()
    strip = re.compile("|".join(map(re.escape, [*TAGS, "<|user|>", "<|assistant|>"])))
    assert responses["true"] != responses["false"] == [strip.sub("", text) for text in responses["true"]]
    assert not any("<|end|>" in text or "<|pad|>" in text for text in responses["true"])
