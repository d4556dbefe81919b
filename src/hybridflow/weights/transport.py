"""Weight streams between processes, carried as `weights.carriers` chose.

One process sends, any number receive. They meet at a key-value store of the sender's, which carries headers and the
receivers' messages. Bytes go through two buckets in turn, so that one is filled while the other is read. A bucket is
filled again when every receiver has taken it. Every receiver announces itself before a stream begins, so one that was
started again (under its old number) takes part in the next stream like any other.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections import deque
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from hybridflow.config.sections.placement import Transport
from hybridflow.errors import UserError
from hybridflow.protocols.weights import WeightStream
from hybridflow.weights.buckets import ALIGNMENT, BUCKET_BYTES, Bucket, pack, unpack
from hybridflow.weights.carriers import Kind, first_line, incoming, outgoing
from hybridflow.weights.delta import Base
from hybridflow.weights.stream import WeightSyncError

SAID = "said"  # the queue of the receivers' messages to the sender


def pick_transport(wanted: Transport, *, one_host: bool) -> Kind:
    """Returns what ``placement.transport`` means here.

    Raises:
        UserError: memory is to be shared between hosts, or by a system that cannot (it is Linux that can).
    """
    possible = one_host and hasattr(os, "memfd_create")
    if (wanted == "shared_memory" and not possible) or (wanted == "cuda_ipc" and not one_host):
        raise UserError(
            f"placement.transport is {wanted}, which cannot work here",
            why="the processes are on several hosts" if not one_host else "only Linux has such memory",
            fix="set placement.transport=auto, or broadcast",
        )
    if wanted == "auto":
        return "shared_memory" if possible else "broadcast"
    return wanted


def drain(stream: WeightStream) -> None:
    """Takes part in gathering the tensors of a stream that another process of the same mesh sends."""
    deque(stream.tensors, maxlen=0)


class Sender:
    """The end that weights leave from. `open_sender` makes it.

    Attributes:
        address: ``host:port`` of the store, for `open_receiver`.
        streams: how many it has sent, or tried to.
    """

    def __init__(
        self,
        kind: Kind,
        receivers: int,
        host: str,
        port: int,
        bucket_bytes: int,
        timeout: float,
        device: torch.device,
        folder: str | None,
        delta: bool,
    ) -> None:
        assert receivers > 0 and bucket_bytes > 0
        self._receivers, self._timeout = receivers, timedelta(seconds=timeout)
        self._store = dist.TCPStore(host, port, is_master=True, wait_for_workers=False, timeout=self._timeout)
        self._host, self.address = host, f"{host}:{self._store.port}"
        size = -(-bucket_bytes // ALIGNMENT) * ALIGNMENT
        ends = receivers + 1
        self._carrier = outgoing(kind, size, device, folder=folder, store=self._store, ends=ends, timeout=self._timeout)
        self._base = Base() if delta else None
        self._here: dict[int, dict[str, str]] = {}  # receivers that wait for the next stream
        self._present: dict[int, dict[str, str]] = {}  # receivers that take this one
        self._met: list[str] = []  # the receivers that the carrier has connected, and how often it has done so
        self._generation = 0
        self._took: dict[int, set[int]] = {}  # the receivers that have taken a message in flight
        self._messages = 0  # buckets and ends, of all streams until now
        self._ending = True  # only acknowledgements are still to come
        self.streams = 0
        opening = self._carrier.opening | {"kind": kind, "receivers": receivers, "bucket_bytes": size}
        self._store.set("opening", json.dumps(opening))

    def send(self, stream: WeightStream) -> int:
        """Sends a whole stream; returns the bytes that travelled when every receiver has taken all of it.

        Raises:
            WeightSyncError: a receiver took nothing for `timeout` seconds, went away, or refused.
        """
        try:
            return self._send(stream)
        except Exception as error:
            stopped = f"stopped: {first_line(error)}"
            for receiver in self._here.values():
                self._store.set(f"stream/{receiver['ticket']}", stopped)
            self._store.set(f"message/{self._messages}", stopped)
            self._messages += 1
            self._here, self._met = {}, []  # a collective that did not finish is not resumed
            raise
        finally:
            self._present, self._took, self._ending = {}, {}, True
            self.streams += 1

    def stop(self, stream: int, reason: str) -> None:
        """Ends a stream that is being sent in another thread, because its receiver cannot take it.

        Args:
            stream: its number: the value of `streams` when it began. One that has ended is not disturbed.
            reason: why.
        """
        store = dist.TCPStore(self._host, self._store.port, is_master=False, timeout=self._timeout)
        store.queue_push(SAID, json.dumps(["stop", stream, {"reason": reason}]))

    def close(self) -> None:
        """Releases memory, files and the store. What was received stays with the receivers."""
        self._carrier.close()
        self._base = None
        del self._store

    def _send(self, stream: WeightStream) -> int:
        while len(self._here) < self._receivers:
            self._listen([i for i in range(self._receivers) if i not in self._here])
        self._present, self._here = self._here, {}
        self._ending, num_bytes, patches = False, 0, set[str]()
        version = self._begin(stream)
        if self._base is not None:
            same = {self._base.version} == {r["base"] for r in self._present.values()}
            stream = self._base.patches(stream, patches, whole=not (same and self._base.version))
        for bucket in pack(stream, self._free_bucket, patches):
            self._carrier.leave(self._messages, bucket.used)
            num_bytes += bucket.num_bytes
            self._say(bucket.header())
        self._say("end")
        self._ending = True
        for message in sorted(self._took):
            self._wait_for(message)
        for receiver in self._present.values():
            self._store.delete_key(f"stream/{receiver['ticket']}")
        if self._base is not None:
            self._base.version = version
        return num_bytes

    def _begin(self, stream: WeightStream) -> str:
        """Announces the stream to all receivers, and connects them if they are others than before."""
        version, who = secrets.token_hex(8), [self._present[i]["receiver"] for i in range(self._receivers)]
        self._generation += who != self._met
        record = {
            "names": sorted(stream.names),
            "adapter": stream.adapter,
            "first": self._messages,
            "generation": self._generation,
            "delta": version if self._base is not None else None,
        }
        for receiver in self._present.values():
            self._store.set(f"stream/{receiver['ticket']}", json.dumps(record))
        if who != self._met:
            self._carrier.meet(self._generation)
            self._met = who
        return version

    def _say(self, header: str) -> None:
        self._took[self._messages] = set()
        self._store.set(f"message/{self._messages}", header)
        self._messages += 1

    def _free_bucket(self) -> Tensor:
        self._wait_for(self._messages - 2)  # the message that lay in it before
        return self._carrier.memory(self._messages)

    def _wait_for(self, message: int) -> None:
        """Waits until every receiver has taken a message."""
        if message not in self._took:
            return
        while owing := self._owing(message):
            self._listen(owing)
        self._carrier.taken(message)
        self._store.delete_key(f"message/{message}")
        del self._took[message]

    def _owing(self, message: int) -> list[int]:
        return [i for i in range(self._receivers) if i not in self._took[message]]

    def _listen(self, waited_for: list[int]) -> None:
        """Takes one message of a receiver."""
        try:
            kind, who, what = json.loads(self._store.queue_pop(SAID))
        except RuntimeError as error:
            raise self._silent(waited_for, error) from error
        ticket, present = what.get("ticket"), self._present.get(who, {}).get("ticket")
        if kind == "took" and ticket == present and what["message"] in self._took:
            self._took[what["message"]].add(who)
        elif kind == "failed" and ticket in (present, self._here.get(who, {}).get("ticket")):
            raise WeightSyncError(f"receiver {who} of {self._receivers} (counted from 0) failed: {what['reason']}")
        elif kind == "stop" and who == self.streams:
            raise WeightSyncError(what["reason"])
        elif kind == "here":
            self._here[who] = what
            if present and not (self._ending and all(who in took for took in self._took.values())):
                raise WeightSyncError(
                    f"receiver {who} of {self._receivers} (counted from 0) restarted in the middle of a stream: "
                    "its process was started anew, or gave up waiting"
                )

    def _silent(self, waited_for: list[int], error: RuntimeError) -> WeightSyncError:
        silent = ", ".join(map(str, waited_for))
        return WeightSyncError(
            f"weights did not reach receiver {silent} of {self._receivers} (counted from 0): it went "
            f"away, or took nothing for {self._timeout.total_seconds():g} s ({first_line(error)})"
        )


class Receiver:
    """An end where weights arrive. `open_receiver` makes it."""

    def __init__(self, address: str, index: int, timeout: float, device: torch.device) -> None:
        host, _, port = address.rpartition(":")
        self._index, self._timeout = index, timedelta(seconds=timeout)
        try:
            self._store = dist.TCPStore(host, int(port), is_master=False, timeout=self._timeout)
            opening = json.loads(self._store.get("opening"))
        except RuntimeError as error:
            raise WeightSyncError(f"no sender of weights answers at {address}: {first_line(error)}") from error
        size, ends = opening["bucket_bytes"], opening["receivers"] + 1
        assert index < opening["receivers"], f"receiver {index} of {opening['receivers']}, counted from 0"
        self._carrier = incoming(
            opening, size, device, index=index, store=self._store, ends=ends, timeout=self._timeout
        )
        self._name = secrets.token_hex(8)
        self._base: Base | None = None
        self._ticket: str | None = None  # of the stream that is being taken
        self._generation = self._message = 0

    def receive(self) -> WeightStream:
        """Returns the next stream. Its tensors are views of a bucket; fingerprints of the sender come with them.

        Raises:
            WeightSyncError: now or while it is consumed: the sender went away, stopped, sent nothing for `timeout`
                seconds, or ended before all tensors were there.
        """
        self._ticket = ticket = secrets.token_hex(8)
        version = self._base.version if self._base is not None else ""
        self._say("here", receiver=self._name, base=version)
        record = json.loads(self._get(f"stream/{self._ticket}"))
        names, self._message = record["names"], record["first"]
        if record["generation"] != self._generation:
            self._carrier.meet(record["generation"])
            self._generation = record["generation"]
        if record["delta"] and self._base is None:
            self._base = Base()
        stream = WeightStream(iter(()), frozenset(names), adapter=record["adapter"])
        stream.tensors = self._tensors(stream, record["delta"], ticket)
        return stream

    def refuse(self, reason: str) -> None:
        """Reports to the sender that the stream in flight, if any, is not taken to its end: then it does not wait."""
        if self._ticket is not None:
            with contextlib.suppress(WeightSyncError):  # the sender is gone: nobody needs the report
                self._say("failed", reason=reason)
            self._ticket = None

    def close(self) -> None:
        """Releases memory."""
        self.refuse("it was closed")
        self._carrier.close()
        self._base = None
        del self._store

    def _tensors(self, stream: WeightStream, version: str | None, ticket: str) -> Iterator[tuple[str, Tensor]]:
        missing, patches = set(stream.names), set[str]()
        tensors = unpack(self._arriving(), stream.published, patches)
        if self._base is not None and version is not None:
            tensors = self._base.restored(tensors, patches)
        try:
            for name, tensor in tensors:
                missing.discard(name)
                yield name, tensor
                del tensor
        except BaseException as error:
            # What is left of a stream that failed may be collected while a later one arrives, which is not to blame.
            if self._ticket == ticket:
                self.refuse(first_line(error) or "it was given up in the middle")
            raise
        if missing:
            some = ", ".join(sorted(missing)[:5])
            raise WeightSyncError(f"the stream of weights ended without {len(missing)} of its tensors: {some}")
        if self._base is not None and version is not None:
            self._base.version = version

    def _arriving(self) -> Iterator[tuple[Bucket, Tensor]]:
        """Yields buckets until the stream's end; each is acknowledged when the next one is asked for."""
        while True:
            header = self._get(f"message/{self._message}")
            if header != "end":
                bucket = Bucket.from_header(header)
                try:
                    memory = self._carrier.arrive(self._message, bucket.used)
                except (RuntimeError, OSError) as error:  # OSError: of a file that the sender removed when it ended
                    raise self._lost(error) from error
                yield bucket, memory
                del memory
                self._carrier.done()
            self._say("took", message=self._message)
            self._message += 1
            if header == "end":
                self._ticket = None
                return

    def _say(self, kind: str, **what: str | int | None) -> None:
        try:
            self._store.queue_push(SAID, json.dumps([kind, self._index, what | {"ticket": self._ticket}]))
        except RuntimeError as error:
            raise self._lost(error) from error

    def _get(self, key: str) -> str:
        try:
            self._store.wait([key], self._timeout)
            found = self._store.get(key).decode()
        except RuntimeError as error:
            raise self._lost(error) from error
        if found.startswith("stopped: "):
            self._ticket = None
            raise WeightSyncError(f"the sender of weights {found}")
        return found

    def _lost(self, error: Exception) -> WeightSyncError:
        return WeightSyncError(
            "the sender of weights went away in the middle, or sent nothing for "
            f"{self._timeout.total_seconds():g} s ({first_line(error)})"
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
    folder: str | None = None,
    delta: bool = False,
) -> Sender:
    """Opens the sending end. It does not wait: receivers are there when the first stream is sent.

    Args:
        kind: "shared_memory" (one Linux host), "broadcast" (gloo; NCCL where `device` is a GPU), "files" or "cuda_ipc"
            (one GPU). The broadcast has a process group of its own, so ends may belong to pools that share none.
        receivers: how many there are.
        host: the name or address by which receivers reach this process.
        port: of the store; 0 takes a free one.
        bucket_bytes: size of one of the two buckets.
        timeout: seconds that either end waits for the other.
        device: where the buckets of a broadcast, or of "cuda_ipc", are.
        folder: where "files" puts them.
        delta: send what has changed since the last stream; see `weights.delta`.

    Raises:
        UserError: this way cannot work here.
    """
    return Sender(kind, receivers, host, port, bucket_bytes, timeout, torch.device(device), folder, delta)


def open_receiver(address: str, index: int, *, timeout: float = 600, device: torch.device | str = "cpu") -> Receiver:
    """Opens a receiving end; the sender chooses the way that bytes take.

    Args:
        address: the sender's.
        index: which receiver this is, from 0. One that was started again takes the number of the one that it replaces.
        timeout: see `open_sender`.
        device: where the buckets of a broadcast are, as with the sender.

    Raises:
        WeightSyncError: no sender listens there.
        UserError: the sender's memory, folder or GPU cannot be reached from here.
    """
    return Receiver(address, index, timeout, torch.device(device))
