"""Deltas of weights: only the bytes that have changed are sent, exactly, and each tensor whole where that is not
smaller.

Both ends keep what was published last in host memory. A patch lists, for every byte of the words of a tensor (the first
bytes of all of them, then the second, ...), which have changed and to what: small learning rates move low bytes alone.
At a learning rate of 1e-6 the bytes of bfloat16 shrink to 2 to 4 %, those of float32 to half
(benchmarks/results/weight_sync.json). Values are new bytes, not differences: to patch twice is to patch once.

A patch is a table of (way, number of values) for every piece and byte, as int32. Behind it, in the same order, come the
positions of the values and the values themselves.

Shapes: N words of a tensor, P of a piece of it, W bytes of a word.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hybridflow.protocols.weights import WeightStream

Bytes = NDArray[np.uint8]

PIECE = 1 << 18  # words that are encoded together
ALL, BITS, GAPS, PLACES = range(4)  # ways to encode positions: all of them, a bit per word, one byte each, four


class Base:
    """The weights that were published last, at one end.

    Attributes:
        version: names it; empty while it is incomplete. Patches are for one version, at either end the same.
    """

    def __init__(self) -> None:
        self.version = ""
        self._held: dict[str, Tensor] = {}
        self._tied: dict[str, str] = {}  # of a tied tensor: the name before it

    def patches(self, stream: WeightStream, patches: set[str], *, whole: bool) -> WeightStream:
        """Makes the stream as it travels; its tensors become the base of the next one.

        Args:
            stream: of weights.
            patches: takes the names of tensors that leave as patches, before they leave.
            whole: send no patches: some receiver has another base.
        """
        self.version = ""

        def leaving() -> Iterator[tuple[str, Tensor]]:
            last: weakref.ref[Tensor] | None = None
            patch, before = None, ""
            for name, tensor in stream.tensors:
                if last is not None and last() is tensor:
                    assert whole or self._tied[name] == before, f"{name} was not tied to {before} before"
                    self._tied[name], self._held[name] = before, self._held[before]
                else:
                    assert whole or name not in self._tied, f"{name} was tied to {self._tied[name]} before"
                    patch = None if whole else self._patch(name, tensor)
                    if patch is None:
                        self._hold(name, tensor)
                    last, before = weakref.ref(tensor), name
                if patch is None:
                    yield name, tensor
                else:
                    patches.add(name)
                    yield name, patch
                del tensor

        return WeightStream(leaving(), stream.names, stream.published, adapter=stream.adapter)

    def restored(self, tensors: Iterable[tuple[str, Tensor]], patches: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """Yields the tensors that left, in host memory: a caller that keeps one copies it.

        Args:
            tensors: the tensors that arrive.
            patches: holds the names of those that are patches, when they arrive.
        """
        self.version = ""
        last: weakref.ref[Tensor] | None = None
        before = ""
        for name, tensor in tensors:
            if last is not None and last() is tensor:  # tied
                self._held[name] = self._held[before]
            elif name in patches:
                apply_patch(tensor, self._held[name])
            else:
                self._hold(name, tensor)
            last, before = weakref.ref(tensor), name
            del tensor
            yield name, self._held[name]

    def _patch(self, name: str, tensor: Tensor) -> Tensor | None:
        held = self._held.get(name)
        if held is None or (held.dtype, held.shape) != (tensor.dtype, tensor.shape):
            return None
        return patch_of(tensor.detach().cpu(), held)

    def _hold(self, name: str, tensor: Tensor) -> None:
        held = self._held.get(name)
        if held is None or (held.dtype, held.shape) != (tensor.dtype, tensor.shape):
            self._held[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
        self._held[name].copy_(tensor.detach())


def patch_of(tensor: Tensor, held: Tensor) -> Tensor | None:
    """Makes the patch that turns `held` into `tensor`, and turns `held` into it.

    Args:
        tensor: ``[...]``, in host memory.
        held: of the same shape and type, contiguous.

    Returns:
        uint8 ``[bytes]``; None where that is not smaller than the tensor, and `held` is then unchanged or partly so.
    """
    new_NW, old_NW = _words(tensor.contiguous()), _words(held)
    table, body = [], list[Bytes]()
    for first in range(0, len(new_NW), PIECE):
        new_PW, old_PW = new_NW[first : first + PIECE], old_NW[first : first + PIECE]
        changed_PW = np.bitwise_xor(new_PW, old_PW)
        for place in range(new_NW.shape[1]):
            way, count, parts = _changes(np.ascontiguousarray(changed_PW[:, place]), new_PW[:, place])
            table.append((way, count))
            body += parts
        np.copyto(old_PW, new_PW)
    head = np.array(table, dtype=np.int32).view(np.uint8).ravel()
    if len(head) + sum(map(len, body)) >= tensor.nbytes:
        return None
    return torch.from_numpy(np.concatenate([head, *body]))


def apply_patch(patch: Tensor, held: Tensor) -> None:
    """Makes `held` the tensor that the patch was made of.

    Args:
        patch: uint8 ``[bytes]``, of `patch_of`.
        held: ``[...]``, contiguous, the tensor before the patch; changed in place.
    """
    bytes_, held_NW = patch.cpu().numpy(), _words(held)
    pieces, width = -(-len(held_NW) // PIECE), held_NW.shape[1]
    at = 8 * pieces * width
    table = bytes_[:at].view(np.int32).reshape(-1, 2).tolist()
    for i, (way, count) in enumerate(table):
        piece, place = divmod(i, width)
        held_P = held_NW[piece * PIECE : (piece + 1) * PIECE, place]
        size = {ALL: 0, BITS: -(-len(held_P) // 8), GAPS: count, PLACES: 4 * count}[way]
        where, values = bytes_[at : at + size], bytes_[at + size : at + size + count]
        at += size + count
        if way == ALL:
            held_P[:] = values
        elif way == BITS:
            held_P[np.unpackbits(where, count=len(held_P)).view(np.bool_)] = values
        elif way == GAPS:
            held_P[_places(where)] = values
        elif count:
            held_P[np.frombuffer(where.tobytes(), np.uint32)] = values
    assert at == len(bytes_), f"a patch of {len(bytes_)} bytes, of which {at} were for this tensor"


def _changes(changed_P: Bytes, new_P: Bytes) -> tuple[int, int, list[Bytes]]:
    """Encodes how one byte of a piece's words has changed: returns the shortest encoding, how many values, and both.

    Args:
        changed_P: not 0 where it has changed.
        new_P: the new bytes.
    """
    size, mask_P = len(changed_P), changed_P != 0
    count = int(np.count_nonzero(mask_P))
    if min(2 * count, 5 * count) >= min(size, size // 8 + count):  # many: gaps are no shorter
        if size <= size // 8 + count:
            return ALL, size, [np.ascontiguousarray(new_P)]
        return BITS, count, [np.packbits(mask_P), new_P[mask_P]]
    places = np.flatnonzero(mask_P)
    gaps = _gaps(places)
    if 5 * count <= 2 * len(gaps):
        return PLACES, count, [places.astype(np.uint32).view(np.uint8), new_P[places]]
    return GAPS, len(gaps), [gaps, new_P[_places(gaps)]]


def _gaps(places: NDArray[Any]) -> Bytes:
    """Encodes how many words lie between one place and the next, in a byte each.

    Where a byte is too small, there are places between, of bytes that have not changed.
    """
    between = np.diff(places, prepend=-1) - 1
    more = between // 256
    gaps = np.full(len(places) + int(more.sum()), 255, np.uint8)
    gaps[np.cumsum(more + 1) - 1] = between % 256
    return gaps


def _places(gaps: Bytes) -> NDArray[Any]:
    """Reverses `_gaps`."""
    return np.cumsum(gaps.astype(np.int64) + 1) - 1


def _words(tensor: Tensor) -> Bytes:
    """Returns the bytes of a contiguous tensor, ``[words, bytes of a word]``: the same memory."""
    words: Bytes = tensor.view(-1).view(torch.uint8).view(-1, tensor.element_size()).numpy()
    return words
