"""Ragged batches: named columns over B sequences, on named axes, with nothing padded.

A column's name ends in its shape, one capital letter per dimension, and the first letter names the axis it lies on:

    B   one entry per sequence                     reward_B, group_B
    T   tokens, prompt and response in one stream  input_ids_T, loss_mask_T, advantage_T
    S   spans of a sequence (weight versions)      span_start_S, span_version_S
    later letters are trailing dimensions          routing_TLK, topk_TK

A column without such an ending is an object column: a list with one entry per sequence. Every ragged axis has its own
offsets ``[B + 1]``: the rows of sequence i on axis T are ``column[offsets["T"][i]:offsets["T"][i + 1]]``. Columns with
log-probabilities follow one convention: ``logp_T[t]`` is log p(token t | tokens before t), so 0 at the first token.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.compute
import torch
from torch import Tensor

Column: TypeAlias = Tensor | list[Any]

_SUFFIX = re.compile(r"_([A-Z]+)$")


def axis_of(name: str) -> str | None:
    """Returns the axis that a column of this name lies on, or None for an object column.

    >>> axis_of("routing_TLK"), axis_of("reward_B"), axis_of("prompt")
    ('T', 'B', None)
    """
    found = _SUFFIX.search(name)
    return found.group(1)[0] if found else None


def offsets_from_lengths(lengths: Sequence[int] | Tensor) -> Tensor:
    """Converts ``[B]`` lengths to ``[B + 1]`` offsets (int64), starting at 0."""
    lengths = torch.as_tensor(lengths, dtype=torch.int64)
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


class Batch:
    """Named columns over B sequences; see the head of this file for the naming rule.

    Args:
        columns: tensors ``[B, ...]`` or ``[sum of lengths, ...]``, and lists of B objects.
        lengths: for every ragged axis in use, the B lengths.

    Raises:
        ValueError: a column's size does not fit its axis, or an axis has no lengths.
    """

    def __init__(
        self, columns: Mapping[str, Column], *, lengths: Mapping[str, Sequence[int] | Tensor] | None = None
    ) -> None:
        self.offsets: dict[str, Tensor] = {a: offsets_from_lengths(n) for a, n in (lengths or {}).items()}
        self.columns: dict[str, Column] = {}
        sizes = {len(o) - 1 for o in self.offsets.values()}
        sizes |= {len(c) for name, c in columns.items() if axis_of(name) in (None, "B")}
        if len(sizes) > 1:
            raise ValueError(f"columns disagree on the number of sequences: {sorted(sizes)}")
        self._size = sizes.pop() if sizes else 0
        for name, column in columns.items():
            self[name] = column

    @classmethod
    def from_rows(cls, rows: Mapping[str, Sequence[Any]]) -> Batch:
        """Makes a batch from one value per sequence and column; ragged columns take lists or tensors of any length."""
        columns: dict[str, Column] = {}
        lengths: dict[str, list[int]] = {}
        for name, values in rows.items():
            axis = axis_of(name)
            if axis is None:
                columns[name] = list(values)
            elif axis == "B":
                columns[name] = torch.as_tensor(values) if not _tensors(values) else torch.stack(list(values))
            else:
                parts = [torch.as_tensor(v) for v in values]
                # Parts of several dtypes meet in the one that holds them all; an empty list has no dtype of its own.
                dtypes = [p.dtype for p, v in zip(parts, values) if len(p) or isinstance(v, Tensor)]
                dtype = functools.reduce(torch.promote_types, dtypes) if dtypes else torch.int64
                columns[name] = torch.cat([p.to(dtype) for p in parts]) if parts else torch.zeros(0, dtype=dtype)
                found = [len(p) for p in parts]
                if lengths.setdefault(axis, found) != found:
                    raise ValueError(f"column {name} has other lengths than the columns before it on axis {axis}")
        return cls(columns, lengths=lengths)

    def __len__(self) -> int:
        return self._size

    def __contains__(self, name: str) -> bool:
        return name in self.columns

    def __getitem__(self, name: str) -> Tensor:
        """Returns a tensor column; use `objects` for an object column."""
        column = self.columns[name]
        assert isinstance(column, Tensor), f"{name} is an object column"
        return column

    def __setitem__(self, name: str, column: Column) -> None:
        axis = axis_of(name)
        expected = self._size if axis in (None, "B") else self.total(axis) if axis in self.offsets else None
        if expected is None:
            raise ValueError(f"column {name} lies on axis {axis}, which has no lengths (axes: {sorted(self.offsets)})")
        if isinstance(column, Tensor) != (axis is not None):
            raise ValueError(f"column {name}: tensor columns end in their axis (_B, _T, ...), object columns do not")
        if len(column) != expected:
            raise ValueError(f"column {name} has {len(column)} rows, its axis has {expected}")
        self.columns[name] = column if isinstance(column, Tensor) else list(column)

    def __repr__(self) -> str:
        shapes = {n: tuple(c.shape) if isinstance(c, Tensor) else f"list[{len(c)}]" for n, c in self.columns.items()}
        return f"Batch({self._size} sequences, {shapes})"

    def objects(self, name: str) -> list[Any]:
        """Returns an object column."""
        column = self.columns[name]
        assert isinstance(column, list), f"{name} is a tensor column"
        return column

    def total(self, axis: str = "T") -> int:
        """Counts the entries on a ragged axis, over all sequences."""
        return int(self.offsets[axis][-1])

    def lengths(self, axis: str = "T") -> Tensor:
        """Returns the ``[B]`` lengths of the sequences on an axis (int64)."""
        return self.offsets[axis].diff()

    def sequence_of(self, axis: str = "T") -> Tensor:
        """Returns, for every entry of the axis, the index of its sequence: it broadcasts a ``_B`` column to ``_T`` by
        indexing.
        """
        return torch.repeat_interleave(torch.arange(self._size), self.lengths(axis))

    def rows(self, name: str) -> list[Any]:
        """Cuts the column by sequence: views of a ragged column, entries of the others."""
        column, axis = self.columns[name], axis_of(name)
        if axis in (None, "B") or not self._size:
            return list(column)
        return list(torch.split(self[name], self.lengths(str(axis)).tolist()))

    def select(self, names: Iterable[str]) -> Batch:
        """Returns the batch with only these columns (all axes are kept)."""
        return self._like({n: self.columns[n] for n in names}, self.offsets, self._size)

    def take(self, indices: Sequence[int] | Tensor) -> Batch:
        """Returns these sequences, in this order; an index may repeat."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        entry: dict[str, Tensor] = {"B": index}
        offsets = {}
        for axis, old in self.offsets.items():
            start, length = old[:-1][index], self.lengths(axis)[index]
            new = offsets[axis] = offsets_from_lengths(length)
            entry[axis] = torch.repeat_interleave(start - new[:-1], length) + torch.arange(int(new[-1]))
        columns: dict[str, Column] = {}
        for name, column in self.columns.items():
            if isinstance(column, Tensor):
                columns[name] = column[entry[str(axis_of(name))].to(column.device)]
            else:
                columns[name] = [column[i] for i in index.tolist()]
        return self._like(columns, offsets, len(index))

    def split(self, sizes: Sequence[int]) -> list[Batch]:
        """Cuts the batch into consecutive parts of these sizes, which must add up to the number of sequences."""
        if sum(sizes) != self._size:
            raise ValueError(f"parts of {list(sizes)} sequences do not make up {self._size}")
        bounds = offsets_from_lengths(sizes).tolist()
        return [self.take(torch.arange(a, b)) for a, b in itertools.pairwise(bounds)]

    def repeat(self, times: int) -> Batch:
        """Repeats every sequence `times` times, copies side by side."""
        return self.take(torch.arange(self._size).repeat_interleave(times))

    def to(self, device: torch.device | str) -> Batch:
        """Moves the tensor columns to `device`; offsets stay on the host, where they are read."""
        moved: dict[str, Column] = {n: c.to(device) if isinstance(c, Tensor) else c for n, c in self.columns.items()}
        return self._like(moved, self.offsets, self._size)

    def to_padded(self, name: str, value: float = 0) -> Tensor:
        """Pads a ragged column to ``[B, longest, ...]``, filled on the right with `value`, for code that needs
        rectangles.
        """
        if not self._size:
            return self[name].new_zeros(0, *self[name].shape)
        return torch.nn.utils.rnn.pad_sequence(self.rows(name), batch_first=True, padding_value=value)

    def set_padded(self, name: str, padded: Tensor) -> None:
        """Reverses `to_padded`: keeps of ``[B, at least the longest, ...]`` as many entries as the axis's lengths."""
        lengths = self.lengths(str(axis_of(name))).to(padded.device)
        keep = torch.arange(padded.shape[1], device=padded.device)[None, :] < lengths[:, None]
        self[name] = padded[keep]

    @staticmethod
    def concat(batches: Sequence[Batch]) -> Batch:
        """Joins all sequences of the batches, in order.

        Raises:
            ValueError: the batches have different columns or axes, or there is none.
        """
        if not batches:
            raise ValueError("nothing to concatenate")
        first = batches[0]
        for other in batches[1:]:
            differing = set(first.columns) ^ set(other.columns) | set(first.offsets) ^ set(other.offsets)
            if differing:
                raise ValueError(f"batches differ in columns or axes: {sorted(differing)}")
        columns: dict[str, Column] = {}
        for name in first.columns:
            if isinstance(first.columns[name], Tensor):
                columns[name] = torch.cat([b[name] for b in batches])
            else:
                columns[name] = [entry for b in batches for entry in b.objects(name)]
        offsets = {a: offsets_from_lengths(torch.cat([b.lengths(a) for b in batches])) for a in first.offsets}
        return first._like(columns, offsets, sum(len(b) for b in batches))

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    def _like(self, columns: dict[str, Column], offsets: dict[str, Tensor], size: int) -> Batch:
        """Makes a batch of parts that are known to fit together."""
        batch = object.__new__(Batch)
        batch.columns, batch.offsets, batch._size = columns, dict(offsets), size
        return batch


def _tensors(values: Sequence[Any]) -> bool:
    return len(values) > 0 and all(isinstance(v, Tensor) for v in values)


_ARROW_KEY = b"hybridflow.batch"


def to_arrow(batch: Batch) -> pa.Table:
    """Converts the batch to a table with one row per sequence; `from_arrow` gives it back as it was.

    Ragged columns become list columns, trailing dimensions are laid out flat inside the lists, and each axis has its
    lengths in a column such as ``length(T)``. An object column is text if all its entries are, else JSON. What a table
    cannot say itself (dtypes, trailing sizes) is in the schema's metadata, so rows may be sliced, reordered, and
    written to Parquet in between.

    Raises:
        ValueError: an object column holds something that JSON does not give back.
    """
    arrays: dict[str, pa.Array] = {f"length({a})": pa.array(batch.lengths(a).numpy()) for a in batch.offsets}
    kinds: dict[str, dict[str, Any]] = {}
    for name, column in batch.columns.items():
        if isinstance(column, Tensor):
            trailing = list(column.shape[1:])
            kinds[name] = {"dtype": str(column.dtype).removeprefix("torch."), "trailing": trailing}
            arrays[name] = _tensor_to_arrow(batch, name, math.prod(trailing))
        elif all(isinstance(entry, str) for entry in column):
            kinds[name] = {"dtype": "text"}
            arrays[name] = pa.array(column, pa.large_string())
        else:
            kinds[name] = {"dtype": "json"}
            arrays[name] = pa.array([_to_json(name, entry) for entry in column], pa.large_string())
    about = {"axes": list(batch.offsets), "columns": kinds}
    return pa.table(arrays).replace_schema_metadata({_ARROW_KEY: json.dumps(about)})


def from_arrow(table: pa.Table) -> Batch:
    """Returns the batch that `to_arrow` made a table of.

    Raises:
        ValueError: the table was not made by `to_arrow`, or lost its metadata on the way.
    """
    metadata = table.schema.metadata or {}
    if _ARROW_KEY not in metadata:
        raise ValueError("this table has no batch in its metadata: it was not made by to_arrow")
    about = json.loads(metadata[_ARROW_KEY])
    columns: dict[str, Column] = {}
    for name, kind in about["columns"].items():
        if kind["dtype"] in ("text", "json"):
            texts = table[name].to_pylist()
            columns[name] = texts if kind["dtype"] == "text" else [json.loads(text) for text in texts]
        else:
            columns[name] = _tensor_from_arrow(table, name, getattr(torch, kind["dtype"]), kind["trailing"])
    lengths = {axis: torch.from_numpy(table[f"length({axis})"].to_numpy().copy()) for axis in about["axes"]}
    return Batch(columns, lengths=lengths)


def _tensor_to_arrow(batch: Batch, name: str, width: int) -> pa.Array:
    column, axis = batch[name].detach().cpu(), axis_of(name)
    bits = column.view(torch.int16) if column.dtype == torch.bfloat16 else column  # Arrow has no bfloat16
    values = pa.array(bits.reshape(-1).numpy())
    if axis == "B" and column.ndim == 1:
        return values
    offsets = torch.arange(len(batch) + 1) if axis == "B" else batch.offsets[str(axis)]
    return pa.LargeListArray.from_arrays(pa.array((offsets * width).numpy()), values)


def _tensor_from_arrow(table: pa.Table, name: str, dtype: torch.dtype, trailing: list[int]) -> Tensor:
    axis, column = str(axis_of(name)), table[name]
    values = pyarrow.compute.list_flatten(column) if axis != "B" or trailing else column
    flat = torch.from_numpy(values.to_numpy().copy())
    if dtype == torch.bfloat16:
        flat = flat.view(torch.bfloat16)
    rows = len(table) if axis == "B" else int(pyarrow.compute.sum(table[f"length({axis})"]).as_py() or 0)
    return flat.view(rows, *trailing)


def _to_json(name: str, entry: Any) -> str:
    try:
        text = json.dumps(entry)
    except TypeError as error:
        raise ValueError(f"column {name} holds {entry!r}, which is no JSON") from error
    if json.loads(text) != entry:
        raise ValueError(f"column {name} holds {entry!r}, which JSON does not give back")
    return text
