"""rollouts/*.parquet and evaluations/*.parquet: responses with tokens, log-probabilities, reward, advantage."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("draw", pa.int64()),
        ("sample", pa.int64()),
        ("data_source", pa.string()),
        ("prompt", pa.string()),
        ("response", pa.string()),
        ("reward", pa.float64()),
        ("advantage", pa.float64()),
        ("finish_reason", pa.string()),
        ("ground_truth", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("tokens", pa.list_(pa.string())),
        ("logps", pa.list_(pa.float32())),
    ]
)
# An evaluation also keeps what pairs it with another model's, whatever their chat templates, and its votes for maj@k.
EVALUATION = SCHEMA.append(pa.field("question", pa.string())).append(pa.field("vote", pa.string()))


def write_rollouts(path: Path, rows: Sequence[dict[str, Any]], schema: pa.Schema = SCHEMA) -> None:
    """Writes responses, one row each, as a parquet file that is there whole or not at all.

    Args:
        path: the file; its folder is made if absent.
        rows: a value for every column of the schema; ``advantage`` may be None (an evaluation has none).
        schema: `SCHEMA`, or `EVALUATION`.

    Raises:
        KeyError: a row lacks a column.
    """
    columns = [pa.array([_clean(row[field.name]) for row in rows], type=field.type) for field in schema]
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial")
    pq.write_table(pa.table(columns, schema=schema), aside, compression="zstd")
    os.replace(aside, path)


def read_rollouts(path: Path) -> list[dict[str, Any]]:
    """Reads the responses in a file of `write_rollouts`, as they were given."""
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows


def _clean(value: Any) -> Any:
    """Replaces lone surrogates (JSON data can hold them), which have no UTF-8, by a question mark: they must not end
    the run.
    """
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    return value
