"""The store where the processes of a run find each other."""

from __future__ import annotations

from torch.distributed import TCPStore

from hybridflow.errors import UserError

LOCALHOST = "127.0.0.1"


def meeting_point(host: str, port: int) -> TCPStore:
    """Opens the store where the processes of all pools find each other, kept by this process.

    Raises:
        UserError: the port is taken.
    """
    try:
        return TCPStore(host, port, is_master=True, wait_for_workers=False)
    except RuntimeError as error:
        if "EADDRINUSE" not in str(error) and "address already in use" not in str(error):
            raise
        raise UserError(
            f"placement.port {port} is taken on this host",
            why="the processes of the run meet there; another run may be using it",
            fix="give another port, or leave placement.port out: a free one is then found",
        ) from error
