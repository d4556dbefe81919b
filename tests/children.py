"""Which processes a test has left behind; from /proc, because nothing else of the tests needs a package for it."""

from __future__ import annotations

import os
import time
from collections.abc import Collection
from pathlib import Path


def _parents() -> dict[int, int]:
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:  # it ended while we looked
            continue
        if fields[0] not in "ZX":
            parents[int(stat.parent.name)] = int(fields[1])
    return parents


def children() -> set[int]:
    """Processes that this one has started, and those that they have started."""
    parents = _parents()
    found = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {os.getpid()}


def left_of(pids: Collection[int], seconds: float = 10.0) -> set[int]:
    """Which of these processes are there still, after they had some time to end."""
    until = time.monotonic() + seconds
    while (left := set(pids) & _parents().keys()) and time.monotonic() < until:
        time.sleep(0.05)
    return left
