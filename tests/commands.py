"""The command line in a process of its own, for tests of signals: forked from one that has imported everything.

A small run spends more time on its imports than on its steps. The server of forks is an ordinary Python, started once
in a test process; what it forks is the leader of a session, as a command at a terminal is, and ends like any program.
Tests that look at a process from outside (its command line, its environment) start `python -m hybridflow` instead.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SRC = Path(__file__).resolve().parents[1] / "src"


class Command:
    """A command that runs. `said` and `complained` are what it has printed so far."""

    def __init__(self, arguments: list[str], folder: Path, environment: dict[str, str]) -> None:
        count = len(list(folder.glob("said-*.txt")))
        self._out, self._err = folder / f"said-{count}.txt", folder / f"complained-{count}.txt"
        started = {"arguments": arguments, "out": str(self._out), "err": str(self._err), "environment": environment}
        self.pid: int = _ask(started)
        self.status: int | None = None

    @property
    def said(self) -> str:
        return self._out.read_text() if self._out.exists() else ""

    @property
    def complained(self) -> str:
        return self._err.read_text() if self._err.exists() else ""

    def poll(self) -> int | None:
        """Its exit status, or None while it runs."""
        if self.status is None:
            self.status = _ask({"ended": self.pid})
        return self.status

    def wait(self, seconds: float) -> int:
        until = time.monotonic() + seconds
        while (status := self.poll()) is None:
            assert time.monotonic() < until, f"it runs after {seconds} s\n{self.said}\n{self.complained}"
            time.sleep(0.02)
        return status

    def signal(self, number: signal.Signals) -> None:
        """To all processes of the command, as a terminal does."""
        os.killpg(self.pid, number)

    def kill(self) -> None:
        if self.poll() is None:
            self.signal(signal.SIGKILL)
            self.wait(10)


def start(arguments: list[str], folder: Path, **environment: str) -> Command:
    """Starts `hybridflow ARGUMENTS`; what it prints goes to files of the folder."""
    return Command(arguments, folder, environment)


def run(arguments: list[str], folder: Path, seconds: float = 250, **environment: str) -> Command:
    """Runs `hybridflow ARGUMENTS` to its end."""
    command = start(arguments, folder, **environment)
    try:
        command.wait(seconds)
    finally:
        command.kill()
    return command


@functools.cache
def _server() -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": f"{SRC}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    return subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )


def _ask(question: dict[str, Any]) -> Any:
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    print(json.dumps(question), file=server.stdin, flush=True)
    return json.loads(server.stdout.readline())


def _serve() -> list[str] | None:
    """Answers until nobody asks any more; in a process that was forked it returns what that is to run."""
    for line in iter(sys.stdin.readline, ""):
        question = json.loads(line)
        if "ended" in question:
            pid, status = os.waitpid(question["ended"], os.WNOHANG)
            print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
        elif pid := os.fork():
            print(pid, flush=True)
        else:
            os.setsid()
            os.environ.update(question["environment"])
            for number, path in ((1, question["out"]), (2, question["err"])):
                file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(file, number)
                os.close(file)
            nothing = os.open(os.devnull, os.O_RDONLY)
            os.dup2(nothing, 0)
            os.close(nothing)
            arguments: list[str] = question["arguments"]
            return arguments
    return None


if __name__ == "__main__":
    import hybridflow.trainers.rl.loop
    import hybridflow.trainers.sft  # noqa: F401  (with what they import, all of a run)
    from hybridflow.cli.main import main

    asked = _serve()
    if asked is not None:
        sys.exit(main(asked))
