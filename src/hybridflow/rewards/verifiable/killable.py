"""Calls that may hang or eat all memory, in a process of their own that can be killed.

Some comparisons cannot be stopped from within: a regular expression that backtracks, sympy in a long multiplication.
Python's signals would work in the main thread only. So each process that needs them runs them in one child, which is
started with the first call, serves any thread (one call at a time), and is killed and replaced when a call goes over
its limit. The limit is CPU time, which is much the same however busy the machine is, and the kernel holds it.

What may be called is ``module:function``; arguments and the value are JSON.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from typing import Any

MEMORY_BYTES = 2 << 30
START_SECONDS = 120  # for a child to start and to import what is called
WALL_FACTOR = 20  # a call may take this many times its CPU seconds: other processes need the CPU too


class Undecided(Exception):
    """A call did not end within its limits; the message gives the reason."""


class _Child:
    """A process that serves calls. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._unread = b""

    def call(self, function: str, arguments: list[Any], seconds: float) -> Any:
        request = json.dumps([function, arguments, seconds]).encode() + b"\n"
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
            assert self._process is not None and self._process.stdin is not None
            try:
                self._process.stdin.write(request)
                self._process.stdin.flush()
                started = self._read(START_SECONDS)
                if "error" in started:
                    raise ImportError(f"{function} cannot be called: {started['error']}")
                reply = self._read(seconds * WALL_FACTOR)
            except (EOFError, BrokenPipeError, TimeoutError):
                raise Undecided(self._end(seconds)) from None
        if "error" in reply:
            raise Undecided(reply["error"])
        return reply["value"]

    def _start(self) -> None:
        self._unread = b""
        command = [sys.executable, "-P", "-m", "hybridflow.rewards.verifiable.killable"]
        # Its own process group: Ctrl-C is for the run, which ends it in its own time.
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, process_group=0
        )

    def _read(self, seconds: float) -> dict[str, Any]:
        """Reads the next line. Raises EOFError where the process ended, TimeoutError after this many seconds."""
        assert self._process is not None and self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        end = time.monotonic() + seconds
        while b"\n" not in self._unread:
            if not poll.poll(max(0.0, 1000 * (end - time.monotonic()))):
                raise TimeoutError
            chunk = os.read(descriptor, 1 << 16)
            if not chunk:
                raise EOFError
            self._unread += chunk
        line, _, self._unread = self._unread.partition(b"\n")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _end(self, seconds: float) -> str:
        """Kills the process; the next call starts another. Returns what it died of."""
        assert self._process is not None
        self._process.kill()
        code = self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):  # what it never read
                assert stream is not None
                stream.close()
        self._process = None
        if code == -signal.SIGPROF:
            return f"it took more than {seconds:g} seconds of CPU time"
        if code == -signal.SIGKILL:
            return f"it took more than {seconds * WALL_FACTOR:g} seconds, or was killed"
        return f"its process ended with code {code}"


_CHILDREN: dict[int, _Child] = {}  # by process: a fork must not share its parent's child


def call(function: str, *arguments: Any, seconds: float = 5.0) -> Any:
    """Returns the value of ``module:function`` for the arguments, from a process that can be killed.

    >>> call("math:gcd", 12, 18)
    6

    Args:
        function: what to call; it is imported there.
        arguments: anything that JSON can hold.
        seconds: of CPU time.

    Raises:
        Undecided: it took too long, or too much memory or recursion, or its process died.
        ImportError: there is no such function.
        RuntimeError: it raised something else.
    """
    child = _CHILDREN.setdefault(os.getpid(), _Child())
    value, failed = child.call(function, list(arguments), seconds)
    if failed:
        raise RuntimeError(f"{function} raised {failed}")
    return value


def _answer(function: Any, arguments: list[Any], seconds: float) -> dict[str, Any]:
    signal.setitimer(signal.ITIMER_PROF, seconds)  # SIGPROF, which nothing handles: the kernel ends this process
    try:
        return {"value": [function(*arguments), ""]}
    except (MemoryError, RecursionError) as error:
        return {"error": f"it went over a limit: {type(error).__name__} {error}".strip()}
    except Exception as error:
        return {"value": [None, f"{type(error).__name__}: {error}"]}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def serve() -> None:
    """Runs the child: answers requests from stdin, until its parent has ended."""
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what is called may print
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(hard, MEMORY_BYTES)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin.buffer:
        reference, arguments, seconds = json.loads(line)
        module, _, name = reference.partition(":")
        try:
            function = getattr(importlib.import_module(module), name)
        except Exception as error:
            replies.write(json.dumps({"error": f"{type(error).__name__}: {error}"}).encode() + b"\n")
            continue
        replies.write(b"{}\n")
        replies.write(json.dumps(_answer(function, arguments, seconds)).encode() + b"\n")


if __name__ == "__main__":
    serve()
