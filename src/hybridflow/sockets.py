"""Folders for sockets: a kernel bounds the length of their paths, and temporary folders may be longer than that."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from pathlib import Path

from hybridflow.errors import UserError

LONGEST = 107 if sys.platform == "linux" else 103  # bytes of a socket's path
WITHIN = 70  # of these, for what is put there: Ray's are the longest, /ray/session_DATE_TIME_PID/sockets/plasma_store
SHORT = ("/tmp", "/var/tmp", "/dev/shm")


def socket_parent() -> str:
    """Returns a folder in which temporary folders may be made whose sockets have paths that are short enough.

    That is the system's temporary folder (TMPDIR), unless its own path is too long.

    Raises:
        UserError: there is none that one can write into.
    """
    try:
        usual = tempfile.gettempdir()
    except FileNotFoundError as error:
        raise UserError(
            "no temporary folder can be written into",
            why=str(error),
            fix="set TMPDIR to a folder on a disk with room",
        ) from error
    for folder in (usual, *SHORT):
        if len(os.fsencode(folder)) + WITHIN <= LONGEST and os.access(folder, os.W_OK | os.X_OK):
            return folder
    raise UserError(
        f"the temporary folder {usual} has a path of {len(os.fsencode(usual))} bytes, too long for sockets",
        why=f"processes of this host talk over sockets, whose paths have at most {LONGEST} bytes, and none of "
        f"{', '.join(SHORT)} can be written into",
        fix="set TMPDIR to a shorter folder",
    )


def try_socket() -> str:
    """Opens a socket in a new folder there, and returns where that was.

    Raises:
        UserError: it cannot be opened.
    """
    parent = socket_parent()
    try:
        with (
            tempfile.TemporaryDirectory(prefix="hybridflow-", dir=parent) as folder,
            socket.socket(socket.AF_UNIX) as server,
        ):
            server.bind(str(Path(folder) / "socket"))
    except OSError as error:
        raise UserError(
            f"no socket can be opened in {parent}",
            why=f"{type(error).__name__}: {error}",
            fix="set TMPDIR to a folder on a local disk that allows sockets",
        ) from error
    return parent
