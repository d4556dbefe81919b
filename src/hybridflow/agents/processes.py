"""Processes in which tools and environments run, so that one that hangs or dies costs its own trajectory alone.

Each process holds the objects of many trajectories and makes one call at a time. A call that takes too long, or that
ends its process, fails; the process is started again, and the objects of other trajectories are rebuilt in it when they
are next called: made again, with the same calls in the same order.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from hybridflow.agents.host import LENGTH, framed
from hybridflow.agents.world import CallTimeout

START = 60.0  # seconds that a process may take to start and to load its first function
_PROGRAM = "import sys; sys.path[:] = sys.argv[2:]; from hybridflow.agents.host import main; main(int(sys.argv[1]))"


class ProcessDied(Exception):
    """The process ended during a call."""


class CallRaised(Exception):
    """A call raised in its process.

    Args:
        said: kind and text of the exception.
        trace: its traceback there.
    """

    def __init__(self, said: str, trace: str) -> None:
        super().__init__(said)
        self.add_note(trace)


class Host:
    """One process.

    Args:
        seconds: that a call may take.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.lock = asyncio.Lock()  # held during a call
        self.life = 0  # which process it is, counted
        self._loaded: set[str] = set()  # what the process has imported
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def ask(self, what: str, *args: Any) -> Any:
        """Makes a call; the lock is held.

        Raises:
            CallTimeout: it took too long; the process was ended.
            ProcessDied: the process ended by itself.
            CallRaised: the call raised.
        """
        await self.start()
        if what in ("function", "make"):
            reference = args[0] if what == "function" else args[1]
            if reference not in self._loaded:
                await self._exchange(START, f"the import of {reference}", "load", reference)
                self._loaded.add(reference)
        name = what if what == "close" else str(args[0] if what == "function" else args[1])
        return await self._exchange(self.seconds, name, what, *args)

    async def _exchange(self, seconds: float, name: str, *message: Any) -> Any:
        """Sends a message and returns the answer; see `ask`."""
        assert self._reader is not None and self._writer is not None
        try:
            async with asyncio.timeout(seconds):
                self._writer.write(framed(message))
                await self._writer.drain()
                head = await self._reader.readexactly(LENGTH.size)
                reply = pickle.loads(await self._reader.readexactly(LENGTH.unpack(head)[0]))
        except TimeoutError:
            self.end()
            raise CallTimeout(f"{name} took longer than {seconds:g} seconds (agent.call_timeout)") from None
        except asyncio.CancelledError:  # its answer would be taken for that of the next call
            self.end()
            raise
        except (asyncio.IncompleteReadError, ConnectionError):
            raise ProcessDied(f"the process of {name} {self.end()}") from None
        if reply[0] == "raised":
            raise CallRaised(*reply[1:])
        return reply[1]

    @property
    def runs(self) -> bool:
        """Whether there is a process."""
        return self._process is not None

    async def start(self) -> None:
        """Starts the process, where none runs."""
        if self._process is not None:
            return
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-c", _PROGRAM, str(theirs.fileno()), *filter(None, sys.path)]
        # A session of its own: Ctrl-C is for the run, which ends its processes in order.
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], start_new_session=True
        )
        theirs.close()
        self._reader, self._writer = await asyncio.open_connection(sock=ours)
        self.life += 1
        self._loaded.clear()

    def end(self) -> str:
        """Ends the process and all that it started; says how it ended."""
        process, self._process = self._process, None
        if process is None:
            return "had not begun"
        if self._writer is not None:
            self._writer.close()
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


class HostPool:
    """All processes of a run. Made and used in the event loop of the agents.

    Args:
        count: how many.
        seconds: that a call may take.
    """

    def __init__(self, count: int, seconds: float) -> None:
        self._hosts: list[Host] = []
        self._count, self._seconds = count, seconds
        self._turn, self._numbers = itertools.count(), itertools.count()

    def _next(self) -> Host:
        if not self._hosts:  # locks belong to the running loop
            self._hosts = [Host(self._seconds) for _ in range(self._count)]
        return self._hosts[next(self._turn) % self._count]

    async def function(self, reference: str, arguments: Mapping[str, Any]) -> Any:
        """Calls a function; any process takes it."""
        host = self._next()
        async with host.lock:
            return await host.ask("function", reference, dict(arguments))

    def object(self, reference: str, arguments: Mapping[str, Any]) -> RemoteObject:
        """Returns an object that is made in a process when it is first called.

        Args:
            reference: of its class, or of a function that returns it.
            arguments: what that is called with.
        """
        return RemoteObject(self._next(), next(self._numbers), reference, dict(arguments))

    def close(self) -> None:
        """Ends all processes."""
        for host in self._hosts:
            host.end()


class RemoteObject:
    """An object in a process, with all that was asked of it, to make it again.

    Args:
        host: its process.
        number: of the object.
        reference: of what makes it.
        arguments: of that.
    """

    def __init__(self, host: Host, number: int, reference: str, arguments: dict[str, Any]) -> None:
        self.host, self.number, self.reference, self.arguments = host, number, reference, arguments
        self._life = 0  # the process that it is in; 0: none yet
        self._asked: list[tuple[str, Sequence[Any], Mapping[str, Any]]] = []

    async def call(self, name: str, *placed: Any, **named: Any) -> Any:
        """Calls a method.

        Raises:
            CallTimeout, ProcessDied, CallRaised: see `Host.ask`; after the first two the object
                is made again without that call.
        """
        async with self.host.lock:
            await self.host.start()
            if self._life != self.host.life:
                await self.host.ask("make", self.number, self.reference, self.arguments)
                self._life = self.host.life
                for earlier in self._asked:
                    with suppress(CallRaised):  # as it did the first time
                        await self.host.ask("method", self.number, *earlier)
            asked = name, placed, named
            try:
                value = await self.host.ask("method", self.number, *asked)
            except CallRaised:
                self._asked.append(asked)
                raise
            self._asked.append(asked)  # a call that ended its process is not made again with the others
            return value

    async def close(self) -> None:
        """Closes the object, if its process still has it."""
        async with self.host.lock:
            if self._life and self._life == self.host.life and self.host.runs:
                await self.host.ask("close", self.number)
