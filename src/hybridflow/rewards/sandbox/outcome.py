"""The outcome and the limits of a program. Shared by all back ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

Status = Literal["ok", "error", "timeout", "output"]


class SandboxError(RuntimeError):
    """The sandbox, not the program, has failed: there is no outcome, and there must be no score."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one program may use.

    Args:
        seconds: wall-clock time from its first line to its end, and CPU time of all its threads.
        memory_mb: address space, MiB.
        output_kb: most that it may write to its output, or return, KiB.
    """

    seconds: float
    memory_mb: int
    output_kb: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of a program.

    Args:
        status: "ok" (exit status 0), "error" (another status, or killed by a signal), "timeout", or "output" (ended
            because it wrote too much).
        stdout: its output, at most `Limits.output_kb`.
        stderr: the same for the other stream.
        code: exit status, or the negative number of the signal.
        cpu_seconds: its CPU time; 0 where the back end does not say.
        peak_kb: its greatest resident memory, KiB; 0 where the back end does not say.
        result: what the called function returned, as JSON of `calls.py`; None unless a function was called.
        asked: whether a test used anything that the program defines.
        strange: whether a test met an object of the program's that it cannot compare, or could not give it something.
        shadowed: whether a test used built-ins that the program redefines, and other names of the program.
    """

    status: Status
    stdout: str = ""
    stderr: str = ""
    code: int = 0
    cpu_seconds: float = 0.0
    peak_kb: int = 0
    result: str | None = None
    asked: bool = True
    strange: bool = False
    shadowed: bool = False


class Sandbox(Protocol):
    """Runs programs. All methods may be called from several threads at once."""

    parallel: int

    def run(self, program: str, stdin: str) -> Outcome:
        """Runs a program with that input.

        Raises:
            SandboxError: no outcome could be had.
        """

    def call(self, program: str, name: str, arguments: list[object]) -> Outcome:
        """Loads a program and calls one function of it (of its class ``Solution``, where it has no such function).

        Raises:
            SandboxError: no outcome could be had.
        """

    def check(self, program: str, test: str) -> Outcome:
        """Runs a test, Python text with assert statements, against a program; "ok" if the test passes.

        Raises:
            SandboxError: no outcome could be had.
        """
