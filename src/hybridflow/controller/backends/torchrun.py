"""Processes that torchrun has started: the first is the controller and a worker, the others serve it.

They are dealt to the pools in order of their rank. Messages go over connections of the standard library to the first
process, with a key that it draws and leaves in torchrun's store. Its own share of a call runs in the call itself, after
the others have received theirs; meanwhile a thread watches the others.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import secrets
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from multiprocessing import AuthenticationError, connection
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import torch
from torch.distributed.rendezvous import rendezvous

from hybridflow.config.sections.placement import PlacementSection
from hybridflow.controller.codec import MessagePipe, decode, encode
from hybridflow.controller.messages import Lost, Meeting, Place, WorkerCall, WorkerReply
from hybridflow.controller.worker import WorkerHost, read_box, serve_wire
from hybridflow.devices import pick_device
from hybridflow.errors import UserError

KEY = "hybridflow/controller"  # in torchrun's store: where the controller listens
COME_OUT_SECONDS = 10.0  # for the controller's own share of a call, when a worker has failed
LOCAL = ("localhost", "127.0.0.1", "::1")


class TorchrunBackend:
    """The back end of processes that exist already.

    Args:
        placement: its pools, whose sizes add up to torchrun's processes, and the time limit of collectives.
        device: ``run.device``.
        threads: of each process; None leaves them as they are.
    """

    passes_exceptions = False

    def __init__(self, placement: PlacementSection, device: str, threads: int | None) -> None:
        if os.environ.get("RANK") != "0":
            raise UserError(
                "torchrun's first process is the controller, and this is another (or torchrun did not start it)",
                fix="call hybridflow.controller.backends.torchrun.serve() in the others; start with torchrun "
                "--nproc-per-node N",
            )
        self._world = int(os.environ["WORLD_SIZE"])
        self._device, self._threads, self._timeout = device, threads, placement.timeout
        self._folder = tempfile.TemporaryDirectory(prefix="hybridflow-")
        self._wires: dict[Place, MessagePipe] = {}
        self._inbox: list[tuple[Place, WorkerReply | Lost]] = []
        self._own: list[WorkerCall] = []
        self._performing = False
        self._look: Callable[[float], None] = lambda seconds: None

    def check(self, places: Sequence[Place]) -> Iterable[str]:
        """Checks that the pools have as many processes as torchrun has started."""
        if len(places) != self._world:
            pools = " + ".join(f"{pool} {sum(p.pool == pool for p in places)}" for pool in {p.pool: 0 for p in places})
            raise UserError(
                f"placement.pools has {len(places)} processes ({pools}), and torchrun has started {self._world}",
                fix=f"give pools of {self._world} together, or start {len(places)} (--nproc-per-node, --nnodes)",
            )
        return []

    def start(self, places: Sequence[Place]) -> None:
        """Waits for the others to connect."""
        store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=self._timeout)))
        host = os.environ["MASTER_ADDR"]
        key = secrets.token_bytes(32)
        self._place = places[0]
        self._host = self._make_host(places[0])
        with Listener((host if host in LOCAL else "", 0), backlog=len(places), authkey=key) as listener:
            store.set(_key(), pickle.dumps((host, listener.address[1], key)))
            while len(self._wires) < len(places) - 1:
                try:
                    wire = MessagePipe(listener.accept(), self._timeout)
                except (AuthenticationError, EOFError, ConnectionError):  # another process has found the port
                    continue
                place = places[decode(wire.receive())]
                wire.send(*encode((place, self._device, self._threads, self._meeting(), self._box(place))))
                self._wires[place] = wire
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, _end_soon)

    def attend(self, look: Callable[[float], None]) -> None:
        """Sets the function that a thread calls, again and again, while the controller's own share of a call runs."""
        self._look = look

    def send(self, place: Place, request: WorkerCall) -> None:
        """Sends a request to another process over its wire; the controller's own share waits until `receive`."""
        if place != self._place:
            with contextlib.suppress(OSError, KeyError):  # `receive` finds it gone
                self._wires[place].send(*request.frames)
        elif request.kind == "where":
            self._inbox.append((place, WorkerReply(request.id, "where", self._host.standing())))
        else:
            self._own.append(request)

    def receive(self, timeout: float) -> Sequence[tuple[Place, WorkerReply | Lost]]:
        """Performs the controller's own share, if there is some, else waits for the others."""
        if self._own and not self._performing:
            with self._watched():
                return [(self._place, self._host.answer(self._own.pop(0)))]
        came, self._inbox = self._inbox, []
        wires = {wire.connection: place for place, wire in self._wires.items()}
        if not wires and not came:
            time.sleep(timeout)
        for ready in connection.wait(list(wires), 0 if came else timeout):
            assert isinstance(ready, Connection)
            place = wires[ready]
            try:
                came.append((place, WorkerReply.read(self._wires[place].receive())))
            except EOFError:
                self._wires.pop(place).close()
                came.append((place, Lost("its process has ended, or the network is gone; torchrun reports its signal")))
        return came

    def box(self, place: Place) -> Mapping[str, Any]:
        """Reads the process's file, if it is on this host."""
        return read_box(self._box(place))

    def kill(self) -> None:
        """Closes the connections: a process without one ends itself."""
        for wire in self._wires.values():
            wire.close()
        self._wires = {}
        self._folder.cleanup()

    def close(self) -> None:
        """Sends an empty message to each process, which asks it to end."""
        for wire in self._wires.values():
            with contextlib.suppress(OSError):
                wire.send()
        self._host.close()
        self.kill()

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """Runs the block while a thread watches the other workers; raises the failure that it finds."""
        over, found = threading.Event(), list[UserError]()

        def look() -> None:
            while not over.is_set():
                try:
                    self._look(0.2)
                except UserError as failure:
                    found.append(failure)
                    if not over.wait(COME_OUT_SECONDS):  # we wait for a worker that is gone
                        print(f"error: {failure}", file=sys.stderr, flush=True)
                        os._exit(1)

        self._performing = True
        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            self._performing = False
            if found:
                raise found[0]

    def _meeting(self) -> Meeting:
        return Meeting(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), _key(), self._timeout)

    def _box(self, place: Place) -> Path:
        return Path(self._folder.name) / f"{place.index}.json"

    def _make_host(self, place: Place) -> WorkerHost:
        return _host(place, self._device, self._threads, self._meeting(), self._box(place))


def serve() -> None:
    """Works for the controller until it ends: in every process that torchrun started but the first."""
    rank = int(os.environ["RANK"])
    store, _, _ = next(rendezvous("env://"))
    host, port, key = pickle.loads(store.get(_key()))
    with Client((host, port), authkey=key) as pipe:
        wire = MessagePipe(pipe)
        wire.send(*encode(rank))
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the controller decides
        serve_wire(wire, _host(*decode(wire.receive())), after_failure=_leave)


def _host(place: Place, device: str, threads: int | None, meeting: Meeting, box: Path) -> WorkerHost:
    if threads is not None:
        torch.set_num_threads(threads)
    here = pick_device(device, int(os.environ["LOCAL_RANK"]))
    if here.type != "cpu":
        torch.accelerator.set_device_index(here)
    return WorkerHost(place, here, meeting, box if box.parent.is_dir() else None)


def _key() -> str:
    return f"{KEY}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def _leave() -> None:
    """Ends a process that has reported its failure: the others then come out of collectives that it will not join.

    Its status is 0, because torchrun would end the controller before the controller can report the cause.
    """
    sys.stdout.flush()
    os._exit(0)


def _end_soon(number: int, frame: object) -> None:
    """Delays the end: torchrun ends all processes when one has died, and the controller first reports which one, and
    why.
    """
    timer = threading.Timer(COME_OUT_SECONDS, os._exit, args=(128 + number,))
    timer.daemon = True
    timer.start()
