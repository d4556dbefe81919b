"""Tensors side by side in memory of a fixed size, with a small header that says where each one lies.

Tensors are copied into buckets and out of them, and nowhere else. A tensor that fits lies in one piece and is read as a
view; only one that is larger than a bucket is cut, and the reader puts it together again. So either side needs its
buckets and one tensor.
"""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hybridflow.protocols.weights import WeightStream

BUCKET_BYTES = 256 << 20
ALIGNMENT = 64  # bytes; a view of any type may begin here


class Entry(NamedTuple):
    """A tensor, or a piece of one, in a bucket."""

    name: str
    dtype: str
    shape: list[int]
    fingerprint: int | None
    at: int  # byte of the bucket where it begins
    first: int  # byte of the tensor that it begins with
    size: int  # bytes
    patch: bool = False  # not the tensor, but its changes: see `weights.delta`


@dataclass(slots=True)
class Bucket:
    """A filled bucket: its entries, and how many of its bytes are used."""

    entries: list[Entry]
    used: int

    @property
    def num_bytes(self) -> int:
        """Bytes of tensors in it; tied ones lie in it once."""
        return sum({entry.at: entry.size for entry in self.entries}.values())

    def header(self) -> str:
        """Returns the header as text, for `from_header`."""
        return json.dumps([self.used, self.entries])

    @classmethod
    def from_header(cls, header: str) -> Bucket:
        """Reads what `header` wrote."""
        used, entries = json.loads(header)
        return cls([Entry(*entry) for entry in entries], used)


def pack(
    stream: WeightStream, next_memory: Callable[[], Tensor], patches: Container[str] = frozenset()
) -> Iterator[Bucket]:
    """Copies a stream into buckets, one after the other.

    Args:
        stream: consumed here. A tensor that follows itself under another name (tied weights) is copied once.
        next_memory: memory for the next bucket, uint8, on any device; called when the first tensor for it is there.
        patches: names of the tensors that are patches; read when such a tensor has been taken.
    """
    memory: Tensor | None = None
    bucket = Bucket([], 0)
    last: weakref.ref[Tensor] | None = None
    for name, tensor in stream.tensors:
        flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
        left_as = stream.published.get(name)
        if memory is not None and last and last() is tensor and bucket.entries[-1].size == len(flat):
            bucket.entries.append(bucket.entries[-1]._replace(name=name, fingerprint=left_as))
            continue
        last = weakref.ref(tensor)
        first = 0
        while True:
            if memory is not None and bucket.used + len(flat) - first > len(memory):
                yield bucket
                memory = None
            if memory is None:
                memory, bucket = next_memory(), Bucket([], 0)
            size = min(len(flat) - first, len(memory) - bucket.used)
            memory[bucket.used : bucket.used + size].copy_(flat[first : first + size])
            kind = str(tensor.dtype).removeprefix("torch.")
            patch = name in patches
            bucket.entries.append(Entry(name, kind, list(tensor.shape), left_as, bucket.used, first, size, patch))
            bucket.used = min(len(memory), -(-(bucket.used + size) // ALIGNMENT) * ALIGNMENT)
            first += size
            if first == len(flat):
                break
        del tensor, flat
    if bucket.entries and memory is not None:
        yield bucket


def unpack(
    buckets: Iterable[tuple[Bucket, Tensor]], published: dict[str, int], patches: set[str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors in buckets.

    Args:
        buckets: each with its memory, as `pack` filled it.
        published: takes the fingerprints that the sender took.
        patches: takes the names of the tensors that are patches, before they are yielded.

    Yields:
        Names and views of that memory: a bucket is done with when the next one is asked for. Tensors that were tied,
        and lie in a bucket once, are one tensor here too.
    """
    whole: Tensor | None = None
    for bucket, memory in buckets:
        last: tuple[Entry, Tensor] | None = None
        for entry in bucket.entries:
            dtype = getattr(torch, entry.dtype)
            total = math.prod(entry.shape) * dtype.itemsize
            part = memory[entry.at : entry.at + entry.size]
            if entry.size < total:
                if entry.first == 0:
                    whole = torch.empty(total, dtype=torch.uint8, device=memory.device)
                assert whole is not None and len(whole) == total, f"the beginning of {entry.name} is missing"
                whole[entry.first : entry.first + entry.size].copy_(part)
                if entry.first + entry.size < total:
                    continue
                part, whole = whole, None
            if entry.fingerprint is not None:
                published[entry.name] = entry.fingerprint
            if entry.patch:
                assert patches is not None, f"a patch of {entry.name} where none was expected"
                patches.add(entry.name)
            if last is not None and entry._replace(name=last[0].name, fingerprint=last[0].fingerprint) == last[0]:
                tensor = last[1]
            else:
                tensor = part.view(dtype).view(entry.shape)
            last = (entry, tensor) if entry.size == total else None
            del part
            yield entry.name, tensor
            del tensor
