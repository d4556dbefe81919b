"""Rollouts on disk: what is written is read."""

import json
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from hybridflow.protocols.groups import TokenSequence, Trajectory, Turn
from hybridflow.tracking.rollouts import ONE_TURN, SCHEMA, read_rollouts, sequence_columns, write_rollouts


def answer(**changes: Any) -> dict[str, Any]:
    row = {
        "step": 10,
        "draw": 7,
        "sample": 2,
        "data_source": "carry",
        "prompt": "<|user|>\u4e00\u52a0\u4e8c \U0001f600\n",
        "response": "na\u00efve \u0394 \u2028 end",
        "reward": 0.1,
        "advantage": -1.25,
        "finish_reason": "stop",
        "ground_truth": "3",
        "token_ids": [5, 0, 151_643],
        "tokens": ["na", "\ufffd", "<|end|>"],
        "logps": [-0.5, -2.25, 0.0],
    }
    return row | changes


def test_round_trip(tmp_path: Path):
    path = tmp_path / "rollouts" / "step-000010.parquet"
    empty = answer(sample=3, response="", token_ids=[], tokens=[], logps=[], finish_reason="length")
    turn = {"start": 1, "end": 3, "finish_reason": "length", "reward": None, "anchor": 2**62 + 1}
    rows = [answer(sequence=i, turns=turns, fork=fork) for i, turns, fork in [(0, [], ""), (1, [turn], "step")]]
    rows += [row | {"sequence": 0, "turns": [], "fork": ""} for row in (empty, answer(sample=4, advantage=None))]
    rows = [ONE_TURN | {"messages": "[{}]"} | row for row in rows]
    write_rollouts(path, rows)
    assert read_rollouts(path) == rows
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_the_file_has_the_documented_columns_for_other_tools(tmp_path: Path):
    path = tmp_path / "r.parquet"
    write_rollouts(path, [])
    assert pq.read_schema(path).equals(SCHEMA)
    assert read_rollouts(path) == []
    write_rollouts(path, [answer()])
    read = read_rollouts(path)
    assert read == [answer(sequence=0, turns=None, fork="", messages=None)]
    pq.write_table(pq.read_table(path, columns=list(answer())), path)  # as files were before there were sequences
    assert read_rollouts(path) == read


def test_a_conversation_is_in_the_first_row_of_its_trajectory():
    told = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "\u4e00"}]
    both = [TokenSequence([1], [2], [-0.5], [], [Turn(0, 1, "stop")], fork=fork) for fork in ("", "step")]
    acted, single = Trajectory(0, both, "done", "a", 1.0, messages=told), Trajectory(0, both[:1], "stop", "a", 1.0)
    first, second = (row["messages"] for row in sequence_columns(acted))
    assert json.loads(first) == told and second is None and "\u4e00" in first
    assert [row["messages"] for row in sequence_columns(single)] == [None]


def test_a_failed_write_leaves_the_file_that_was_there(tmp_path: Path):
    path = tmp_path / "r.parquet"
    write_rollouts(path, [answer()])
    incomplete = answer()
    del incomplete["ground_truth"]
    with pytest.raises(KeyError, match="ground_truth"):
        write_rollouts(path, [answer(sample=9), incomplete])
    assert [row["sample"] for row in read_rollouts(path)] == [2]


def test_text_that_has_no_utf8_does_not_end_the_run(tmp_path: Path):
    write_rollouts(tmp_path / "r.parquet", [answer(prompt="a\ud800b")])
    assert read_rollouts(tmp_path / "r.parquet")[0]["prompt"] == "a?b"


def test_minus_infinity_is_kept(tmp_path: Path):
    write_rollouts(tmp_path / "r.parquet", [answer(logps=[-math.inf, 0.0, 0.0])])
    assert read_rollouts(tmp_path / "r.parquet")[0]["logps"][0] == -math.inf
