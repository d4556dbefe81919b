"""The server that processes of this host are forked from. Importable without torch: the server imports it meanwhile."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext

MODELS = ("hybridflow.trainers.workers",)  # what processes with models need


def start_server(preload: Sequence[str] = MODELS) -> ForkServerContext:
    """Starts it, where it does not run yet, and returns at once.

    Args:
        preload: modules that every process needs: they are imported once, by the server.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hybridflow.controller.processes", *preload])
    forkserver.ensure_running()
    return context
