"""The program of a process in which tools and environments run. Light: it imports no torch.

It takes one call at a time from its socket and answers it. When the socket closes, the process ends at once, also in
the middle of a call.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import pickle
import queue
import socket
import struct
import sys
import threading
import traceback
from typing import Any

from hybridflow.config.locate import load_function

LENGTH = struct.Struct("<Q")  # of the message that follows


def framed(message: Any) -> bytes:
    """Returns a message as it is sent."""
    data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    return LENGTH.pack(len(data)) + data


class Objects:
    """What the process holds: the objects of trajectories, by number."""

    def __init__(self) -> None:
        self.made: dict[int, Any] = {}
        self.loop = asyncio.new_event_loop()

    def answer(self, what: str, *args: Any) -> Any:
        """Answers a call.

        Args:
            what: "load" (reference), "function" (reference, arguments), "make" (number, reference, arguments),
                "method" (number, name, arguments by place, by name) or "close" (number), which an object need not have.
            args: see there.
        """
        if what == "load":
            load_function(args[0])
            return None
        if what == "function":
            reference, named = args
            return self._awaited(load_function(reference)(**named))
        if what == "make":
            number, reference, named = args
            self.made[number] = self._awaited(load_function(reference)(**named))
            return None
        if what == "method":
            number, name, placed, named = args
            return self._awaited(getattr(self.made[number], name)(*placed, **named))
        closing = getattr(self.made.pop(args[0], None), "close", None)
        return self._awaited(closing()) if callable(closing) else None

    def _awaited(self, value: Any) -> Any:
        if not inspect.isawaitable(value):
            return value

        async def wait() -> Any:
            return await value

        return self.loop.run_until_complete(wait())


def main(number: int) -> None:
    """Serves calls until the socket closes.

    Args:
        number: of the socket's file.
    """
    wire = socket.socket(fileno=number)
    os.dup2(2, 1)  # what tools print goes to standard error, as in the process of the run
    calls: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(wire, calls), daemon=True).start()
    objects = Objects()
    while True:
        message = calls.get()
        try:
            reply: tuple[Any, ...] = ("value", objects.answer(*message))
            data = framed(reply)
        except BaseException as error:  # SystemExit too: it is the call's, not the process's
            said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            data = framed(("raised", said, "".join(traceback.format_exception(error))))
        sys.stdout.flush()
        wire.sendall(data)


def _receive(wire: socket.socket, calls: queue.SimpleQueue[Any]) -> None:
    file = wire.makefile("rb")
    while True:
        head = file.read(LENGTH.size)
        if len(head) < LENGTH.size:
            os._exit(0)  # the run has ended
        calls.put(pickle.loads(file.read(LENGTH.unpack(head)[0])))
