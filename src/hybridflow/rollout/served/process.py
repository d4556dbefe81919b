"""A server that this process started: its port, its log, its end.

A small process in between, `guardian.py`, ends the server with everything that it started when this process ends in any
way: nothing is left that holds memory or a port.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import hybridflow
from hybridflow.rollout.served import guardian

LAST_LINES, CAUSES = 6, 3  # of the log, in errors: its end, and the first exceptions in it
LOG_BYTES = 1 << 20  # of its end, that are searched for these
EXCEPTION = re.compile(r"\b[A-Za-z_.]*(Error|Exception): .+")


class ServerProcess:
    """A running server. `start_server` makes it.

    Attributes:
        log: file that holds what it prints.
        command: how it was started.
    """

    def __init__(self, process: asyncio.subprocess.Process, command: Sequence[str], log: Path, begin: int) -> None:
        self._process, self.command, self.log = process, list(command), log
        self._begin = begin

    async def ended(self) -> None:
        """Returns when it has ended."""
        await self._process.wait()

    def death(self) -> str | None:
        """Returns how the process ended, with the last lines of its log; None while it runs."""
        status = self._process.returncode
        if status is None:
            return None
        how = f"ended with exit status {status}"
        if status > 128 and status - 128 in set(signal.Signals):
            how = f"was killed by signal {status - 128} ({signal.Signals(status - 128).name})"
            if status == 128 + signal.SIGKILL:
                how += ", as the kernel does when memory runs out"
        with self.log.open("rb") as log:
            log.seek(max(self._begin, self.log.stat().st_size - LOG_BYTES))
            lines = log.read().decode(errors="replace").splitlines()
        causes = dict.fromkeys(found[0] for line in lines if (found := EXCEPTION.search(line)))
        said = [*list(causes)[:CAUSES], *lines[-LAST_LINES:]]
        return "\n    ".join([f"{how}; from {self.log}:", *said])

    async def end(self) -> None:
        """Ends it and all that it started."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self.ended()


async def start_server(command: Sequence[str], environment: Mapping[str, str], log: Path) -> ServerProcess:
    """Starts a server; it may take a while until it answers.

    Args:
        command: program and arguments.
        environment: variables to set beside those of this process.
        log: file for what it prints; it is appended to.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        begin = output.tell()
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", "-S", guardian.__file__, *command,
            stdin=asyncio.subprocess.PIPE, stdout=output, stderr=output, env={**os.environ, **environment},
            start_new_session=True,
        )  # fmt: skip
    return ServerProcess(process, command, log, begin)


def free_port() -> int:
    """Returns a port that nothing uses at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def import_path(folder: Path) -> str:
    """Returns a PYTHONPATH on which another Python finds this package, and nothing else of this environment.

    Args:
        folder: where to put a link to the package.
    """
    own = Path(hybridflow.__file__).parent
    link = folder / "importable" / own.name
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.is_symlink() and link.resolve() != own.resolve():
        link.unlink()
    if not link.is_symlink():
        link.symlink_to(own.resolve())
    return os.pathsep.join(filter(None, [str(link.parent.absolute()), os.environ.get("PYTHONPATH")]))
