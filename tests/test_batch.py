"""Batches against plain Python lists: a batch is held to be a list of rows, one dict of lists for each sequence."""

from __future__ import annotations

import io
import math
from itertools import pairwise
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybridflow.batch import Batch, axis_of, from_arrow, to_arrow

Rows = list[dict[str, Any]]
NAMES = ("input_ids_T", "logp_T", "topk_TK", "version_S", "reward_B", "image_BXY", "text", "extra")

floats = st.floats(-100, 100, width=32)


@st.composite
def sequences(draw: st.DrawFn) -> dict[str, Any]:
    tokens, spans = draw(st.integers(0, 5)), draw(st.integers(0, 3))
    return {
        "input_ids_T": draw(st.lists(st.integers(-(2**62), 2**62), min_size=tokens, max_size=tokens)),
        "logp_T": draw(st.lists(floats, min_size=tokens, max_size=tokens)),
        "topk_TK": draw(
            st.lists(st.lists(st.integers(0, 9), min_size=2, max_size=2), min_size=tokens, max_size=tokens)
        ),
        "version_S": draw(st.lists(st.integers(0, 9), min_size=spans, max_size=spans)),
        "reward_B": draw(floats),
        "image_BXY": draw(st.lists(st.lists(floats, min_size=2, max_size=2), min_size=3, max_size=3)),
        "text": draw(st.text(max_size=4)),
        "extra": draw(st.one_of(st.none(), st.integers(), st.lists(st.booleans()), st.dictionaries(st.text(), floats))),
    }


def rows_strategy(min_size: int = 0) -> st.SearchStrategy[Rows]:
    return st.lists(sequences(), min_size=min_size, max_size=5)


def batch_of(rows: Rows) -> Batch:
    """Built from flat tensors, not by `from_rows`, so that it is an independent start."""
    flat = {
        "input_ids_T": torch.tensor([x for r in rows for x in r["input_ids_T"]], dtype=torch.int64),
        "logp_T": torch.tensor([x for r in rows for x in r["logp_T"]], dtype=torch.float32),
        "topk_TK": torch.tensor([x for r in rows for x in r["topk_TK"]], dtype=torch.int16).reshape(-1, 2),
        "version_S": torch.tensor([x for r in rows for x in r["version_S"]], dtype=torch.int32),
        "reward_B": torch.tensor([r["reward_B"] for r in rows], dtype=torch.float64),
        "image_BXY": torch.tensor([r["image_BXY"] for r in rows], dtype=torch.float32).reshape(-1, 3, 2),
        "text": [r["text"] for r in rows],
        "extra": [r["extra"] for r in rows],
    }
    lengths = {"T": [len(r["input_ids_T"]) for r in rows], "S": [len(r["version_S"]) for r in rows]}
    return Batch(flat, lengths=lengths)


def rows_of(batch: Batch) -> Rows:
    columns = {name: [_plain(v) for v in batch.rows(name)] for name in batch}
    return [{name: column[i] for name, column in columns.items()} for i in range(len(batch))]


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, torch.Tensor) else value


def assert_same(a: Batch, b: Batch) -> None:
    """Equal to the last bit, dtypes, axes and order of columns included."""
    assert len(a) == len(b) and list(a) == list(b) and a.offsets.keys() == b.offsets.keys()
    for axis in a.offsets:
        assert torch.equal(a.offsets[axis], b.offsets[axis])
    for name in a:
        if axis_of(name) is None:
            assert a.objects(name) == b.objects(name)
        else:
            assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape
            if a[name].numel():  # empty tensors have no bits to view
                assert torch.equal(_bits(a[name]), _bits(b[name])), name


def _bits(column: torch.Tensor) -> torch.Tensor:
    return column.flatten().clone().view(torch.uint8)


@given(rows_strategy())
def test_rows_are_what_the_batch_was_made_of(rows: Rows) -> None:
    batch = batch_of(rows)
    assert len(batch) == len(rows)
    assert rows_of(batch) == rows
    assert batch.lengths().tolist() == [len(r["input_ids_T"]) for r in rows]
    assert batch.total("S") == sum(len(r["version_S"]) for r in rows)
    assert batch.sequence_of().tolist() == [i for i, r in enumerate(rows) for _ in r["input_ids_T"]]


@given(rows_strategy(min_size=1))
def test_from_rows_and_back(rows: Rows) -> None:
    batch = Batch.from_rows({name: [r[name] for r in rows] for name in NAMES})
    assert rows_of(batch) == rows


@given(rows_strategy(), st.data())
def test_take(rows: Rows, data: st.DataObject) -> None:
    indices = data.draw(st.lists(st.integers(0, len(rows) - 1))) if rows else []
    assert rows_of(batch_of(rows).take(indices)) == [rows[i] for i in indices]


@given(rows_strategy(), st.data())
def test_split_and_concat(rows: Rows, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(rows)), max_size=3)))
    bounds = [0, *cuts, len(rows)]
    batch = batch_of(rows)
    parts = batch.split([b - a for a, b in pairwise(bounds)])
    assert [rows_of(p) for p in parts] == [rows[a:b] for a, b in pairwise(bounds)]
    assert_same(Batch.concat(parts), batch)


@given(rows_strategy(), st.integers(0, 3))
def test_repeat_puts_copies_side_by_side(rows: Rows, times: int) -> None:
    assert rows_of(batch_of(rows).repeat(times)) == [r for r in rows for _ in range(times)]


@given(rows_strategy(), st.lists(st.sampled_from(NAMES), unique=True))
def test_select_keeps_these_columns_and_all_axes(rows: Rows, names: list[str]) -> None:
    batch = batch_of(rows)
    selected = batch.select(names)
    assert list(selected) == names and len(selected) == len(rows)
    assert rows_of(selected) == [{n: r[n] for n in names} for r in rows]
    assert selected.offsets.keys() == batch.offsets.keys()
    selected["new_T"] = torch.zeros(batch.total())
    assert "new_T" not in batch


@given(rows_strategy())
def test_padded_and_back(rows: Rows) -> None:
    batch = batch_of(rows)
    longest = max((len(r["input_ids_T"]) for r in rows), default=0)
    padded = batch.to_padded("input_ids_T", value=-7)
    assert padded.tolist() == [r["input_ids_T"] + [-7] * (longest - len(r["input_ids_T"])) for r in rows]
    for name in ("input_ids_T", "logp_T", "topk_TK", "version_S"):
        copy = batch.select(list(batch))
        copy[name] = torch.zeros_like(batch[name])
        copy.set_padded(name, batch.to_padded(name, value=3))
        assert_same(copy, batch)


def test_wider_padding_than_needed_is_cut_off() -> None:
    batch = Batch.from_rows({"x_T": [[1, 2], [], [3]]})
    batch.set_padded("y_T", torch.arange(15).view(3, 5))
    assert batch["y_T"].tolist() == [0, 1, 10]


@pytest.mark.parametrize(
    ("values", "dtype", "flat"),
    [
        ([[1, 2], [3]], torch.int64, [1, 2, 3]),
        ([[0], [0.5]], torch.float32, [0, 0.5]),  # the first row alone would say integers
        ([[], [True, False]], torch.bool, [True, False]),
        ([[], []], torch.int64, []),
        ([torch.zeros(0, dtype=torch.float16), torch.zeros(0, dtype=torch.float16)], torch.float16, []),
        ([torch.ones(2, dtype=torch.bfloat16), []], torch.bfloat16, [1, 1]),
    ],
)
def test_dtype_of_ragged_rows(values: list[Any], dtype: torch.dtype, flat: list[Any]) -> None:
    column = Batch.from_rows({"x_T": values})["x_T"]
    assert column.dtype == dtype and column.tolist() == flat


def test_an_empty_batch_goes_through_every_operation() -> None:
    empty = batch_of([])
    full = batch_of([{**{n: [] for n in NAMES}, "reward_B": 1.0, "image_BXY": [[0.0, 0]] * 3, "text": "", "extra": 0}])
    for batch in (
        empty,
        empty.take([]),
        empty.repeat(2),
        Batch.concat([empty, empty]),
        full.take([]),
        *empty.split([]),
    ):
        assert_same(batch, empty)
    assert_same(Batch.concat([empty, full, empty]), full)
    assert empty.to_padded("topk_TK").shape == (0, 0, 2)
    assert rows_of(empty) == [] and empty.split([0, 0])[1].total() == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Batch({"reward_B": torch.zeros(2), "text": ["a"]}), "number of sequences"),
        (lambda: Batch({"x_T": torch.zeros(3)}), "no lengths"),
        (lambda: Batch({"x_T": torch.zeros(3)}, lengths={"T": [1, 1]}), "has 3 rows, its axis has 2"),
        (lambda: Batch({"x_T": [1, 2]}, lengths={"T": [1, 1]}), "tensor"),
        (lambda: Batch({"text": torch.zeros(2)}), "tensor"),
        (lambda: Batch.from_rows({"x_T": [[1], [2]], "y_T": [[1, 2], []]}), "y_T has other lengths"),
        (lambda: Batch({"reward_B": torch.zeros(3)}).split([1, 1]), "do not make up 3"),
        (lambda: Batch.concat([]), "nothing"),
        (lambda: Batch.concat([Batch({"a_B": torch.zeros(1)}), Batch({"b_B": torch.zeros(1)})]), "a_B.*b_B"),
        (lambda: Batch.concat([Batch({}, lengths={"T": [1]}), Batch({}, lengths={"S": [1]})]), "S.*T"),
        (lambda: from_arrow(pa.table({"a": [1]})), "not made by to_arrow"),
        (lambda: to_arrow(Batch({"text": [{1: "a key that JSON turns into text"}]})), "JSON"),
        (lambda: to_arrow(Batch({"text": [object()]})), "JSON"),
    ],
)
def test_mistakes_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@given(rows_strategy())
def test_arrow_and_back_is_lossless(rows: Rows) -> None:
    batch = batch_of(rows)
    table = to_arrow(batch)
    assert table.num_rows == len(batch)
    assert table["input_ids_T"].to_pylist() == [r["input_ids_T"] for r in rows]
    assert_same(from_arrow(table), batch)
    file = io.BytesIO()
    pq.write_table(table, file, row_group_size=2)
    assert_same(from_arrow(pq.read_table(file)), batch)


@given(rows_strategy(min_size=2), st.data())
def test_a_sliced_table_is_a_slice_of_the_batch(rows: Rows, data: st.DataObject) -> None:
    start, stop = sorted([data.draw(st.integers(0, len(rows))), data.draw(st.integers(0, len(rows)))])
    batch = batch_of(rows)
    assert_same(from_arrow(to_arrow(batch).slice(start, stop - start)), batch.take(range(start, stop)))
    assert_same(from_arrow(to_arrow(batch).take(list(range(len(rows)))[::-1])), batch.take(range(len(rows))[::-1]))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("name", ["x_T", "x_TLK"])
def test_arrow_keeps_every_integer_dtype(dtype: torch.dtype, name: str) -> None:
    values = torch.arange(24).view(4, 2, 3)
    values = values if name == "x_TLK" else values[:, 0, 1]
    batch = Batch({name: values.to(dtype)}, lengths={"T": [3, 0, 1]})
    assert_same(from_arrow(to_arrow(batch)), batch)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_arrow_keeps_every_float_dtype_and_its_odd_values(dtype: torch.dtype) -> None:
    odd = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 0.1, 3e4]).to(dtype)
    batch = Batch({"x_T": odd, "y_BK": odd.view(3, 2), "z_B": odd[:3]}, lengths={"T": [1, 0, 5], "S": [2, 0, 7]})
    assert_same(from_arrow(to_arrow(batch)), batch)
