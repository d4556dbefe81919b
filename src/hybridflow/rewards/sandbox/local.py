"""Programs in jails of this machine: starts `jail.py`, writes its input, reads its output, and ends it at its limits.

This side is trusted. Of a program's output it parses only JSON, and reads no more than the limits.
"""

from __future__ import annotations

import fcntl
import functools
import json
import marshal
import math
import os
import select
import selectors
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import CodeType
from typing import Any, Literal

from hybridflow.rewards.sandbox import bubblewrap, seccomp
from hybridflow.rewards.sandbox.calls import function_call
from hybridflow.rewards.sandbox.outcome import Limits, Outcome, SandboxError, Status
from hybridflow.rewards.sandbox.view import TMP_BYTES, interpreter, privileged, view

Walls = Literal["local", "bubblewrap", "none"]

THREADS, OPEN_FILES, STACK_BYTES = 64, 64, 64 << 20
START_SECONDS = 120.0  # for building the walls; far above any normal start, for machines under heavy load

# Code that runs inside before a function is called, in one namespace.
_DRIVERS = {
    "run": ["calls.py"],
    "serve": ["values.py", "calls.py"],
    "check": ["values.py", "calls.py", "standins.py"],
}
_CHUNK = 1 << 16
_START = "import marshal,sys;r=marshal.load(open(int(sys.argv[1]),'rb'));exec(r['jail'],{'REQUEST':r})"
_OPTIONS = ("-S", "-s", "-P", "-B", "-X", "utf8")  # no site, no user's packages, nothing of the current folder
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK


class LocalSandbox:
    """Runs programs behind walls of this kernel. docs/sandbox.md describes the walls.

    Args:
        walls: "local" (built here), "bubblewrap" (namespaces and mounts by bwrap, the rest here), or "none".
        limits: of each program.
        parallel: programs at once.
    """

    def __init__(self, walls: Walls, limits: Limits, parallel: int) -> None:
        self.walls, self.limits, self.parallel = walls, limits, parallel
        self._slots = threading.BoundedSemaphore(parallel)

    def run(self, program: str, stdin: str) -> Outcome:
        """See `Sandbox.run`."""
        with self._slots, _Jail(self.walls, self.limits, "run", [program], stdin=stdin) as jail:
            return jail.finish()

    def call(self, program: str, name: str, arguments: list[object]) -> Outcome:
        """See `Sandbox.call`."""
        with self._slots, _Descriptors() as fds:
            requests = fds.sealed(json.dumps(function_call(name, arguments)) + "\n")
            result, replies = fds.pipe()
            served = [program, requests, replies, True]
            with _Jail(self.walls, self.limits, "serve", served, keep=[requests, replies]) as jail:
                fds.close(replies)
                return jail.finish(result)

    def check(self, program: str, test: str) -> Outcome:
        """See `Sandbox.check`. The test has a jail of its own, which two pipes connect to the program's.

        A test that used built-ins of the program's own is run once more, with the real ones; see `standins.py`.
        """
        outcome = self._check(program, test, genuine=False)
        if outcome.status == "ok" and outcome.shadowed:
            return self._check(program, test, genuine=True)
        return outcome

    def _check(self, program: str, test: str, *, genuine: bool) -> Outcome:
        with self._slots, _Descriptors() as fds:
            requests_out, requests_in = fds.pipe()
            replies_out, replies_in = fds.pipe()
            result, verdict = fds.pipe()
            theirs, ours = [requests_out, replies_in], [requests_in, replies_out, verdict]
            serving = [program, *theirs, False]
            with _Jail(
                self.walls, self.limits, "serve", serving, keep=theirs, quiet=True, idle=START_SECONDS
            ) as solution:
                fds.close(*theirs)
                # The time of the test begins where the program's walls stand: it writes a line before it loads.
                ready = select.poll()
                ready.register(replies_out, select.POLLIN)
                ready.poll(START_SECONDS * 1000)
                with _Jail(self.walls, self.limits, "check", [test, *ours, genuine], keep=ours, quiet=True) as checker:
                    fds.close(*ours)
                    outcome = checker.finish(result)
                solution.stop()
                beside = solution.finish()
        said = json.loads(outcome.result or "{}")  # by the test's side; the program cannot write there
        outcome = replace(outcome, result=None, strange=said.get("strange", False))
        if outcome.status == "ok" and not said.get("passed"):
            return replace(outcome, status="error", stderr="the test did not come to its end", code=1)
        outcome = replace(outcome, asked=said.get("asked", False), shadowed=said.get("shadowed", False))
        if outcome.status == "error" and beside.status == "timeout":
            return beside  # its time ended a moment before that of the test, which waited for it
        return outcome


class _Descriptors:
    """File descriptors that are closed at the end of a block, if not before."""

    def __init__(self) -> None:
        self._open: set[int] = set()

    def __enter__(self) -> _Descriptors:
        return self

    def __exit__(self, *_: object) -> None:
        self.close(*self._open)

    def pipe(self) -> tuple[int, int]:
        """Returns a pipe: its end to read from and its end to write to."""
        ends = os.pipe()
        self._open.update(ends)
        return ends

    def sealed(self, content: str | bytes) -> int:
        """Returns a file in memory that holds these bytes and cannot be changed."""
        fd = os.memfd_create("sealed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self._open.add(fd)
        with open(fd, "wb", closefd=False) as file:
            file.write(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        os.lseek(fd, 0, os.SEEK_SET)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        return fd

    def close(self, *fds: int) -> None:
        """Closes those that are still open."""
        for fd in {*fds} & self._open:
            self._open.discard(fd)
            os.close(fd)


class _Jail:
    """One program, from its start to its outcome. A context manager that always ends the program.

    Args:
        walls: see `LocalSandbox`.
        limits: of the program.
        function: the one of `_DRIVERS` that is called inside.
        arguments: of that function.
        stdin: what the program can read.
        keep: descriptors that it keeps in addition to its standard streams.
        quiet: its standard streams are not read.
        idle: further seconds without progress, for walls that are built elsewhere.
    """

    def __init__(
        self,
        walls: Walls,
        limits: Limits,
        function: str,
        arguments: Sequence[Any],
        *,
        stdin: str = "",
        keep: Sequence[int] = (),
        quiet: bool = False,
        idle: float = 0.0,
    ) -> None:
        self.limits = limits
        self._fds = _Descriptors()
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        try:
            self._report, report = self._fds.pipe()
            lifeline, self._lifeline = self._fds.pipe()
            if walls == "none":
                self._folder = tempfile.TemporaryDirectory(prefix="hybridflow-code-")
            request = _settings(walls, limits) | {
                "seconds": limits.seconds + idle,
                "driver": [_code(name) for name in _DRIVERS[function]],
                "call": (function, list(arguments)),
                "keep": list(keep),
                "report": report,
                "lifeline": lifeline,
                "folder": "/tmp" if self._folder is None else self._folder.name,
            }
            given = self._fds.sealed(marshal.dumps(request))
            streams = subprocess.DEVNULL if quiet else subprocess.PIPE
            self._process = subprocess.Popen(
                [*_before(walls), interpreter(), *_OPTIONS, "-c", _START, str(given)],
                stdin=self._fds.sealed(stdin),
                stdout=streams,
                stderr=streams,
                env={"PYTHONHASHSEED": "0"},  # equal programs have equal outcomes
                pass_fds=[given, report, lifeline, *keep],
                start_new_session=True,
            )
        except OSError as error:
            self._fds.__exit__()
            raise SandboxError(f"the jail could not be started: {error}") from error
        self._fds.close(report, lifeline, given)

    def __enter__(self) -> _Jail:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        try:
            self._process.wait(timeout=START_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for stream in (self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()
        self._fds.__exit__()
        if self._folder is not None:
            self._folder.cleanup()

    def stop(self) -> None:
        """Ends the program, if it has not ended."""
        self._fds.close(self._lifeline)

    def finish(self, result: int | None = None) -> Outcome:
        """Waits for the end of the program, and reads what it writes meanwhile (`result`: one more descriptor).

        Raises:
            SandboxError: the walls could not be built, or the supervisor has ended.
        """
        names = {self._report: "report"} | ({} if result is None else {result: "result"})
        if self._process.stdout is not None and self._process.stderr is not None:
            names |= {self._process.stdout.fileno(): "stdout", self._process.stderr.fileno(): "stderr"}
        taken = {name: bytearray() for name in names.values()}
        too_much = self._read(names, taken)
        report = taken.pop("report").decode(errors="replace").split()
        if not report or report[0] != "ended":
            said = taken.get("stderr", b"").decode(errors="replace").strip()
            raise SandboxError("the jail failed: " + (" ".join(report[1:]) or said[-300:] or "it was killed"))
        how, code, cpu, peak = report[1], int(report[2]), float(report[3]), int(report[4])
        status: Status = "ok" if (how, code) == ("exited", 0) else "error"
        if how == "timeout":
            status = "timeout"
        if too_much:
            status = "output"
        texts = {name: bytes(text).decode("utf-8", "replace") for name, text in taken.items()}
        return Outcome(
            status,
            stdout=texts.get("stdout", ""),
            stderr=texts.get("stderr", ""),
            code=code if how == "exited" else -code,
            cpu_seconds=cpu,
            peak_kb=peak,
            result=texts.get("result"),
        )

    def _read(self, names: dict[int, str], taken: dict[str, bytearray]) -> bool:
        """Reads until the supervisor has reported; returns whether the program wrote more than it may."""
        most = self.limits.output_kb << 10
        deadline = time.monotonic() + START_SECONDS + self.limits.seconds
        too_much = False
        with selectors.DefaultSelector() as selector:
            for fd in names:
                os.set_blocking(fd, False)
                selector.register(fd, selectors.EVENT_READ)
            reported = False
            while selector.get_map():
                # After the report nothing more is written: read the rest of the pipes without waiting.
                ready = selector.select(0 if reported else max(0.0, deadline - time.monotonic()))
                if not ready and reported:
                    break
                if not ready:
                    self._process.kill()
                    raise SandboxError(f"the jail did not answer within {START_SECONDS + self.limits.seconds:.0f} s")
                for key, _ in ready:
                    chunk, text = os.read(key.fd, _CHUNK), taken[names[key.fd]]
                    full = len(text) + len(chunk) > most
                    text += chunk[: most - len(text)]
                    if full:
                        too_much = True
                        self.stop()
                    if full or not chunk:
                        selector.unregister(key.fd)
                        reported = reported or key.fd == self._report
        return too_much


@functools.cache
def _code(name: str) -> CodeType:
    path = Path(__file__).with_name(name)
    return compile(path.read_text(encoding="utf-8"), name, "exec", dont_inherit=True)


def _settings(walls: Walls, limits: Limits) -> dict[str, Any]:
    """Returns the part of a request that is the same for every program."""
    bounds = {
        "AS": limits.memory_mb << 20,
        "CPU": math.ceil(limits.seconds),
        "FSIZE": TMP_BYTES,
        "NOFILE": OPEN_FILES,
        "STACK": STACK_BYTES,
        "CORE": 0,
        "MEMLOCK": 0,
        "MSGQUEUE": 0,
    }
    if walls != "none":  # without a user namespace the threads of all programs of this user are counted together
        bounds["NPROC"] = THREADS
    return {
        "jail": _code("jail.py"),
        "walls": walls,
        "privileged": privileged(),
        "view": view(),
        "filter": seccomp.build(os.uname().machine),
        "limits": bounds,
    }


def _before(walls: Walls) -> list[str]:
    if walls != "bubblewrap":
        return []
    found = bubblewrap.installed()
    if found is None:
        raise SandboxError("bwrap is not installed")
    return bubblewrap.command(found, view(), interpreter(), privileged())
