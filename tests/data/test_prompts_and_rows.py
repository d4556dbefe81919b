"""Rows from files and functions, prompts from rows; every mistake names its row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerBase

from hybridflow.config.locate import load_function
from hybridflow.config.sections.data import PromptDataSection
from hybridflow.data.prompts import load_prompts
from hybridflow.data.rows import column, read_rows
from hybridflow.data.sources import read_sources
from hybridflow.errors import UserError

from tiny import CARRY

ROWS = [{"prompt": "1+1=", "truth": {"value": 2}}, {"prompt": "ö", "truth": {"value": 3}}]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return load_function(f"{CARRY}:make_tokenizer")()


def jsonl(folder: Path, rows: list[Any]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in rows) + "\n\n")
    return str(path)


def test_jsonl_parquet_and_functions_give_the_same_rows(tmp_path: Path) -> None:
    assert read_rows(jsonl(tmp_path, ROWS)) == ROWS
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    assert read_rows(str(tmp_path / "rows.parquet")) == ROWS
    (tmp_path / "mine.py").write_text(f"def rows(): return iter({ROWS!r})\ndef seeded(seed): return [dict(s=seed)]\n")
    assert read_rows(f"{tmp_path}/mine.py:rows", seed=4) == ROWS
    assert read_rows(f"{tmp_path}/mine.py:seeded", seed=4) == [{"s": 4}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.jsonl", None, "no data file"),
        ("rows.txt", "a,b", "unknown ending '.txt'"),
        ("rows.jsonl", "", "has no rows"),
        ("rows.jsonl", '{"a": 1}\n\n{"a": \n', "line 3 of .*rows.jsonl is not JSON"),
        ("rows.jsonl", '{"a": 1}\n[1]\n', "row 1 of .*rows.jsonl is a list"),
        ("rows.py:rows", "rows = 3", "has no function 'rows'"),
        ("rows.py:rows", "def rows(): return [{}, 'x']", "row 1 of .* is a str"),
        ("rows.py:rows", "import nothing_of_this_name", "cannot be imported .*ModuleNotFoundError"),
        ("gone.py:rows", None, "no file .*gone.py"),
    ],
)
def test_sources_that_cannot_be_read_are_named(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name.partition(":")[0]).write_text(content)
    with pytest.raises(UserError, match=message):
        read_rows(str(tmp_path / name))


def test_a_column_may_lie_inside_another_and_a_missing_one_names_the_nearest() -> None:
    assert column(ROWS[1], "truth.value", source="mine", index=1) == 3
    with pytest.raises(UserError, match="row 1 of mine has no column 'promt'") as caught:
        column(ROWS[1], "promt", source="mine", index=1)
    assert caught.value.fix == "did you mean 'prompt'?"
    with pytest.raises(UserError, match=r"row 0 of mine has no column 'truth\.valeu'") as caught:
        column(ROWS[0], "truth.valeu", source="mine", index=0)
    assert caught.value.fix == "did you mean 'value'?"
    with pytest.raises(UserError, match=r"no column 'prompt\.text'"):
        column(ROWS[0], "prompt.text", source="mine", index=0)


def test_a_fingerprint_tells_data_sets_apart(tmp_path: Path) -> None:
    def fingerprint(rows: list[Any]) -> str:
        return read_sources(jsonl(tmp_path, rows), seed=0).fingerprint()

    assert fingerprint(ROWS) == fingerprint([dict(reversed(r.items())) for r in ROWS])
    others = [ROWS[::-1], ROWS[:1], [*ROWS, ROWS[0]], [ROWS[0], {**ROWS[1], "prompt": "o"}]]
    assert len({fingerprint(rows) for rows in [ROWS, *others]}) == 5


def prompts(tokenizer: PreTrainedTokenizerBase, rows: list[Any], folder: Path, **values: Any) -> Any:
    section = PromptDataSection(**{"ground_truth_key": "truth.value", "max_prompt_tokens": 8, **values})
    return load_prompts(jsonl(folder, rows), section, tokenizer, seed=0)


def test_a_prompt_has_what_generation_and_rewards_need(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = [ROWS[0], {"prompt": "2", "truth": {"value": 5}, "data_source": "mine"}]
    found = prompts(tokenizer, rows, tmp_path)
    assert len(found) == 2
    chat = [{"prompt": [{"role": "user", "content": "2"}], "truth": {"value": 5}}]
    assert prompts(tokenizer, chat, tmp_path)[0].token_ids == found[1].token_ids
    assert found[0].text == "<|user|>1+1=<|end|><|assistant|>" == tokenizer.decode(found[0].token_ids)
    assert found[0].messages == [{"role": "user", "content": "1+1="}]
    assert (found[0].ground_truth, found[0].row, found[0].data_source) == (2, rows[0], "data")
    assert (found[1].text, found[1].ground_truth, found[1].data_source) == ("<|user|>2<|end|><|assistant|>", 5, "mine")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"promt": "1", "truth": {"value": 1}}, r"row 1 of .* has no column 'prompt', row 0 and 1 others have it"),
        ({"prompt": "1", "truth": {"valeu": 1}}, r"row 1 of .* has no column 'truth\.value', row 0 and 1 others have"),
        ({"prompt": "1", "truth": 3}, r"row 1 of .* has no column 'truth\.value', row 0 and 1 others have it"),
        ({"prompt": 7, "truth": {"value": 1}}, "prompt of row 1 of .* is a number, in row 0 and 1 others it is a stri"),
        ({"prompt": [], "truth": {"value": 1}}, "prompt of row 1 of .* is a list, in row 0 and 1 others it is a str"),
        ({"prompt": "1", "truth": {"value": "1"}}, r"truth.value of row 1 of .* is a string, in row 0 and 1 others"),
        ({"prompt": "1", "truth": {"value": None}}, r"truth.value of row 1 of .* is null, in row 0 and 1 others"),
    ],
)
def test_a_row_unlike_the_others_is_named(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        prompts(tokenizer, [ROWS[0], row, ROWS[1]], tmp_path)


def test_numbers_are_of_one_kind_and_other_columns_may_be_uneven(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = [*ROWS, {"prompt": "3", "truth": {"value": 2.5}, "level": 3}]
    found = prompts(tokenizer, rows, tmp_path)
    assert found[2].ground_truth == 2.5
    assert found.data.advice() == [f"2 of 3 rows of {tmp_path / 'rows.jsonl'} lack the column 'level'"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": 7, "truth": {"value": 1}}, "prompt of row 0 of .* is a number, not a string or a list of chat"),
        ({"prompt": [], "truth": {"value": 1}}, "prompt of row 0 of .* is an empty list; so is 1 other row"),
        ({"prompt": ["1"], "truth": {"value": 1}}, r"has a message that is a string, not an object \(message 0\)"),
        ({"prompt": "123456", "truth": {"value": 1}}, "row 1 of .* has 9 tokens, data.max_prompt_tokens is 8"),
    ],
)
def test_a_row_that_is_no_prompt_is_named(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        prompts(tokenizer, [row, row], tmp_path)[1]


def test_a_tokenizer_without_template_is_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        prompts(tokenizer, ROWS, tmp_path)


# --- verl's rows, plain text, several sources, prompts that are too long ---

VERL = {
    "data_source": "openai/gsm8k",
    "prompt": [{"role": "user", "content": "1+1"}],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "2"},
    "extra_info": {"split": "train", "index": 0},
}


def test_rows_of_verl_are_taken_as_they_are(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([VERL, VERL]), tmp_path / "rows.parquet")
    found = load_prompts(str(tmp_path / "rows.parquet"), PromptDataSection(), tokenizer, seed=0)
    assert (found[1].ground_truth, found[1].data_source, found[1].row) == ("2", "openai/gsm8k", VERL)
    assert found[1].text == "<|user|>1+1<|end|><|assistant|>"


def test_plain_text_prompts_need_no_template(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    tokenizer.chat_template = None
    found = prompts(tokenizer, ROWS[:1], tmp_path, format="text")
    assert (found[0].text, tokenizer.decode(found[0].token_ids)) == ("1+1=", "1+1=")
    with pytest.raises(UserError, match=r"prompt of row 1 of .* is empty"):
        prompts(tokenizer, [ROWS[0], {**ROWS[0], "prompt": ""}], tmp_path, format="text")[1]
    chat = [{"prompt": [{"role": "user", "content": "1"}], "truth": {"value": 1}}]
    with pytest.raises(UserError, match=r"is a list, not a string \(data.format is text\)"):
        prompts(tokenizer, chat, tmp_path, format="text")[0]


def several(folder: Path, tokenizer: PreTrainedTokenizerBase, *weights: float | None, **values: Any) -> Any:
    """Two sources: a.jsonl with prompts 0 .. 5, b.jsonl with prompts 6 .. 9."""
    entries = []
    for name, part, weight in zip("ab", (range(6), range(6, 10)), weights):
        rows = [{"prompt": str(i), "ground_truth": str(i)} for i in part]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        entries.append({"source": str(folder / f"{name}.jsonl"), "weight": weight})
    config = PromptDataSection(train=entries, **values)
    return load_prompts(config.train, config, tokenizer, seed=0)


def test_several_sources_are_one_set_that_knows_where_its_rows_came_from(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    found = several(tmp_path, tokenizer, None, None)
    assert [p.ground_truth for p in found] == list("0123456789")
    assert found.data.place(5) == (str(tmp_path / "a.jsonl"), 5)
    assert found.data.place(6) == (str(tmp_path / "b.jsonl"), 0)
    assert sorted(row for _, row in found.sampler(seed=1).take(10)) == list(range(10))
    prints = {several(tmp_path, tokenizer, *w).fingerprint for w in [(None, None), (1, 2), (2, 1)]}
    assert len(prints) == 3
    with pytest.raises(UserError, match=r"row 3 of .*b.jsonl has 4 tokens, data.max_prompt_tokens is 3"):
        several(tmp_path, tokenizer, None, None, max_prompt_tokens=3)[9]


def test_weights_are_shares_of_the_draws(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    found = several(tmp_path, tokenizer, 3, None)
    drawn = [found[row].ground_truth for _, row in found.sampler(seed=1).take(400)]
    assert abs(sum(truth < "6" for truth in drawn) - 300) <= 2


def test_an_order_of_ones_own_is_used_and_checked(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    (tmp_path / "order.py").write_text(
        "def falling(rows, epoch):\n"
        "    return sorted(range(len(rows)), key=lambda i: rows[i]['prompt'], reverse=not epoch)\n"
        "def some(rows): return [0, 1]\n"
        "def broken(rows): return 1 / 0\n"
        "def strange(rows, difficulty): return []\n"
    )
    found = several(tmp_path, tokenizer, None, None, order=f"{tmp_path}/order.py:falling")
    drawn = "".join(found[row].ground_truth for _, row in found.sampler(seed=1).take(20))
    assert drawn == "98765432100123456789"
    apart = several(tmp_path, tokenizer, 1, 1, order=f"{tmp_path}/order.py:falling")
    drawn = "".join(apart[row].ground_truth for _, row in apart.sampler(seed=1).take(20))
    assert "".join(d for d in drawn if d < "6").startswith("543210012")
    for name, message in [
        ("some", "returned 2 places that are not an order of 10 rows"),
        ("broken", "raised ZeroDivisionError"),
        ("strange", "asks for 'difficulty'"),
        ("gone", "has no function 'gone'"),
    ]:
        with pytest.raises(UserError, match=message):
            several(tmp_path, tokenizer, None, None, order=f"{tmp_path}/order.py:{name}").sampler(seed=1).take(1)


def test_long_prompts_are_left_out_or_cut_at_their_beginning(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = [{"prompt": p, "truth": {"value": 1}} for p in ("12345", "123456", "1", "1234567")]
    left = prompts(tokenizer, rows, tmp_path, over_long="filter")
    assert [left[i].row for i in range(len(left))] == [rows[0], rows[2]]
    assert (left.over_long, left.notes()) == (2, ["prompts of more than 8 tokens, left out: 2"])
    assert left.data.place(1)[1] == 2  # its number in the file, for messages
    cut = prompts(tokenizer, rows, tmp_path, over_long="truncate")
    assert len(cut) == 4 and cut[1].text == "123456<|end|><|assistant|>" and len(cut[3].token_ids) == 8
    assert (cut.over_long, cut.notes()) == (2, ["prompts of more than 8 tokens, cut at their beginning: 2"])
    assert left.fingerprint != cut.fingerprint
    with pytest.raises(UserError, match=r"all rows of .* are too long"):
        prompts(tokenizer, rows, tmp_path, over_long="filter", max_prompt_tokens=3)


def test_measuring_agrees_with_rendering(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = [{"prompt": "7" * (i % 5 + 1), "truth": {"value": 1}} for i in range(2100)]  # over two batches
    found = prompts(tokenizer, rows, tmp_path)
    assert list(found.measure()) == [(p.text, len(p.token_ids)) for p in found]
    assert list(found.measure(7)) == list(found.measure())[:7]


@pytest.mark.parametrize(
    ("row", "setting", "told"),
    [
        ({"chosen": "3", "rejected": "4"}, "data.prompt_key", "hybridflow reward-model trains on them"),
        ({"prompt": "1+2=", "chosen": "3", "rejected": "4"}, "data.ground_truth_key", "hybridflow reward-model"),
        ({"prompt": "1+2=", "chosen": "3", "rejected": "4"}, "data.messages_key", "hybridflow reward-model"),
        ({"messages": []}, "data.prompt_key", "hybridflow sft trains on them"),
        ({"prompt": "1+2=", "completion": "3"}, "data.ground_truth_key", "set data.ground_truth_key=completion"),
        ({"prompt": "1+2=", "completion": "3"}, "data.messages_key", "data.prompt_key=prompt data.response_key="),
        ({"text": "1+2=3"}, "data.messages_key", "set data.format=text"),
        ({"prompt": "1+2=", "solution": "3"}, "data.ground_truth_key", "set data.ground_truth_key=solution"),
    ],
)
def test_rows_of_the_forms_that_trl_has_are_told_where_they_belong(row: Any, setting: str, told: str) -> None:
    key = setting.removeprefix("data.").removesuffix("_key")
    with pytest.raises(UserError) as caught:
        column(row, key, source="rows.jsonl", index=0, setting=setting)
    assert told in caught.value.fix
