"""Checks that mostly wait, at the same time: for a time limit, a grace period, a process that ends."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def at_once(*checks: Callable[..., None], **given: Any) -> None:
    """Runs each check, with what it is given, in a thread of its own; tells of every one that fails."""
    with ThreadPoolExecutor(len(checks)) as threads:
        running = {check.__name__: threads.submit(check, **given) for check in checks}
    failed = {name: error for name, future in running.items() if (error := future.exception()) is not None}
    assert not failed, "\n".join(f"{name}:\n{''.join(traceback.format_exception(e))}" for name, e in failed.items())
