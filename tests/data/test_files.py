"""Files as people have them: encodings, line ends, endings, tables; what cannot be read names the mend."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hybridflow.config.sections.data import PromptDataSection, SftDataSection
from hybridflow.data.prompts import load_prompts
from hybridflow.data.rows import read_rows
from hybridflow.data.sft import load_sft
from hybridflow.errors import UserError

from preferences import tokenizer

ROWS: list[dict[str, Any]] = [{"q": "caf\u00e9 \u2028 1+1=", "a": "2"}, {"q": 'so, "x"\nand y', "a": "\U0001f600"}]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
TABLE = 'q,a\n"caf\u00e9 \u2028 1+1=",2\n"so, ""x""\nand y",\U0001f600\n'


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "marked"])
@pytest.mark.parametrize("zipped", [False, True], ids=["", "gz"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rows.jsonl", LINES),
        ("rows.jsonl", "\n\n" + LINES.replace("\n", "\r\n\r\n") + "\r\n  \r\n"),
        ("rows.ndjson", LINES),
        ("ROWS.JSONL", LINES),
        ("rows.json", LINES),
        ("rows.json", json.dumps(ROWS)),
        ("rows.json", "\n \r\n" + json.dumps(ROWS, indent=1)),
        ("rows.jsonl", json.dumps(ROWS, indent=2)),
        ("rows.csv", TABLE),
        ("rows.csv", "\n" + TABLE.replace("\n", "\r\n").replace('""\r\n', '""\n')),
        ("rows.tsv", TABLE.replace("q,a", "q\ta").replace('=",', '="\t').replace('y",', 'y"\t')),
    ],
)
def test_a_file_in_any_usual_form_has_the_same_rows(
    tmp_path: Path, name: str, text: str, zipped: bool, mark: str
) -> None:
    path = tmp_path / (name + ".gz" * zipped)
    for encoding in ("utf-8", "utf-16-le", "utf-16-be", "utf-32-le") if mark else ("utf-8",):
        content = (mark + text).encode(encoding)
        path.write_bytes(gzip.compress(content, mtime=0) if zipped else content)
        assert read_rows(str(path)) == ROWS, encoding


def test_one_object_over_several_lines_is_one_row(tmp_path: Path) -> None:
    # A list of objects in it is a column, not what the rows stand in.
    for more in ({}, {"tools": [{"type": "function"}]}, {"ground_truth": [{"x": 1}], "prompt": [{"speaker": "user"}]}):
        row = {"messages": [{"role": "user", "content": "1"}], **more}
        (tmp_path / "one.json").write_text(json.dumps(row, indent=2))
        assert read_rows(str(tmp_path / "one.json")) == [row]
    (tmp_path / "joined.jsonl").write_text('\ufeff{"q": 1}\n\ufeff{"q": 2}\n')
    assert read_rows(str(tmp_path / "joined.jsonl")) == [{"q": 1}, {"q": 2}]


@pytest.mark.parametrize(
    ("name", "content", "said", "fix"),
    [
        ("r.jsonl", LINES.encode("latin-1", "replace"), "is not UTF-8: byte 0xe9 in line 1", "iconv -f LATIN-1"),
        ("r.csv", "q,a\nna\u00efve,1\n".encode("cp1252"), "is not UTF-8: byte 0xef in line 2", "iconv -f LATIN-1"),
        ("r.jsonl", '{"q": "1"}'.encode("utf-16-le"), "has zero bytes", "iconv -f UTF-16LE"),
        ("r.jsonl", '{"q": "1"}'.encode("utf-16-be"), "has zero bytes", "iconv -f UTF-16BE"),
        ("r.jsonl", '{"q": "\u00e9"}'.encode("utf-32-le"), "is not UTF-8", "iconv -f UTF-32LE"),
        ("r.jsonl", "\ufeff".encode("utf-16-le") + b"{\x00\xd8", "is not UTF-16", "convert it"),
        ("r.jsonl", b"PK\x03\x04\x00", "is a ZIP archive", "unpack it"),
        ("r.jsonl", b"\x28\xb5\x2f\xfd\x00", "is packed with Zstandard", "unpack it"),
        ("r.csv", "version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS", "git lfs pull"),
        ("r.jsonl", '{"q": 1},\n{"q": 2},\n', "line 1 of", "leave out the comma at its end"),
        ("r.json", '[{"q": 1}, {"q": 2},]', "is not JSON", "comma before the last bracket"),
        ("r.json", '[{"q": 1},\n {"q": 2}\n', "is not JSON", "one JSON list"),
        ("r.jsonl", '{"q": 1}\n{"q": 2}\n{"q": "thr', "line 3 of", "one JSON object per line"),
        ("r.jsonl", "{'q': 1}\n{'q': 2}\n", "line 1 of", "json.dumps(row)"),
        ("r.json", '{"data": [{"q": 1}]}', "its rows seem to be the list under 'data'", "jq -c '.data[]' r.json"),
        ("r.json", "3", "row 0 of", ""),
        ("r.json", '["a"]', "row 0 of", ""),
        ("r.jsonl", "", "has no rows", ""),
        ("r.jsonl", " \n\r\n", "has no rows", ""),
        ("r.json", "[]", "has no rows", ""),
        ("r.csv", "", "has no rows", ""),
        ("r.csv", "q,a\n", "has no rows", ""),
        ("r.csv", "q;a\n1;2\n", "are separated by ';'", "save it with commas"),
        ("r.csv", "q\ta\n1\t2\n", "are separated by '\\t'", "save it with commas"),
        ("r.csv", "q,a\n1,2\n1+1, or so,2\n", "row 1 of", "in double quotes"),
        ("r.csv", "q,a\n1\n", "has 1 fields, the first line names 2", "in double quotes"),
        ("r.csv", "q,q\n1,2\n", "has two columns named 'q'", "each once"),
        ("r.csv", "q,\n1,2\n", "has a column named ''", "each once"),
        ("r.csv", 'q,a\n"1,2\n', "is no row of a table", "close every double quote"),
        ("r.parquet", '{"q": 1}', "is no Parquet file", "the ending of what it is"),
        ("r.parquet", "", "(it is empty)", "the ending of what it is"),
        ("r.parquet", b"PAR1 cut", "is not a whole Parquet file", "copy it again"),
        ("r.jsonl", b"PAR1 whole", "is a Parquet file", "the ending of what it is"),
        ("r.jsonl.gz", gzip.compress(b'{"q": 1}', mtime=0)[:-9], "cannot be read", "write it again"),
        ("r.txt", "1+1=", "unknown ending '.txt'", "use .jsonl, .json, .csv, .tsv or .parquet"),
    ],
)
def test_a_file_that_cannot_be_read_says_why_and_what_to_do(
    tmp_path: Path, name: str, content: str | bytes, said: str, fix: str
) -> None:
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError) as caught:
        read_rows(str(tmp_path / name))
    assert said in caught.value.what and name in caught.value.what and fix in caught.value.fix


def test_lists_of_objects_from_parquet_and_numpy_values_from_functions_are_plain(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    pq.write_table(pa.Table.from_pylist([{"messages": talk}]), tmp_path / "rows.parquet")
    (tmp_path / "mine.py").write_text(
        "import numpy as np\n"
        f"def rows(): return [dict(messages=np.array({talk}, dtype=object), n=np.int64(3), x=np.float32(0.5))]\n"
    )
    assert read_rows(str(tmp_path / "rows.parquet")) == [{"messages": talk}]
    [row] = read_rows(f"{tmp_path}/mine.py:rows")
    assert (
        row == {"messages": talk, "n": 3, "x": 0.5} and type(row["n"]) is int and not isinstance(row["x"], np.generic)
    )


@pytest.mark.parametrize(
    ("columns", "keys", "setting"),
    [
        (["prompt", "solution"], {}, "data.ground_truth_key=solution"),
        (["prompt", "answer"], {}, "data.ground_truth_key=answer"),
        (["question", "ground_truth"], {}, "data.prompt_key=question"),
        (["problem", "ground_truth"], {}, "data.prompt_key=problem"),
        (["instruction", "ground_truth", "input"], {}, "data.prompt_key=instruction"),
        (["prompts", "ground_truth"], {}, "data.prompt_key=prompts"),
        (["prompt", "output"], {"prompt_key": "prompt", "response_key": "response"}, "data.response_key=output"),
        (
            ["prompt", "completion"],
            {"prompt_key": "prompt", "response_key": "response"},
            "data.response_key=completion",
        ),
        (["dialogue"], {"messages_key": "messages"}, "data.messages_key=dialogue"),
        (
            ["instruction", "input", "output"],
            {"messages_key": "messages"},
            "data.prompt_key=instruction data.response_key",
        ),
        (["content"], {"format": "text"}, "data.text_key=content"),
    ],
)
def test_a_missing_column_names_the_setting_that_takes_what_is_there(
    tmp_path: Path, columns: list[str], keys: dict[str, str], setting: str
) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(",".join(columns) + "\n" + ",".join("1" for _ in columns) + "\n")
    sft, rl = SftDataSection(train=str(path), **keys), PromptDataSection()
    with pytest.raises(UserError, match=r"row 0 of .* has no column") as caught:
        load_sft(sft, tokenizer(), seed=0) if keys else load_prompts(str(path), rl, tokenizer(), seed=0)
    assert f"set {setting}" in caught.value.fix
