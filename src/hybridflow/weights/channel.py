"""Weights from this process to engines whose own processes take them: both ends work at once, and fail with one error.

The sending side is a `Channel`; every process of the engine has an `Inbox`.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from hybridflow.config.sections.placement import Transport
from hybridflow.errors import UserError
from hybridflow.protocols.weights import Receipt, WeightStream
from hybridflow.weights.stream import WeightSyncError
from hybridflow.weights.transport import Receiver, open_receiver, open_sender, pick_transport

Take = Callable[[str], Sequence[Receipt]]


@dataclass(frozen=True, slots=True)
class WeightRoute:
    """The route of weights to an engine's processes, from the section ``placement``.

    Args:
        transport: how they are carried.
        folder: where files of weights go.
        delta: whether only changes are sent.
    """

    transport: Transport = "auto"
    folder: str | None = None
    delta: bool = False


class Channel:
    """Sends streams of this process to the processes of an engine.

    Args:
        receivers: the host name of each process that takes weights, in index order.
        route: how they travel.
        device: where buckets are that do not lie in host memory.
        timeout: seconds that either end waits for the other.

    Raises:
        UserError: this transport cannot work between these hosts.
    """

    def __init__(
        self,
        receivers: Sequence[str],
        route: WeightRoute | None = None,
        *,
        device: torch.device | str = "cpu",
        timeout: float = 600,
    ) -> None:
        assert receivers, "a channel to nobody"
        self.receivers, self.timeout = list(receivers), timeout
        route = route or WeightRoute()
        here = socket.gethostname()
        one_host = {*receivers} == {here}
        self._sender = open_sender(
            pick_transport(route.transport, one_host=one_host),
            len(receivers),
            host="127.0.0.1" if one_host else here,
            timeout=timeout,
            device=device,
            folder=route.folder,
            delta=route.delta,
        )
        self.address = self._sender.address

    def publish(self, stream: WeightStream, take: Take) -> list[Receipt]:
        """Sends a stream while the engine takes it.

        Args:
            stream: consumed here, in this thread; its ``published`` is filled.
            take: makes the engine's processes receive from this address (`RolloutEngine`s have it as
                ``receive_weights``); called in a thread of its own.

        Returns:
            The receipt of every process, in index order: they are not yet compared with the stream.

        Raises:
            WeightSyncError: either side failed; the message names both errors.
            UserError: either side raised it.
        """
        taken: Future[Sequence[Receipt]] = Future()
        number = self._sender.streams

        def taking() -> None:
            try:
                receipts = take(self.address)
            except BaseException as error:
                taken.set_exception(error)
                self._sender.stop(number, _says(error))
            else:
                taken.set_result(receipts)

        threading.Thread(target=taking, name="take-weights", daemon=True).start()
        failed: list[BaseException] = []
        try:
            self._sender.send(stream)
        except Exception as error:
            failed.append(error)
        receipts: list[Receipt] = []
        try:
            receipts = list(taken.result(self.timeout))
        except Exception as error:
            if taken.done():
                failed.insert(0, error)  # the engine's error comes first: the sender's is often only its consequence
            else:
                failed.append(WeightSyncError(f"the engine did not report within {self.timeout:g} s what it received"))
        if failed:
            raise _joined(failed) from failed[0]
        if len(receipts) != len(self.receivers):
            raise WeightSyncError(
                f"{len(receipts)} processes acknowledge the weights, and {len(self.receivers)} should"
            )
        return receipts

    def close(self) -> None:
        """Releases memory and files; what was received stays."""
        self._sender.close()


class Inbox:
    """The end of a process of an engine that takes streams; connections are kept for the next time.

    Args:
        timeout: seconds to wait for the sender.
        device: where buckets are that do not lie in host memory.
    """

    def __init__(self, *, timeout: float = 600, device: torch.device | str = "cpu") -> None:
        self._timeout, self._device = timeout, device
        self._receivers: dict[tuple[str, int], Receiver] = {}

    @contextmanager
    def take(self, address: str, index: int) -> Iterator[WeightStream]:
        """Yields the next stream from a sender; an exception inside is reported to it, so that it does not wait.

        Args:
            address: the sender's.
            index: which of its receivers this process is, from 0.
        """
        receiver = self._receivers.get((address, index))
        if receiver is None:
            self.close()  # a sender is replaced, never joined by a second one
            receiver = open_receiver(address, index, timeout=self._timeout, device=self._device)
            self._receivers[address, index] = receiver
        try:
            yield receiver.receive()
        except BaseException as error:
            receiver.refuse(_says(error))
            raise

    def close(self) -> None:
        """Releases memory and connections."""
        for receiver in self._receivers.values():
            receiver.close()
        self._receivers = {}


def _says(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def _joined(failed: list[BaseException]) -> Exception:
    """Makes one error from those of the engine (first) and the sender."""
    for error in failed:
        if isinstance(error, UserError):
            return error
    said = dict.fromkeys(str(e) if isinstance(e, WeightSyncError) else _says(e) for e in failed)
    return WeightSyncError("; ".join(said))
