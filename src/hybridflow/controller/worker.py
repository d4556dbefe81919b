"""A process of a pool: the workers of all groups that are placed there, and their context."""

from __future__ import annotations

import json
import mmap
import os
import queue
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, Store, TCPStore

from hybridflow.batch import Batch
from hybridflow.controller.codec import Frames, MessagePipe
from hybridflow.controller.dispatch import Call
from hybridflow.controller.failure import (
    CallFailure,
    Standing,
    describe_rows,
    failed,
    peak_bytes,
    resident_bytes,
    standing,
)
from hybridflow.controller.messages import Meeting, Place, WorkerCall, WorkerReply
from hybridflow.devices import kind_of
from hybridflow.faults import worker_fault

BOX_BYTES = 4096
BEAT_SECONDS = 0.5  # seconds after which the black box updates its facts about memory


class BlackBox:
    """A small file in which a process keeps what it is doing, for the report of its death.

    It is a memory map: what is written survives the process, however it ends.
    """

    def __init__(self, path: Path) -> None:
        path.write_bytes(bytes(BOX_BYTES))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), BOX_BYTES)
        self._facts: dict[str, Any] = {"process": os.getpid()}
        self._lock = threading.Lock()

    def write(self, **facts: Any) -> None:
        """Adds facts, and memory as it is now."""
        with self._lock:
            self._facts |= facts | {"resident": resident_bytes(), "peak": peak_bytes()}
            text = json.dumps(self._facts).encode()[:BOX_BYTES]
            self._map[:] = text.ljust(BOX_BYTES, b"\0")


def read_box(path: Path) -> dict[str, Any]:
    """Reads the facts in a black box; empty where there is none, or the process ended while it wrote."""
    try:
        return dict(json.loads(path.read_bytes().rstrip(b"\0")))
    except (OSError, ValueError):
        return {}


class WorkerContext:
    """The surroundings of a worker: its process, its device, its peers.

    Args:
        name: of its group.
        place: its process.
        device: where its tensors belong.
        siblings: the other workers of this process, by the name of their group.

    Attributes:
        timeout: seconds that processes may wait for each other (placement.timeout).
        address: of this host, as the others reach it.
        host: its name; processes with equal names can share memory.
    """

    def __init__(
        self, name: str, place: Place, device: torch.device, siblings: Mapping[str, Any], host: WorkerHost
    ) -> None:
        self.name, self.pool, self.rank, self.world_size = name, place.pool, place.rank, place.size
        self.device, self.siblings = device, siblings
        self._host = host
        self.timeout, self.address, self.host = host.timeout, host.address(), socket.gethostname()

    def join_pool(self) -> None:
        """Makes the pool's process group, torch's default one in this process; every rank of the pool must call it.

        Nothing happens where it is there already.
        """
        self._host.join_pool()

    def progress(self, rows: str = "") -> None:
        """Reports that a long call makes progress: the controller's time limit (placement.timeout) counts from here.

        Args:
            rows: the sequences of the current piece of work, in words; the report names them if the worker fails.
        """
        self._host.progress(rows)


class WorkerHost:
    """The workers of one process.

    Args:
        place: which process it is.
        device: where tensors of its workers belong.
        meeting: where the pool's processes meet; None where there is only one process.
        box: the black box; None for none.
    """

    def __init__(self, place: Place, device: torch.device, meeting: Meeting | None, box: Path | None = None) -> None:
        self.place, self.device = place, device
        self._meeting = meeting
        self._box = None if box is None else BlackBox(box)
        self._workers: dict[str, Any] = {}
        self._calls: Counter[tuple[str, str]] = Counter()  # in this step
        self._last = time.monotonic()  # when something happened
        self._thread = threading.main_thread().ident
        self._joined = self._has_failed = False
        self.doing: dict[str, Any] = {}
        self.beat()

    @property
    def timeout(self) -> float:
        """Seconds that a collective may take."""
        return 600 if self._meeting is None else self._meeting.timeout

    def address(self) -> str:
        """Returns the address of the network interface of this host that leads to where all processes meet."""
        if self._meeting is None:
            return "127.0.0.1"
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((self._meeting.host, self._meeting.port))  # this chooses an interface, and sends nothing
            return str(probe.getsockname()[0])

    def perform(self, request: WorkerCall) -> Any:
        """Makes a worker, or calls a method of one; its exceptions reach the caller."""
        method = "create" if request.kind == "create" else request.method
        positional, keywords = request.call
        self._thread = threading.get_ident()
        if request.step != self.doing.get("step"):
            self._calls.clear()
        self._calls[request.group, method] += 1
        count = self._calls[request.group, method]
        rows = describe_rows([*positional, *keywords.values()])
        self._note(worker=request.group, method=method, step=request.step, rows=rows, began=time.time())
        if worker_fault(request.group, self.place.rank, method, request.step, count) == "drop-row":
            positional, keywords = _without_last_row((positional, keywords))
        if request.kind == "create":
            siblings = MappingProxyType(self._workers)
            context = WorkerContext(request.group, self.place, self.device, siblings, self)
            self._workers[request.group] = request.more(context, *positional, **keywords)
            result = None
        else:
            result = getattr(self._workers[request.group], method)(*positional, **keywords)
        self._note(method=f"after {method}", rows="")
        return result

    def answer(self, request: WorkerCall) -> WorkerReply:
        """Performs a request as a reply; an exception becomes a `CallFailure`."""
        try:
            return WorkerReply(request.id, "done", self.perform(request))
        except BaseException as error:
            return WorkerReply(request.id, "failed", self.failed(error))

    def reply(self, frames: Frames) -> WorkerReply:
        """Performs a message and returns a reply that can be sent. After a failure it performs none: peers may be in
        collectives.
        """
        if self._has_failed:
            threading.Event().wait()  # until the controller ends this process
        try:
            request = WorkerCall.read(frames)
        except Exception as error:  # the class or an argument cannot be made here, a module is missing for example
            return WorkerReply(WorkerCall.head(frames).id, "failed", self.failed(error))
        answer = self.answer(request)
        try:
            assert answer.frames
        except Exception as error:  # a result that cannot be sent
            return WorkerReply(answer.id, "failed", self.failed(error))
        return answer

    def failed(self, error: BaseException) -> CallFailure:
        """Describes an exception that ended a call."""
        self._has_failed = True
        return failed(error, self.doing | {"process": os.getpid(), "device": str(self.device)})

    def standing(self) -> Standing:
        """Describes where the thread that works is at this moment."""
        return standing(self._thread, time.monotonic() - self._last, self.doing | {"process": os.getpid()})

    def progress(self, rows: str) -> None:
        """Notes that the call makes progress, and which rows it works on."""
        self._note(**({"rows": rows} if rows else {}))

    def beat(self) -> None:
        """Writes memory as it is now into the black box."""
        if self._box is not None:
            self._box.write(**self.doing)

    def join_pool(self) -> None:
        """Makes the pool's process group, unless there is one already."""
        if self._joined or dist.is_initialized():
            return
        limit = timedelta(seconds=self.timeout)
        if self._meeting is None:
            store: Store = HashStore()
        else:
            store = TCPStore(self._meeting.host, self._meeting.port, is_master=False, timeout=limit)
            store = PrefixStore(f"{self._meeting.prefix}/{self.place.pool}", store)
        dist.init_process_group(
            kind_of(self.device.type).backend, store=store, rank=self.place.rank, world_size=self.place.size,
            timeout=limit,
        )  # fmt: skip
        self._joined = True

    def close(self) -> None:
        """Leaves the pool's process group, if this host made it."""
        if self._joined:
            dist.destroy_process_group()
            self._joined = False

    def _note(self, **facts: Any) -> None:
        self._last = time.monotonic()
        self.doing = self.doing | facts  # a new one: another thread may be reading the old
        self.beat()


def _without_last_row(call: Call) -> Call:
    def shorter(value: Any) -> Any:
        return value.take(range(len(value) - 1)) if isinstance(value, Batch) and len(value) else value

    return tuple(shorter(v) for v in call[0]), {name: shorter(v) for name, v in call[1].items()}


def serve_wire(wire: MessagePipe, host: WorkerHost, *, after_failure: Callable[[], None] | None = None) -> None:
    """Performs the messages of a wire until the controller closes it; a controller that is gone ends this process.

    A thread reads: a message never waits for a call to end, and the controller never for a process that is busy.

    Args:
        wire: to the controller.
        host: performs the messages.
        after_failure: called when a failure has been reported.
    """
    inbox: queue.SimpleQueue[Frames | None] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(wire, host, inbox), daemon=True).start()
    threading.Thread(target=keep_beating, args=(host,), daemon=True).start()
    while (frames := inbox.get()) is not None:
        answer = host.reply(frames)
        del frames
        wire.send(*answer.frames)
        if answer.kind == "failed" and after_failure is not None:
            after_failure()
    host.close()


def _read(wire: MessagePipe, host: WorkerHost, inbox: queue.SimpleQueue[Frames | None]) -> None:
    try:
        while frames := wire.receive():
            head = WorkerCall.head(frames)
            if head.kind == "where":
                wire.send(*WorkerReply(head.id, "where", host.standing()).frames)
            else:
                inbox.put(frames)
        inbox.put(None)  # an empty message: the controller is done
    except (EOFError, OSError):
        sys.stdout.flush()
        os._exit(0)  # nobody is left to read a reply, or the status


def keep_beating(host: WorkerHost) -> None:
    """Updates the black box's facts about memory; for a thread of its own."""
    while True:
        time.sleep(BEAT_SECONDS)
        host.beat()
