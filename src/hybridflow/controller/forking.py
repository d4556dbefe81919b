"""The server that processes of this host are forked from. Importable without torch: the server imports it meanwhile."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Sequence
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext

MODELS = ("hybridflow.trainers.workers",)  # what processes with models need


def start_server(preload: Sequence[str] = MODELS) -> ForkServerContext:
    """Starts it, where it does not run yet, and returns at once.

    Args:
        preload: modules that every process needs: they are imported once, by the server.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hybridflow.controller.processes", *preload])
    resource_tracker.ensure_running()  # here, because it unblocks signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:  # what it forks inherits this: a scheduler tells all processes to end, and the controller decides
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context
