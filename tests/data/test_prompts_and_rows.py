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
from hybridflow.config.sections import PromptDataSection
from hybridflow.data.prompts import load_prompts
from hybridflow.data.rows import column, fingerprint_rows, read_rows
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
        ("rows.csv", "a,b", "unknown ending '.csv'"),
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


def test_a_fingerprint_tells_data_sets_apart() -> None:
    assert fingerprint_rows(ROWS) == fingerprint_rows([dict(reversed(r.items())) for r in ROWS])
    others = [ROWS[::-1], ROWS[:1], [*ROWS, ROWS[0]], [ROWS[0], {**ROWS[1], "prompt": "o"}]]
    assert len({fingerprint_rows(rows) for rows in [ROWS, *others]}) == 5


def prompts(tokenizer: PreTrainedTokenizerBase, rows: list[Any], folder: Path, **values: Any) -> Any:
    section = PromptDataSection(**{"ground_truth_key": "truth.value", "max_prompt_tokens": 8, **values})
    return load_prompts(jsonl(folder, rows), section, tokenizer, seed=0)


def test_a_prompt_has_what_generation_and_rewards_need(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = [ROWS[0], {"prompt": [{"role": "user", "content": "2"}], "truth": {"value": 5}, "data_source": "mine"}]
    found = prompts(tokenizer, rows, tmp_path)
    assert len(found) == 2
    assert found[0].text == "<|user|>1+1=<|end|><|assistant|>" == tokenizer.decode(found[0].token_ids)
    assert found[0].messages == [{"role": "user", "content": "1+1="}]
    assert (found[0].ground_truth, found[0].row, found[0].data_source) == (2, rows[0], "data")
    assert (found[1].text, found[1].ground_truth, found[1].data_source) == ("<|user|>2<|end|><|assistant|>", 5, "mine")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"promt": "1", "truth": {"value": 1}}, r"row 1 of .* has no column 'prompt'"),
        ({"prompt": "1", "truth": 3}, r"row 1 of .* has no column 'truth\.value'"),
        ({"prompt": 7, "truth": {"value": 1}}, "prompt of row 1 of .* is a int"),
        ({"prompt": [], "truth": {"value": 1}}, "prompt of row 1 of .* is a list"),
        ({"prompt": "123456", "truth": {"value": 1}}, "row 1 of .* has 9 tokens, data.max_prompt_tokens is 8"),
    ],
)
def test_a_row_that_is_no_prompt_is_named(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    found = prompts(tokenizer, [ROWS[0], row], tmp_path)
    with pytest.raises(UserError, match=message):
        found[1]


def test_a_tokenizer_without_template_is_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        prompts(tokenizer, ROWS, tmp_path)
