"""Plain functions beside an event loop: in threads that never keep the process from ending."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")


async def in_thread(function: Callable[..., T], *args: Any) -> T:
    """Runs a function in a thread of its own, and returns what it returns.

    The thread is a daemon, unlike those of `asyncio.to_thread`: a tool that hangs does not keep Python from ending.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(set_: Callable[[Any], None], value: Any) -> None:
        if not future.done():  # else nobody waits any more
            set_(value)

    def run() -> None:
        try:
            result = function(*args)
        except (StopIteration, SystemExit, KeyboardInterrupt) as error:  # a future takes no such exception
            said = f"it raised {type(error).__name__} {error}".rstrip()
            outcome: tuple[Callable[[Any], None], Any] = future.set_exception, RuntimeError(said)
        except BaseException as error:
            outcome = future.set_exception, error
        else:
            outcome = future.set_result, result
        with suppress(RuntimeError):  # the loop is closed: the run has ended
            loop.call_soon_threadsafe(settle, *outcome)

    threading.Thread(target=run, daemon=True, name=getattr(function, "__name__", "tool")).start()
    return await future


def waited() -> Callable[[Coroutine[Any, Any, T]], T]:
    """Returns a function for threads beside the running event loop: it runs a coroutine there, and waits for it."""
    loop = asyncio.get_running_loop()

    def wait(coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result()

    return wait
