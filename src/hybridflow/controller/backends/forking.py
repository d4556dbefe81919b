"""The server that processes of this host are forked from. This module imports no torch; the server imports it
meanwhile.
"""

from __future__ import annotations

import multiprocessing
import shutil
import signal
import tempfile
from collections.abc import Sequence
from multiprocessing import forkserver, resource_tracker, util
from multiprocessing.context import ForkServerContext
from typing import Any

from hybridflow.errors import UserError
from hybridflow.sockets import socket_parent


def refuse_imported_program() -> None:
    """Raises a UserError in a process that imports the program which started it, where the program runs once more."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise UserError(
            "a program that starts processes is imported by each of them, and would start its own",
            fix='put what it does under: if __name__ == "__main__":',
        )


def start_server(preload: Sequence[str]) -> ForkServerContext:
    """Starts it, where it does not run yet, and returns at once.

    Args:
        preload: modules that every process needs: they are imported once, by the server.

    Raises:
        UserError: no folder can hold its socket.
    """
    _put_sockets_where_they_fit()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hybridflow.controller.backends.processes", *preload])
    resource_tracker.ensure_running()  # here, because it unblocks signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:  # the forked processes inherit this: a scheduler tells all processes to end, and the controller decides
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def _put_sockets_where_they_fit() -> None:
    """Gives multiprocessing a folder for its sockets, where the one that it would make has too long a path."""
    process: Any = multiprocessing.current_process()
    parent = socket_parent()
    if parent != tempfile.gettempdir() and process._config.get("tempdir") is None:
        folder = process._config["tempdir"] = tempfile.mkdtemp(prefix="pymp-", dir=parent)
        # As multiprocessing does with its own folder: removed after everything that may use it.
        util.Finalize(None, shutil.rmtree, args=(folder, True), exitpriority=-100)
