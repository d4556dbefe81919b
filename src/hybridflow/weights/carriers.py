"""The ways to carry the bytes of buckets from sender to receivers: shared memory, broadcast, files, or CUDA's handles.

Every way has two halves. `weights.transport` passes them messages (buckets, counted over all streams) and has at most
two of them in flight: a message is put together in the memory of the one before the last, once every receiver has taken
that.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from hybridflow.errors import UserError
from hybridflow.weights.stream import WeightSyncError

Kind = Literal["shared_memory", "broadcast", "files", "cuda_ipc"]
HEAD = 4096  # bytes before shared buckets: a page, which begins with the token that tells this memory from any other
PREFIX = "hybridflow-weights-"  # of files


class Outgoing:
    """The sender's half.

    Attributes:
        opening: what the receivers' halves need to know.
    """

    opening: dict[str, Any]

    def meet(self, generation: int) -> None:
        """Joins the receivers, which have changed since the last generation."""

    def memory(self, message: int) -> Tensor:
        """Returns the memory where a message is put together: uint8, of the bucket's size."""
        raise NotImplementedError

    def leave(self, message: int, used: int) -> None:
        """Sends a message: this many bytes of its memory are filled, and may be read."""
        raise NotImplementedError

    def taken(self, message: int) -> None:
        """Notes that every receiver has read the message."""

    def close(self) -> None:
        """Releases all resources."""
        raise NotImplementedError


class Incoming:
    """A receiver's half."""

    def meet(self, generation: int) -> None:
        """Joins the sender and the other receivers."""

    def arrive(self, message: int, used: int) -> Tensor:
        """Returns the bytes of a message: good until it is `done`."""
        raise NotImplementedError

    def done(self) -> None:
        """Notes that the last message has been read."""

    def close(self) -> None:
        """Releases all resources."""
        raise NotImplementedError


def outgoing(
    kind: Kind, size: int, device: torch.device, *, folder: str | None, store: dist.Store, ends: int, timeout: timedelta
) -> Outgoing:
    """Opens the sender's half of a way.

    Raises:
        UserError: it cannot work here.
    """
    if kind == "shared_memory":
        return SharedMemory(size)
    if kind == "files":
        return Files(folder, size)
    if kind == "cuda_ipc":
        return CudaHandles(size, device, ends - 1)
    return BroadcastOut(store, ends, size, timeout, device)


def incoming(
    opening: dict[str, Any], size: int, device: torch.device, *, index: int, store: dist.Store, ends: int,
    timeout: timedelta,
) -> Incoming:  # fmt: skip
    """Opens a receiver's half of the way that the sender chose.

    Raises:
        UserError: it cannot work here.
    """
    kind: Kind = opening["kind"]
    if kind == "shared_memory":
        return AttachedMemory(opening, size)
    if kind == "files":
        return FilesThere(opening)
    if kind == "cuda_ipc":
        return OpenedHandles(opening, size, index)
    if device.type != opening["device"]:
        raise WeightSyncError(
            f"weights are broadcast from {opening['device']} to {device.type} memory: give one device"
        )
    return BroadcastIn(store, index + 1, ends, size, timeout, device)


# --- memory that processes of one host share ---


class SharedMemory(Outgoing):
    """Memory without a name: however its processes die, the system takes it back with the last one that maps it."""

    def __init__(self, size: int) -> None:
        self.fd = os.memfd_create("hybridflow-weights")
        os.ftruncate(self.fd, HEAD + 2 * size)
        memory, token = mmap.mmap(self.fd, HEAD + 2 * size), secrets.token_hex(16)
        memory[: len(token)] = token.encode()
        self._buckets = _buckets_in(memory, size)
        self.opening = {"pid": os.getpid(), "fd": self.fd, "token": token}

    def memory(self, message: int) -> Tensor:
        """See `Outgoing.memory`."""
        return self._buckets[message % 2]

    def leave(self, message: int, used: int) -> None:
        """See `Outgoing.leave`: it is there already."""

    def close(self) -> None:
        """See `Outgoing.close`."""
        os.close(self.fd)
        self._buckets = []


class AttachedMemory(Incoming):
    """The sender's memory, reached through the sender's own list of open files."""

    def __init__(self, opening: dict[str, Any], size: int) -> None:
        path, token = f"/proc/{opening['pid']}/fd/{opening['fd']}", opening["token"].encode()
        try:
            fd = os.open(path, os.O_RDWR)
            try:
                memory = mmap.mmap(fd, HEAD + 2 * size)
            finally:
                os.close(fd)
            if memory[: len(token)] != token:
                raise FileNotFoundError(path)
        except (OSError, ValueError) as error:
            raise UserError(
                "the memory that weights are sent through cannot be reached from here",
                why="sender and receiver are on different hosts, in different containers, or of different users "
                f"({error})",
                fix="set placement.transport=broadcast, or files",
            ) from error
        self._buckets = _buckets_in(memory, size)

    def arrive(self, message: int, used: int) -> Tensor:
        """See `Incoming.arrive`."""
        return self._buckets[message % 2][:used]

    def close(self) -> None:
        """See `Incoming.close`."""
        self._buckets = []


def _buckets_in(memory: mmap.mmap, size: int) -> list[Tensor]:
    return [torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=HEAD + i * size) for i in range(2)]


# --- broadcast ---


class _Group:
    """A process group of sender (rank 0) and receivers, beside all other groups of these processes."""

    def __init__(
        self, store: dist.Store, rank: int, ends: int, size: int, timeout: timedelta, device: torch.device
    ) -> None:
        self._store, self._rank, self._ends, self._timeout = store, rank, ends, timeout
        self._device = device
        self.buckets = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        self._group: Any = None  # torch's type stubs give process groups by themselves no methods

    def meet(self, generation: int) -> None:
        """Makes the group anew."""
        self.leave_group()
        own = dist.PrefixStore(f"group/{generation}", self._store)
        try:
            if self._device.type == "cuda":
                options = dist.ProcessGroupNCCL.Options()
                options._timeout = self._timeout
                self._group = dist.ProcessGroupNCCL(own, self._rank, self._ends, options)
            else:
                self._group = dist.ProcessGroupGloo(own, self._rank, self._ends, self._timeout)
        except RuntimeError as error:
            raise WeightSyncError(
                f"the {self._ends} processes that weights travel between did not meet within "
                f"{self._timeout.total_seconds():g} s ({first_line(error)})"
            ) from error

    def broadcast(self, message: int, used: int) -> Any:
        """Begins a broadcast; the caller can wait for what it returns."""
        return self._group.broadcast(self.buckets[message % 2][:used], 0)

    def leave_group(self) -> None:
        """Ends the group, if there is one."""
        if self._group is not None:
            self._group.shutdown()
        self._group = None


class BroadcastOut(Outgoing):
    """Buckets of either end's own, filled by a collective: gloo; NCCL where they are on a GPU."""

    def __init__(self, store: dist.Store, ends: int, size: int, timeout: timedelta, device: torch.device) -> None:
        self._group = _Group(store, 0, ends, size, timeout, device)
        self._works: dict[int, Any] = {}
        self.opening = {"device": device.type}

    def meet(self, generation: int) -> None:
        """See `Outgoing.meet`. A broadcast that was given up ends when the receivers leave that group, which is now."""
        self._works = {}
        self._group.meet(generation)

    def memory(self, message: int) -> Tensor:
        """See `Outgoing.memory`."""
        return self._group.buckets[message % 2]

    def leave(self, message: int, used: int) -> None:
        """See `Outgoing.leave`."""
        self._works[message] = self._group.broadcast(message, used)

    def taken(self, message: int) -> None:
        """See `Outgoing.taken`."""
        if message in self._works:
            self._works.pop(message).wait()

    def close(self) -> None:
        """See `Outgoing.close`."""
        self._group.leave_group()
        self._group.buckets = []


class BroadcastIn(Incoming):
    """The receiver's end of `BroadcastOut`: buckets of its own, filled by the collective."""

    def __init__(
        self, store: dist.Store, rank: int, ends: int, size: int, timeout: timedelta, device: torch.device
    ) -> None:
        self._group = _Group(store, rank, ends, size, timeout, device)

    def meet(self, generation: int) -> None:
        """See `Incoming.meet`."""
        self._group.meet(generation)

    def arrive(self, message: int, used: int) -> Tensor:
        """See `Incoming.arrive`."""
        self._group.broadcast(message, used).wait()
        return self._group.buckets[message % 2][:used]

    def close(self) -> None:
        """See `Incoming.close`."""
        self._group.leave_group()
        self._group.buckets = []


# --- files ---


class Files(Outgoing):
    """A file for every message, in a folder that sender and receivers reach under the same path.

    A file has its name when it is whole, and is gone when all receivers have taken it. The sender's own file, which
    tells the folder from any other, stays locked as long as the sender lives: a file that is not locked is of a run
    that crashed.
    """

    def __init__(self, folder: str | None, size: int) -> None:
        if folder is None or not Path(folder).is_dir():
            raise UserError(
                f"there is no folder {folder}" if folder else "placement.folder is not set",
                why="placement.transport files puts weights there",
                fix="set placement.folder to a folder that exists, and that all processes reach under the same path",
            )
        self._folder, self._token = Path(folder).resolve(), secrets.token_hex(8)
        self._own = self._folder / f"{PREFIX}{self._token}"
        self._buckets = [torch.empty(size, dtype=torch.uint8) for _ in range(2)]
        self.opening = {"folder": str(self._folder), "token": self._token}
        try:
            _remove_stale(self._folder)
            part = self._own.with_suffix(".part")
            self._lock = os.open(part, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            part.rename(self._own)  # locked before another process can take it for stale
        except OSError as error:
            raise UserError(
                f"weights cannot be written to {self._folder}: {error.strerror}",
                why="placement.transport files puts them there",
                fix="set placement.folder to a folder that all processes may write to",
            ) from error

    def meet(self, generation: int) -> None:
        """See `Outgoing.meet`. What is left of a stream that failed is not read any more."""
        _remove_messages(self._own)

    def memory(self, message: int) -> Tensor:
        """See `Outgoing.memory`."""
        return self._buckets[message % 2]

    def leave(self, message: int, used: int) -> None:
        """See `Outgoing.leave`."""
        part = self._path(message, ".part")
        try:
            part.write_bytes(self._buckets[message % 2][:used].numpy().data)
            part.rename(self._path(message))
        except OSError as error:
            raise WeightSyncError(f"weights could not be written to {self._folder}: {error.strerror}") from error

    def taken(self, message: int) -> None:
        """See `Outgoing.taken`."""
        self._path(message).unlink(missing_ok=True)

    def close(self) -> None:
        """See `Outgoing.close`."""
        self._buckets = []
        _remove_all(self._own)
        os.close(self._lock)

    def _path(self, message: int, suffix: str = "") -> Path:
        return self._own.with_name(f"{self._own.name}.{message}{suffix}")


class FilesThere(Incoming):
    """The receiver's end of `Files`: reads each message from its file."""

    def __init__(self, opening: dict[str, Any]) -> None:
        self._own = Path(opening["folder"]) / f"{PREFIX}{opening['token']}"
        if not self._own.exists():
            raise UserError(
                f"the folder {self._own.parent} is not the one that weights are sent through",
                why="the sender's files are not in it: this host or container has another folder under that path",
                fix="set placement.folder to a folder that all processes share, or placement.transport=broadcast",
            )

    def arrive(self, message: int, used: int) -> Tensor:
        """See `Incoming.arrive`."""
        with self._own.with_name(f"{self._own.name}.{message}").open("rb") as file:
            # Private, because no tensor is read-only; nothing is written, so nothing is copied.
            return torch.frombuffer(mmap.mmap(file.fileno(), used, access=mmap.ACCESS_COPY), dtype=torch.uint8)

    def close(self) -> None:
        """See `Incoming.close`."""


def _remove_stale(folder: Path) -> None:
    """Removes the files of senders that died: those files are no longer locked."""
    for own in folder.glob(f"{PREFIX}*"):
        if "." in own.name:
            continue
        try:
            fd = os.open(own, os.O_RDWR)
        except (FileNotFoundError, PermissionError):  # gone just now, or another user's
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue  # its sender lives
        else:
            _remove_all(own)
        finally:
            os.close(fd)


def _remove_all(own: Path) -> None:
    """Removes a sender's messages, and its own file last: as long as that is there, a later sender cleans up."""
    _remove_messages(own)
    own.unlink(missing_ok=True)


def _remove_messages(own: Path) -> None:
    for path in own.parent.glob(f"{own.name}.*"):
        path.unlink(missing_ok=True)


# --- CUDA ---


class CudaHandles(Outgoing):
    """Buckets in GPU memory that processes on the same GPU open by CUDA's handles: nothing is copied between them."""

    def __init__(self, size: int, device: torch.device, receivers: int) -> None:
        if device.type != "cuda":
            raise UserError(
                f"placement.transport is cuda_ipc, and the weights are in {device.type} memory",
                why="its handles are of GPU memory",
                fix="set placement.transport=auto",
            )
        from torch.multiprocessing.reductions import reduce_tensor

        self._buckets = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        self._device = self._buckets[0].device
        self.opening = {
            "gpu": str(torch.cuda.get_device_properties(self._device).uuid),
            "handles": [  # for each receiver: torch counts the processes that have opened one
                [[_as_text(part) for part in reduce_tensor(bucket)[1][HANDLE]] for bucket in self._buckets]
                for _ in range(receivers)
            ],
        }

    def memory(self, message: int) -> Tensor:
        """See `Outgoing.memory`."""
        return self._buckets[message % 2]

    def leave(self, message: int, used: int) -> None:
        """See `Outgoing.leave`."""
        torch.cuda.synchronize(self._device)

    def close(self) -> None:
        """See `Outgoing.close`."""
        self._buckets = []


HANDLE = slice(7, None)  # the parts that torch reduces a tensor to: all but its type, size and device, which we know


class OpenedHandles(Incoming):
    """The receiver's end of `CudaHandles`: opens the sender's buckets."""

    def __init__(self, opening: dict[str, Any], size: int, index: int) -> None:
        from torch.multiprocessing.reductions import rebuild_cuda_tensor

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        uuids = [str(torch.cuda.get_device_properties(i).uuid) for i in range(count)]
        if opening["gpu"] not in uuids:
            raise UserError(
                f"GPU {opening['gpu']}, which weights are sent from, is none of this process",
                why=f"placement.transport is cuda_ipc, and this process has {', '.join(uuids) or 'no GPU'}",
                fix="put actor and rollout into one pool of one process per GPU, or set placement.transport=auto",
            )
        self._device = uuids.index(opening["gpu"])
        self._buckets: list[Tensor] = []
        for text in opening["handles"][index]:
            handle = [_from_text(x) for x in text]
            tensor = rebuild_cuda_tensor(
                Tensor, (size,), (1,), 0, torch.UntypedStorage, torch.uint8, self._device, *handle
            )
            self._buckets.append(tensor)

    def arrive(self, message: int, used: int) -> Tensor:
        """See `Incoming.arrive`."""
        return self._buckets[message % 2][:used]

    def done(self) -> None:
        """See `Incoming.done`."""
        torch.cuda.synchronize(self._device)

    def close(self) -> None:
        """See `Incoming.close`."""
        self._buckets = []


def _as_text(part: Any) -> Any:
    return {"bytes": part.hex()} if isinstance(part, bytes) else part


def _from_text(part: Any) -> Any:
    return bytes.fromhex(part["bytes"]) if isinstance(part, dict) else part


def first_line(error: BaseException) -> str:
    """Returns the message of an error of torch's, without its stack."""
    return str(error).partition("\n")[0]
