"""One process of the pool, as its parent sees it: its start, messages that never block, and its end with all that it
has started itself.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hybridflow.rewards.pool.worker import Frames, frame

if TYPE_CHECKING:
    from hybridflow.rewards.pool.calls import Call

START = 60.0  # seconds that a process may take to start and load its functions
GRACE = 1.0  # seconds for what a process does at its exit
_PROGRAM = (
    "import sys; sys.path[:] = sys.argv[3:]; "
    "from hybridflow.rewards.pool.worker import main; main(int(sys.argv[1]), int(sys.argv[2]))"
)


@dataclass(eq=False, slots=True)
class Wire:
    """Messages to and from a process; no method blocks.

    Args:
        connection: our end of its socket.
        frames: what has arrived.
        unsent: what could not be sent yet.
    """

    connection: socket.socket
    frames: Frames = field(default_factory=Frames)
    unsent: bytearray = field(default_factory=bytearray)

    def send(self, message: tuple[Any, ...]) -> None:
        """Sends what the socket takes at once, and keeps the rest for `flush`."""
        self.unsent += frame(message)
        self.flush()

    def flush(self) -> None:
        """Sends more of what is kept."""
        with suppress(BlockingIOError, ConnectionError):  # its death is noticed where its replies are read
            while self.unsent:
                del self.unsent[: self.connection.send(self.unsent)]

    def receive(self) -> tuple[list[Any], bool]:
        """Returns all messages that have arrived, and whether these were the last."""
        messages: list[Any] = []
        while True:
            try:
                data = self.connection.recv(1 << 18)
            except BlockingIOError:
                return messages, False
            except ConnectionError:
                return messages, True
            if not data:
                return messages, True
            messages += self.frames.feed(data)


@dataclass(eq=False, slots=True)
class PoolProcess:
    """One process of the pool; `start_process` makes it.

    Args:
        process: the process; it leads a group of its own, so that what it starts can be ended with it.
        wire: messages to it and from it.
        exited: a handle that becomes readable when it exits; None where the system has no such thing.
        until: the time at which it counts as unable to start, of `time.monotonic`.
        ready: whether it has loaded its functions.
        checks: whether it was also asked to check them.
        asynchronous: whether it has ``async def`` functions; None until its first call.
        calls: its calls without a result, in their order, by number of the task and index.
        since: when the first of them began.
        passed_over: whether one call takes so long that other processes take the calls that wait.
        forget: whether calls that have not begun are to be withdrawn.
    """

    process: subprocess.Popen[bytes]
    wire: Wire
    exited: int | None
    until: float
    checks: bool
    ready: bool = False
    asynchronous: bool | None = None
    calls: dict[tuple[int, int | None], Call] = field(default_factory=dict)
    since: float = 0.0
    passed_over: bool = False
    forget: bool = False

    def end(self, grace: float = 0.0) -> str:
        """Ends it and what it has started, and says how it ended.

        Args:
            grace: seconds for it to exit, now that its socket is closed.
        """
        self.wire.connection.close()
        if self.exited is not None:
            poll = select.poll()
            poll.register(self.exited)
            poll.poll(grace * 1000)
            os.close(self.exited)
        # It is not reaped yet, so the number of its group cannot be another's.
        with suppress(ProcessLookupError, PermissionError):  # macOS: of a group that has only exited processes
            os.killpg(self.process.pid, signal.SIGKILL)
        code = self.process.wait()
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def start_process(folder: str, path: Sequence[str], checks: bool) -> PoolProcess:
    """Starts a process and returns at once.

    Args:
        folder: its current folder.
        path: its `sys.path`.
        checks: see `PoolProcess`.
    """
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-X", "faulthandler", "-c", _PROGRAM, str(theirs.fileno()), str(os.getpid()), *path]
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=2,  # the output of a reward must not mix with the output of the run
        pass_fds=[theirs.fileno()],
        start_new_session=True,  # Ctrl-C is for the parent, which decides
    )
    theirs.close()
    ours.setblocking(False)
    return PoolProcess(process, Wire(ours), _exit_handle(process.pid), time.monotonic() + START, checks)


def _exit_handle(pid: int) -> int | None:
    if sys.platform != "linux":
        return None
    try:
        return os.pidfd_open(pid)
    except OSError:  # some containers forbid it; the end of its socket shows the same, unless a reward has forked
        return None
