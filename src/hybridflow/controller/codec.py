"""Messages between processes: their content, their bytes, and the class that each byte counts as.

A message is a list of buffers ("frames"): a pickle (protocol 5), and behind it the tensors, which are neither copied
into the pickle nor out of the buffer that they were received in. Tensors travel by value, through host memory.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import select
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from multiprocessing.connection import Connection
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from hybridflow.batch import Batch, axis_of

Frame: TypeAlias = memoryview | bytes
Frames: TypeAlias = Sequence[Frame]

IN_PICKLE = 4096  # smaller tensors stay in the pickle: a frame of its own costs a system call
PER_ENTRY = 8  # numbers that an entry of a column may have, to pass through the controller
SMALL = 2**20  # a tensor of fewer bytes may have any shape
PIECE = 2**30  # the most bytes of one system call: some systems take less than 2^31


def encode(value: Any) -> list[Frame]:
    """Encodes a message that `decode` gives back; tensors come back on the host, without gradients."""
    frames: list[Frame] = []

    def outside(buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if raw.nbytes < IN_PICKLE:
            return True
        frames.append(raw)
        return False

    file = io.BytesIO()
    _Pickler(file, protocol=5, buffer_callback=outside).dump(value)
    return [file.getbuffer(), *frames]


def decode(frames: Frames) -> Any:
    """Decodes the value of a message. Its tensors live in the message's buffers."""
    return pickle.loads(frames[0], buffers=frames[1:])


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return NotImplemented
        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return _tensor, (pickle.PickleBuffer(flat.numpy().data), value.dtype, tuple(value.shape))


def _tensor(buffer: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if not math.prod(shape):
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(buffer, dtype=dtype).view(shape)


# --- bytes by class ---


def count_bytes(value: Any) -> dict[str, int]:
    """Counts the bytes of the tensors in a call or a result, by class: "scalar" (one entry per sequence), "token",
    "other".

    Raises:
        AssertionError: a heavy column is in it. Pixels, routing, hidden states, logits and weights go from worker to
            worker; what one process passes on between all others would make every step wait for it.
    """
    counted = {"scalar": 0, "token": 0, "other": 0}
    for name, tensor in _named_tensors("", value):
        axis = axis_of(name)
        per_entry = math.prod(tensor.shape[1:])
        heavy = tensor.ndim >= 3 or per_entry > PER_ENTRY
        assert not heavy or tensor.nbytes <= SMALL, (
            f"{name or 'a tensor'} of shape {list(tensor.shape)} is heavy: it must not pass through the controller"
        )
        kind = "other" if axis is None else "scalar" if axis == "B" else "token"
        counted[kind] += tensor.nbytes
    return counted


def _named_tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Batch):
        yield from ((n, c) for n, c in value.columns.items() if isinstance(c, Tensor))
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _named_tensors(key if isinstance(key, str) else name, entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _named_tensors(name, entry)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _named_tensors(field.name, getattr(value, field.name))


# --- over a connection ---


class MessagePipe:
    """Messages over a connection between two processes. Several threads may send, one may receive.

    Args:
        connection: the connection.
        patience: seconds that the other side may take nothing of a message that is sent; None for no limit.
    """

    def __init__(self, connection: Connection, patience: float | None = None) -> None:
        self.connection = connection
        self._patience = patience
        self._stalled = False
        self._sending = threading.Lock()
        os.set_blocking(self.fileno(), False)

    def fileno(self) -> int:
        """Returns the file number, for `multiprocessing.connection.wait`."""
        return self.connection.fileno()

    def send(self, *frames: Frame) -> int:
        """Sends a message; returns its bytes.

        Raises:
            OSError: the other side is gone, or takes nothing: nothing can be sent to it any more.
        """
        sizes = [memoryview(frame).nbytes for frame in frames]
        with self._sending:
            self._write(struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes))
            for frame in frames:
                self._write(frame)
        return sum(sizes)

    def receive(self) -> list[Frame]:
        """Waits for a message.

        Raises:
            EOFError: the other side is gone.
        """
        (count,) = struct.unpack("<I", self._read(4))
        sizes = struct.unpack(f"<{count}Q", self._read(8 * count))
        return [self._read(size) for size in sizes]

    def close(self) -> None:
        """Closes the connection: the other side reads an end of file."""
        self.connection.close()

    def _wait(self, event: int, seconds: float | None) -> bool:
        poll = select.poll()  # select takes no file number above 1,023
        poll.register(self.fileno(), event)
        return bool(poll.poll(None if seconds is None else 1000 * seconds))

    def _write(self, frame: Frame) -> None:
        view = memoryview(frame).cast("B") if memoryview(frame).nbytes else memoryview(b"")
        while view:
            if self._stalled or not self._wait(select.POLLOUT, self._patience):
                self._stalled = True  # a part of a message has been sent: no other can follow
                raise TimeoutError("the other side takes nothing")
            view = view[os.write(self.fileno(), view[:PIECE]) :]

    def _read(self, size: int) -> memoryview:
        buffer = np.empty(size, dtype=np.uint8).data  # numpy does not fill it with zeros first, as bytearray does
        at = 0
        while at < size:
            self._wait(select.POLLIN, None)
            try:
                got = os.readv(self.fileno(), [buffer[at : at + PIECE]])
            except ConnectionResetError:
                got = 0
            if not got:
                raise EOFError
            at += got
        return buffer
