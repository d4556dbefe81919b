"""Files of rows: JSON lines, a JSON list, CSV, TSV and Parquet, plain or gzipped, to dicts."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hybridflow.errors import UserError

LINES = (".jsonl", ".json", ".ndjson")
SEPARATORS = {".csv": ",", ".tsv": "\t"}
ENDINGS = (*LINES, ".parquet", *SEPARATORS)
_USE = "use .jsonl, .json, .csv, .tsv or .parquet"
# UTF-32 first: its mark begins with that of UTF-16.
_MARKS = {
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
    b"\xef\xbb\xbf": "utf-8-sig",
}
# Other formats that occur under the ending of a text file, by their first bytes.
_OTHERS = {
    b"PK\x03\x04": "a ZIP archive",
    b"\x28\xb5\x2f\xfd": "packed with Zstandard",
    b"BZh": "packed with bzip2",
    b"\xfd7zXZ": "packed with xz",
}
_LFS = b"version https://git-lfs"  # the beginning of the file that Git LFS leaves in the place of a large one


def ending(path: Path) -> str:
    """Returns the ending of a file's name, in lower case and without .gz."""
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def read_file(path: Path) -> list[Any]:
    """Reads all rows of a file; the ending of its name decides the format.

    Raises:
        UserError: there is no such file, or it is something else.
    """
    if path.is_dir():
        inside = [p.name for p in sorted(path.iterdir()) if ending(p) in ENDINGS]
        raise UserError(
            f"{path} is a folder, not a data file",
            why="the files of a folder are often splits of which only one should be read",
            fix=f"name a file in it: {', '.join(inside[:8])}" if inside else "name a .jsonl or .parquet file",
        )
    if not path.is_file():
        raise UserError(
            f"no data file {path}", fix="give a .jsonl or .parquet file, file.py:function, or org/name on the hub"
        )
    kind = ending(path)
    if kind not in ENDINGS:
        raise UserError(f"{path} has an unknown ending {kind!r}", fix=_USE)
    content = _bytes(path)
    packed = next((what for mark, what in _OTHERS.items() if content.startswith(mark)), None)
    if packed is not None:
        raise UserError(f"{path} is {packed}", fix="unpack it first; of packed files .gz alone is read")
    if content.startswith(_LFS):
        raise UserError(f"{path} is a pointer of Git LFS, not the file itself", fix=f"git lfs pull -I {path.name}")
    if (kind == ".parquet") != content.startswith(b"PAR1"):
        found = "a Parquet file" if kind != ".parquet" else "no Parquet file"
        looks = "" if kind != ".parquet" else ": it does not begin with PAR1" + " (it is empty)" * (not content)
        if content or kind == ".parquet":
            raise UserError(f"{path} is {found}{looks}", fix=f"give it the ending of what it is; {_USE}")
    if kind == ".parquet":
        try:
            rows: list[Any] = pq.read_table(pa.BufferReader(content)).to_pylist()
        except (pa.ArrowException, OSError, ValueError) as error:
            raise UserError(
                f"{path} is not a whole Parquet file: {error}", fix="write or copy it again: it may have been cut short"
            ) from error
        return rows
    text = _text(path, content)
    return _read_table(path, text, SEPARATORS[kind]) if kind in SEPARATORS else _read_json(path, text)


def _bytes(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}", fix="check its permissions, or write it again") from error


def _text(path: Path, content: bytes) -> str:
    """Returns a file's text: UTF-8, or the encoding that its byte order mark names.

    Raises:
        UserError: it is in another encoding.
    """
    encoding = next((name for mark, name in _MARKS.items() if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        if encoding in ("utf-16", "utf-32"):
            raise UserError(
                f"{path} is not {encoding.upper()} throughout: {error.reason} in byte {error.start}",
                why="its first bytes say that it is; it is damaged, or was cut short",
                fix="write or copy it again, or convert it to UTF-8",
            ) from error
        likely = _wide(content) if b"\x00" in content[:200] else "latin-1 or windows-1252"
        raise UserError(
            f"{path} is not {encoding.removesuffix('-sig').upper()}: byte 0x{content[error.start]:02x} in line {line}",
            why=f"text is read as UTF-8; this may be {likely}, or the file is damaged",
            fix=f"convert it: iconv -f {likely.split()[0].upper()} -t UTF-8 {path.name} > converted{ending(path)}",
        ) from error
    if encoding == "utf-8" and "\x00" in text[:200]:
        raise UserError(
            f"{path} has zero bytes at its beginning",
            why="it is no text in UTF-8; UTF-16 without a mark looks like this",
            fix=f"convert it: iconv -f {_wide(content).upper()} -t UTF-8 {path.name} > converted{ending(path)}",
        )
    return text


def _wide(content: bytes) -> str:
    """Guesses the encoding of several bytes for each character that a text without a byte order mark has."""
    width = "utf-32" if b"\0\0\0" in content[:8] else "utf-16"
    return width + ("be" if content.startswith(b"\0") else "le")


def _read_json(path: Path, text: str) -> list[Any]:
    """Reads one list of rows, one row over several lines, or one row per line."""
    try:
        whole = json.loads(text)  # of one row per line it reads no more than the first
    except (ValueError, RecursionError) as error:
        whole, problem = None, error
    if isinstance(whole, list):
        return whole
    if isinstance(whole, dict):
        _require_row(path, whole)
        return [whole]
    rows = []
    lines = text.split("\n")  # not splitlines: JSON's strings may hold other line ends as they are
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                rows.append(json.loads(line.lstrip("\ufeff")))  # files with marks, one after the other
            except (ValueError, RecursionError) as error:
                if not rows and line.lstrip().startswith("["):
                    raise UserError(f"{path} is not JSON: {problem}", fix=_json_fix(text)) from error
                cut = rows and not any(rest.strip() for rest in lines[number:])
                raise UserError(
                    f"line {number} of {path} is not JSON: {error}",
                    why="it is the last line: the file may have been cut short" if cut else "",
                    fix=_json_fix(line),
                ) from error
    return rows


def _json_fix(text: str) -> str:
    end = text.rstrip()
    if end.endswith(","):
        return "leave out the comma at its end: each line is an object of its own"
    if "".join(end[-20:].split()).endswith((",]", ",}")):
        return "leave out the comma before the last bracket"
    if "'" in text and '"' not in text:
        return "write JSON, with double quotes: json.dumps(row), not str(row)"
    return "write one JSON object per line, or one JSON list"


_TURN = {"role", "from", "content", "value"}
_WRAPPERS = {"data", "rows", "examples", "instances", "items", "records", "results", "samples", "train", "test"}


def _require_row(path: Path, whole: dict[str, Any]) -> None:
    """Checks that one object is a row, not an object around a list of rows.

    Raises:
        UserError: it is such a thing.
    """
    for key, value in whole.items():
        inside = value if isinstance(value, list) and (key in _WRAPPERS or len(whole) == 1) else []
        if inside and all(isinstance(v, dict) and not _TURN & set(v) for v in inside):
            raise UserError(
                f"{path} is one object, and its rows seem to be the list under {key!r}",
                why="a file is a list of rows, or has one row per line",
                fix=f"take the list out: jq -c '.{key}[]' {path.name} > only-rows.jsonl",
            )


def _read_table(path: Path, text: str, separator: str) -> list[dict[str, str]]:
    """Reads the rows of a text table whose first line names the columns; all values are strings.

    Raises:
        UserError: a row has other fields than the first line names, or names are missing or doubled.
    """
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    rows: list[dict[str, str]] = []
    try:
        filled = (fields for fields in reader if fields)
        names = next(filled, [])
        other = next((s for s in ";\t,|" if s != separator and len(names) == 1 and s in names[0]), None)
        if other is not None:
            raise UserError(
                f"the columns of {path} are separated by {other!r}, not by {separator!r}",
                fix="save it with commas as .csv, or with tabs as .tsv",
            )
        odd = next((name for name, n in Counter(names).items() if n > 1 or not name.strip()), None)
        if odd is not None:
            raise UserError(
                f"the first line of {path} has {'two columns' if odd.strip() else 'a column'} named {odd!r}",
                fix="begin the file with one line of names, each once",
            )
        for number, fields in enumerate(filled):
            if len(fields) != len(names):
                raise UserError(
                    f"row {number} of {path} (line {reader.line_num}) has {len(fields)} fields, the first line names "
                    f"{len(names)}",
                    fix="put a field that holds the separator, a quote or a line end in double quotes",
                )
            rows.append(dict(zip(names, fields)))
    except csv.Error as error:
        raise UserError(
            f"line {reader.line_num} of {path} is no row of a table: {error}",
            fix="close every double quote, and double those inside a field",
        ) from error
    return rows
