"""rollouts/*.parquet and evaluations/*.parquet: responses with tokens, log-probabilities, reward, advantage.

A response is one row; a trajectory of several sequences has a row for each. They share ``draw``, ``sample``,
``response``, ``reward`` and ``finish_reason``, and ``sequence`` numbers them. ``token_ids``, ``tokens`` and ``logps``
are of the tokens behind the sequence's prompt: those that the model sampled, in ``turns``, and those that it was shown
in between, whose log-probability is 0. Where the model acted, ``messages`` of a trajectory's first row is the whole
conversation as JSON, with calls and results of tools.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hybridflow.protocols.groups import TokenSequence, Trajectory

TURN = pa.struct(
    [
        ("start", pa.int32()),
        ("end", pa.int32()),
        ("finish_reason", pa.string()),
        ("reward", pa.float64()),
        ("anchor", pa.int64()),
    ]
)
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
        ("sequence", pa.int64()),
        ("turns", pa.list_(TURN)),
        ("fork", pa.string()),
        ("messages", pa.string()),
    ]
)
ONE_TURN = {"sequence": 0, "turns": None, "fork": "", "messages": None}  # of a row that leaves them out
# An evaluation also keeps what pairs it with another model's, whatever their chat templates, and its votes for maj@k.
EVALUATION = SCHEMA.append(pa.field("question", pa.string())).append(pa.field("vote", pa.string()))


def write_rollouts(path: Path, rows: Sequence[dict[str, Any]], schema: pa.Schema = SCHEMA) -> None:
    """Writes sequences, one row each, as a parquet file that is there whole or not at all.

    Args:
        path: the file; its folder is made if absent.
        rows: a value for every column of the schema; ``advantage`` may be None (an evaluation has none), and
            those of `ONE_TURN` may lack.
        schema: `SCHEMA`, or `EVALUATION`.

    Raises:
        KeyError: a row lacks a column.
    """
    rows = [ONE_TURN | row for row in rows]
    columns = [pa.array([_clean(row[field.name]) for row in rows], type=field.type) for field in schema]
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial")
    pq.write_table(pa.table(columns, schema=schema), aside, compression="zstd")
    os.replace(aside, path)


def read_rollouts(path: Path) -> list[dict[str, Any]]:
    """Reads the rows of a file of `write_rollouts`, as they were given; a file from before there were sequences has
    the values of `ONE_TURN`.
    """
    return [ONE_TURN | row for row in pq.read_table(path).to_pylist()]


def sequence_columns(t: Trajectory) -> list[dict[str, Any]]:
    """Returns for each sequence of a trajectory the columns that are its own, but for ``prompt`` and ``tokens``.

    One that ended before its first turn has a row too, without tokens. ``prompt_ids``, which is not written, is what
    the sequence began with.
    """
    return [
        {
            "prompt_ids": s.prompt_ids,
            "token_ids": s.token_ids,
            "logps": s.logps,
            "sequence": number,
            "turns": [{f.name: getattr(turn, f.name) for f in fields(turn)} for turn in s.turns],
            "fork": s.fork,
            "messages": json.dumps(t.messages, ensure_ascii=False, default=str) if t.messages and not number else None,
        }
        for number, s in enumerate(t.sequences or [TokenSequence([], [], [], [], [])])
    ]


def _clean(value: Any) -> Any:
    """Replaces lone surrogates (JSON data can hold them), which have no UTF-8, by a question mark: they must not end
    the run.
    """
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    return value
