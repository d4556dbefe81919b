"""Processes of this host: the controller starts one for each place, and talks to them over pipes."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch

from hybridflow.config.sections.placement import PlacementSection
from hybridflow.controller.backend import check_devices
from hybridflow.controller.backends.forking import refuse_imported_program, start_server
from hybridflow.controller.codec import MessagePipe
from hybridflow.controller.meeting import LOCALHOST, meeting_point
from hybridflow.controller.messages import Lost, Meeting, Place, WorkerCall, WorkerReply
from hybridflow.controller.worker import WorkerHost, read_box, serve_wire
from hybridflow.devices import CPU, count_devices, pick_device

END_SECONDS = 5.0  # for a process that was asked to end
PR_SET_PDEATHSIG = 1  # of Linux's prctl: this signal when the parent dies


@dataclass(frozen=True)
class ProcessStart:
    """The arguments of a process when it starts."""

    place: Place
    device: str
    meeting: Meeting
    box: Path
    threads: int
    environment: dict[str, str]


class ProcessesBackend:
    """The back end of one host.

    Processes are forked from a server that has imported torch, so the import is paid for once.

    Args:
        placement: its port, and the time limit of collectives.
        device: ``run.device``.
        threads: of each process; None: OMP_NUM_THREADS, or the cores are shared among them.
        preload: modules that every process needs.
    """

    passes_exceptions = False

    def __init__(
        self, placement: PlacementSection, device: str, threads: int | None, preload: Sequence[str] = ()
    ) -> None:
        self._device, self._threads, self._preload = device, threads, preload
        self._port, self._timeout = placement.port or 0, placement.timeout
        self._folder = tempfile.TemporaryDirectory(prefix="hybridflow-")
        self._processes: dict[Place, ForkServerProcess] = {}
        self._wires: dict[Place, MessagePipe] = {}

    def check(self, places: Sequence[Place]) -> Iterable[str]:
        """Checks that there are as many devices as processes, and that the port is free."""
        refuse_imported_program()
        self._store = meeting_point(LOCALHOST, self._port)
        yield from check_devices(places, self._device)

    def start(self, places: Sequence[Place]) -> None:
        """Starts all of them at once."""
        context = start_server(self._preload)
        meeting = Meeting(LOCALHOST, self._store.port, "pools", self._timeout)
        wanted = self._threads or int(os.environ.get("OMP_NUM_THREADS", "0"))
        threads = wanted or max(1, count_devices(CPU) // len(places))
        atexit.register(self.kill)  # for a program that ends without closing
        for place in places:
            ours, theirs = context.Pipe()
            start = ProcessStart(place, self._device, meeting, self._box(place), threads, dict(os.environ))
            process = context.Process(target=_run, args=(start, theirs), name=str(place))
            process.start()
            theirs.close()
            self._processes[place], self._wires[place] = process, MessagePipe(ours, self._timeout)

    def send(self, place: Place, request: WorkerCall) -> None:
        """Sends a request over the process's pipe."""
        if place in self._wires:
            with contextlib.suppress(OSError):  # `receive` finds it gone, or the time limit finds it stopped
                self._wires[place].send(*request.frames)

    def receive(self, timeout: float) -> Sequence[tuple[Place, WorkerReply | Lost]]:
        """Returns the messages that have come over the pipes."""
        wires = {wire.connection: place for place, wire in self._wires.items()}
        came: list[tuple[Place, WorkerReply | Lost]] = []
        for ready in connection.wait(list(wires), timeout):
            assert isinstance(ready, Connection)
            place = wires[ready]
            try:
                came.append((place, WorkerReply.read(self._wires[place].receive())))
            except EOFError:
                came.append((place, self._lost(place)))
        return came

    def box(self, place: Place) -> Mapping[str, Any]:
        """Reads the process's file."""
        return read_box(self._box(place))

    def kill(self) -> None:
        """Ends all processes with SIGKILL: nothing that a worker could still do is wanted."""
        for process in self._processes.values():
            process.kill()
        self._join()

    def close(self) -> None:
        """Sends an empty message to each process, which asks it to end."""
        for wire in self._wires.values():
            with contextlib.suppress(OSError):
                wire.send()
        self._join()

    def _join(self) -> None:
        until = time.monotonic() + END_SECONDS
        for process in self._processes.values():
            process.join(max(0.0, until - time.monotonic()))
        for process in self._processes.values():
            process.kill()
            process.join()
        for wire in self._wires.values():
            wire.close()
        self._wires, self._processes = {}, {}
        atexit.unregister(self.kill)
        self._folder.cleanup()

    def _box(self, place: Place) -> Path:
        return Path(self._folder.name) / f"{place.index}.json"

    def _lost(self, place: Place) -> Lost:
        self._wires.pop(place).close()
        process = self._processes[place]
        process.join(END_SECONDS)
        code = process.exitcode
        if code is None:
            return Lost("its connection was closed")
        if code < 0:
            return Lost(f"killed by signal {-code} ({signal.Signals(-code).name})", -code)
        return Lost(f"its process ended by itself with exit status {code}")


def _run(start: ProcessStart, pipe: Connection) -> None:
    """Runs a process of a pool."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # the server ends with the controller
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all: the controller decides
    os.environ.clear()
    os.environ.update(start.environment)  # the server has that of its own start
    torch.set_num_threads(start.threads)
    device = pick_device(start.device, start.place.index)
    if device.type != "cpu":
        torch.accelerator.set_device_index(device)
    serve_wire(MessagePipe(pipe), WorkerHost(start.place, device, start.meeting, start.box))
