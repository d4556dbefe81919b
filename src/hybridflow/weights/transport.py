"""Weight streams between processes: through memory that processes of one host share, or by broadcast.

One process sends, any number receive. They meet at a key-value store of the sender's, over which headers and
acknowledgements go; bytes go through two buckets in turn, so that one is filled while the other is read. A bucket is
filled again when every receiver has acknowledged it. Shared memory has no name in the file system: whoever dies, and
however, the system takes it back with the last process that maps it.
"""

from __future__ import annotations

import json
import mmap
import os
import secrets
from collections import deque
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from hybridflow.config.placement import Transport
from hybridflow.errors import UserError
from hybridflow.protocols import WeightStream
from hybridflow.weights.buckets import ALIGNMENT, BUCKET_BYTES, Bucket, pack, unpack
from hybridflow.weights.stream import WeightSyncError

Kind = Literal["shared_memory", "broadcast"]
HEAD = 4096  # bytes before the buckets: a page, which begins with the token that tells this memory from any other


def pick_transport(wanted: Transport, *, one_host: bool) -> Kind:
    """What ``placement.transport`` means here.

    Raises:
        UserError: memory is to be shared between hosts, or by a system that cannot (it is Linux that can).
    """
    possible = one_host and hasattr(os, "memfd_create")
    if wanted == "shared_memory" and not possible:
        raise UserError(
            "placement.transport is shared_memory, which cannot work here",
            why="the processes are on several hosts" if not one_host else "only Linux has such memory",
            fix="set placement.transport=auto, or broadcast",
        )
    return "shared_memory" if possible and wanted != "broadcast" else "broadcast"


def drain(stream: WeightStream) -> None:
    """Takes part in gathering the tensors of a stream that another process of the same mesh sends."""
    deque(stream.tensors, maxlen=0)


class Sender:
    """The end that weights leave from. `open_sender` makes it.

    Attributes:
        address: ``host:port`` of the store, for `open_receiver`.
    """

    def __init__(
        self, kind: Kind, receivers: int, host: str, port: int, bucket_bytes: int, timeout: float, device: torch.device
    ) -> None:
        assert receivers > 0 and bucket_bytes > 0
        self._receivers, self._timeout = receivers, timedelta(seconds=timeout)
        self._store = dist.TCPStore(host, port, is_master=True, wait_for_workers=False, timeout=self._timeout)
        self.address = f"{host}:{self._store.port}"
        size = -(-bucket_bytes // ALIGNMENT) * ALIGNMENT
        opening: dict[str, Any] = {"kind": kind, "receivers": receivers, "bucket_bytes": size}
        self._group: Any = None  # torch's type stubs give process groups by themselves no methods
        self._fd: int | None = None
        if kind == "shared_memory":
            self._fd = os.memfd_create("hybridflow-weights")
            os.ftruncate(self._fd, HEAD + 2 * size)
            memory, token = mmap.mmap(self._fd, HEAD + 2 * size), secrets.token_hex(16)
            memory[: len(token)] = token.encode()
            self._buckets = _buckets_in(memory, size)
            opening |= {"pid": os.getpid(), "fd": self._fd, "token": token}
        else:
            opening["device"] = device.type
            self._buckets = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        self._broadcasts: dict[int, dist.Work] = {}
        self._messages = 0  # buckets and ends, of all streams so far
        self._streams = 0
        self._store.set("opening", json.dumps(opening))

    def send(self, stream: WeightStream) -> int:
        """Sends a whole stream; returns its bytes when every receiver has taken all of it.

        Raises:
            WeightSyncError: a receiver took nothing for `timeout` seconds, or went away.
        """
        if self._fd is None and self._group is None:
            self._group = _group(self._store, 0, self._receivers + 1, self._timeout, self._buckets[0].device)
        self._store.set(f"stream/{self._streams}", json.dumps([sorted(stream.names), stream.adapter]))
        self._streams += 1
        num_bytes = 0
        try:
            for bucket in pack(stream, self._free_bucket):
                self._store.set(f"message/{self._messages}", bucket.header())
                if self._group is not None:
                    used = self._buckets[self._messages % 2][: bucket.used]
                    self._broadcasts[self._messages] = self._group.broadcast(used, 0)
                num_bytes += sum(entry.size for entry in bucket.entries)
                self._messages += 1
        except Exception as error:
            self._store.set(f"message/{self._messages}", f"stopped: {error}")
            raise
        self._store.set(f"message/{self._messages}", "end")
        self._messages += 1
        for message in (self._messages - 2, self._messages - 1):
            self._wait_for(message)
        return num_bytes

    def close(self) -> None:
        """Gives memory and the store back. What was received stays with the receivers."""
        if self._group is not None:
            self._group.shutdown()
        if self._fd is not None:
            os.close(self._fd)
        self._buckets, self._group, self._fd = [], None, None
        del self._store

    def _free_bucket(self) -> Tensor:
        self._wait_for(self._messages - 2)  # what lay in it before
        return self._buckets[self._messages % 2]

    def _wait_for(self, message: int) -> None:
        """Until every receiver has taken a message."""
        if message < 0:
            return
        keys = [f"taken/{message}/{i}" for i in range(self._receivers)]
        try:
            if message in self._broadcasts:
                self._broadcasts.pop(message).wait()
            self._store.wait(keys, self._timeout)
        except RuntimeError as error:
            silent = [str(i) for i, key in enumerate(keys) if not self._store.check([key])]
            raise WeightSyncError(
                f"weights did not reach receiver {', '.join(silent)} of {self._receivers} (counted from 0): it went "
                f"away, or took nothing for {self._timeout.total_seconds():g} s ({_first_line(error)})"
            ) from error


class Receiver:
    """An end where weights arrive. `open_receiver` makes it."""

    def __init__(self, address: str, index: int, timeout: float, device: torch.device) -> None:
        host, _, port = address.rpartition(":")
        self._index, self._timeout = index, timedelta(seconds=timeout)
        try:
            self._store = dist.TCPStore(host, int(port), is_master=False, timeout=self._timeout)
            opening = json.loads(self._store.get("opening"))
        except RuntimeError as error:
            raise WeightSyncError(f"no sender of weights answers at {address}: {_first_line(error)}") from error
        assert index < opening["receivers"], f"receiver {index} of {opening['receivers']}, counted from 0"
        size, self._receivers, self._shared = opening["bucket_bytes"], opening["receivers"], "fd" in opening
        self._group: Any = None  # torch's type stubs give process groups by themselves no methods
        if self._shared:
            self._buckets = _buckets_in(_attached(opening), size)
        elif device.type != opening["device"]:
            raise WeightSyncError(
                f"weights are broadcast from {opening['device']} to {device.type} memory: give one device"
            )
        else:
            self._buckets = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        self._messages = self._streams = 0

    def receive(self) -> WeightStream:
        """The next stream. Its tensors are views of a bucket; fingerprints of the sender come with them.

        Raises:
            WeightSyncError: now or while it is consumed: the sender went away, stopped, sent nothing for `timeout`
                seconds, or ended before all tensors were there.
        """
        if not self._shared and self._group is None:
            device = self._buckets[0].device
            self._group = _group(self._store, self._index + 1, self._receivers + 1, self._timeout, device)
        names, adapter = json.loads(self._get(f"stream/{self._streams}"))
        self._streams += 1
        stream = WeightStream(iter(()), frozenset(names), adapter=adapter)

        def arriving() -> Iterator[tuple[str, Tensor]]:
            missing = set(names)
            for name, tensor in unpack(self._arriving(), stream.published):
                missing.discard(name)
                yield name, tensor
                del tensor
            if missing:
                some = ", ".join(sorted(missing)[:5])
                raise WeightSyncError(f"the stream of weights ended without {len(missing)} of its tensors: {some}")

        stream.tensors = arriving()
        return stream

    def close(self) -> None:
        """Gives memory back."""
        if self._group is not None:
            self._group.shutdown()
        self._buckets, self._group = [], None
        del self._store

    def _arriving(self) -> Iterator[tuple[Bucket, Tensor]]:
        """Buckets until the stream's end; each is acknowledged when the next one is asked for."""
        while True:
            header = self._get(f"message/{self._messages}")
            if header.startswith("stopped: "):
                raise WeightSyncError(f"the sender of weights {header}")
            if header != "end":
                bucket = Bucket.from_header(header)
                memory = self._buckets[self._messages % 2][: bucket.used]
                if self._group is not None:
                    try:
                        self._group.broadcast(memory, 0).wait()
                    except RuntimeError as error:
                        raise self._lost(error) from error
                yield bucket, memory
                del memory
            self._store.set(f"taken/{self._messages}/{self._index}", "")
            self._messages += 1
            if header == "end":
                return

    def _get(self, key: str) -> str:
        try:
            self._store.wait([key], self._timeout)
            return self._store.get(key).decode()
        except RuntimeError as error:
            raise self._lost(error) from error

    def _lost(self, error: RuntimeError) -> WeightSyncError:
        return WeightSyncError(
            "the sender of weights went away in the middle, or sent nothing for "
            f"{self._timeout.total_seconds():g} s ({_first_line(error)})"
        )


def open_sender(
    kind: Kind,
    receivers: int,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    bucket_bytes: int = BUCKET_BYTES,
    timeout: float = 600,
    device: torch.device | str = "cpu",
) -> Sender:
    """Opens the sending end. It waits for nobody: receivers are there when the first stream is sent.

    Args:
        kind: "shared_memory" (one Linux host) or "broadcast" (gloo; NCCL where `device` is a GPU). The broadcast has a
            process group of its own, so ends may belong to pools that share none.
        receivers: how many there are.
        host: what receivers reach this process by.
        port: of the store; 0 takes a free one.
        bucket_bytes: size of one of the two buckets.
        timeout: seconds that either end waits for the other.
        device: where the buckets of a broadcast are.
    """
    return Sender(kind, receivers, host, port, bucket_bytes, timeout, torch.device(device))


def open_receiver(address: str, index: int, *, timeout: float = 600, device: torch.device | str = "cpu") -> Receiver:
    """Opens a receiving end; whether memory is shared or bytes are broadcast is the sender's choice.

    Args:
        address: the sender's.
        index: which receiver this is, from 0.
        timeout: see `open_sender`.
        device: where the buckets of a broadcast are, as with the sender.

    Raises:
        WeightSyncError: nobody answers there.
        UserError: memory is to be shared, and the sender's cannot be reached from here.
    """
    return Receiver(address, index, timeout, torch.device(device))


def _buckets_in(memory: mmap.mmap, size: int) -> list[Tensor]:
    return [torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=HEAD + i * size) for i in range(2)]


def _attached(opening: dict[str, Any]) -> mmap.mmap:
    """The sender's memory, which has no name: it is reached through the sender's own list of open files."""
    path, token = f"/proc/{opening['pid']}/fd/{opening['fd']}", opening["token"].encode()
    try:
        fd = os.open(path, os.O_RDWR)
        try:
            memory = mmap.mmap(fd, HEAD + 2 * opening["bucket_bytes"])
        finally:
            os.close(fd)
        if memory[: len(token)] != token:
            raise FileNotFoundError(path)
    except (OSError, ValueError) as error:
        raise UserError(
            "the memory that weights are sent through cannot be reached from here",
            why=f"sender and receiver are on different hosts, in different containers, or of different users ({error})",
            fix="set placement.transport=broadcast",
        ) from error
    return memory


def _group(store: dist.Store, rank: int, size: int, timeout: timedelta, device: torch.device) -> Any:
    """A process group of sender (rank 0) and receivers, beside whatever groups these processes have."""
    own = dist.PrefixStore("group", store)
    try:
        if device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            return dist.ProcessGroupNCCL(own, rank, size, options)
        return dist.ProcessGroupGloo(own, rank, size, timeout)
    except RuntimeError as error:
        raise WeightSyncError(
            f"the {size} processes that weights travel between did not meet within {timeout.total_seconds():g} s "
            f"({_first_line(error)})"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
