"""Runs a command as its child, and ends all of its processes when the process that asked for it ends.

``python guardian.py COMMAND...``; when standard input ends (the process that asked for it has ended, in any way), or
the command itself ends, every process that it has started gets SIGTERM, and SIGKILL `GRACE` seconds later. The exit
status is that of the command, 128 + N where signal N ended it. Needs nothing but the standard library: it is started by
path, without site packages, and takes little memory.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time

GRACE = 2.0  # seconds in which processes that get a signal can free shared memory and the like
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # from linux/prctl.h


def main(command: list[str]) -> int:
    """Runs the command to its end."""
    linux = sys.platform == "linux"
    libc = ctypes.CDLL(None) if linux else None
    if libc is not None:
        libc.prctl(PR_SET_CHILD_SUBREAPER, 1)  # orphans of the command become ours, so they are reaped

    def die_with_guardian() -> None:
        if libc is not None:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=die_with_guardian)

    def watch() -> None:
        sys.stdin.buffer.read()
        sweep(child.pid)

    threading.Thread(target=watch, daemon=True).start()
    status = child.wait()
    sweep(child.pid)
    return status if status >= 0 else 128 - status


def sweep(group: int) -> None:
    """Ends all processes of a group."""
    until = time.monotonic() + GRACE
    how = signal.SIGTERM
    while time.monotonic() < until + 1:
        try:
            os.killpg(group, how)
            while os.waitpid(-group, os.WNOHANG)[0]:
                pass
        except ProcessLookupError:
            return
        except ChildProcessError:
            pass  # the rest of the group has parents of its own
        time.sleep(0.05)
        how = signal.SIGKILL if time.monotonic() > until else 0  # type: ignore[assignment]


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os._exit(main(sys.argv[1:]))
