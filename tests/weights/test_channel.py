"""A channel brings weights into engines of other processes, and says in one error what went wrong at either end."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hybridflow.config.sections.placement import Transport
from hybridflow.errors import UserError
from hybridflow.protocols.weights import Receipt, WeightStream
from hybridflow.rollout.inline.engine import InlineEngine
from hybridflow.weights.channel import Channel, Inbox, WeightRoute
from hybridflow.weights.stream import WeightSyncError, stream_of, verify

from tiny import packed_model


class Two:
    """Two engines as one engine's processes are: each with an inbox; here they are threads."""

    def __init__(self, timeout: float = 60) -> None:
        self.engines = [InlineEngine(packed_model(seed=7 + i)) for i in range(2)]
        self.inboxes = [Inbox(timeout=timeout) for _ in self.engines]
        self.version = 0
        self.refuses: Exception | None = None

    def take(self, address: str) -> list[Receipt]:
        def one(index: int) -> Receipt:
            with self.inboxes[index].take(address, index) as stream:
                if index and self.refuses:
                    raise self.refuses
                (receipt,) = self.engines[index].update_weights(stream, self.version)
                return receipt

        self.version += 1
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(one, range(2)))


def channel(transport: Transport = "auto", timeout: float = 60, **how: Any) -> Channel:
    return Channel([socket.gethostname()] * 2, WeightRoute(transport, **how), timeout=timeout)


def passes(channel: Channel, engine: Two, seed: int) -> None:
    """A publication after which both engines compute with these weights."""
    model = packed_model(seed=seed)
    stream = stream_of(model)
    receipts = channel.publish(stream, engine.take)
    verify(stream, receipts, engine.version)
    assert len(receipts) == 2 and stream.published.keys() == stream.names
    for own in engine.engines:
        assert all(torch.equal(t, model.state_dict()[n]) for n, t in own.model.state_dict().items())


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("transport", ["auto", "broadcast", "files"])
def test_weights_reach_every_process_again_and_again(transport: Transport, delta: bool, tmp_path: Path) -> None:
    weights, engine = channel(transport, folder=str(tmp_path), delta=delta), Two()
    for seed in range(3):
        passes(weights, engine, seed)
    for inbox in engine.inboxes:
        inbox.close()
    weights.close()
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("transport", ["auto", "broadcast", "files"])
def test_what_a_process_says_is_told_at_once_and_the_channel_goes_on(transport: Transport, tmp_path: Path) -> None:
    weights, engine = channel(transport, folder=str(tmp_path)), Two()
    begin = time.monotonic()
    engine.refuses = ValueError("no room for q_proj")
    with pytest.raises(WeightSyncError, match="ValueError: no room for q_proj"):
        weights.publish(stream_of(packed_model()), engine.take)
    engine.refuses = UserError("this engine takes no adapters", fix="merge them")
    with pytest.raises(UserError, match="takes no adapters"):
        weights.publish(stream_of(packed_model()), engine.take)
    engine.refuses = None
    passes(weights, engine, 1)
    assert time.monotonic() - begin < 30


def test_an_engine_that_fails_before_anybody_listens_does_not_keep_the_sender() -> None:
    weights, begin = channel(), time.monotonic()

    def take(address: str) -> list[Receipt]:
        raise ConnectionError("the server is gone")

    for _ in range(2):
        with pytest.raises(WeightSyncError, match="ConnectionError: the server is gone"):
            weights.publish(stream_of(packed_model()), take)
    passes(weights, Two(), 2)
    assert time.monotonic() - begin < 30


def test_a_stream_that_breaks_off_is_told_as_such() -> None:
    weights, engine = channel(), Two()
    stream = stream_of(packed_model())

    def raising(tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        yield next(tensors)
        raise ValueError("the actor is out of memory")

    stream.tensors = raising(stream.tensors)
    with pytest.raises(WeightSyncError, match="the sender of weights stopped: the actor is out of memory"):
        weights.publish(stream, engine.take)
    passes(weights, engine, 3)


def test_an_engine_that_never_answers_and_one_of_which_a_process_does_not_are_told() -> None:
    weights, engine = channel(timeout=1), Two()

    def slow(address: str) -> list[Receipt]:
        engine.take(address)
        time.sleep(2)
        return []

    with pytest.raises(WeightSyncError, match="the engine did not report within 1 s what it received"):
        weights.publish(stream_of(packed_model()), slow)
    with pytest.raises(WeightSyncError, match="1 processes acknowledge the weights, and 2 should"):
        weights.publish(stream_of(packed_model()), lambda address: engine.take(address)[:1])


def test_a_stream_without_tensors_of_its_own_names_what_is_missing() -> None:
    """As a trainer that loses a tensor on the way would send it."""
    weights, engine = channel(), Two()
    stream = stream_of(packed_model())
    short = WeightStream((pair for pair in stream.tensors if pair[0] != "model.norm.weight"), stream.names)
    with pytest.raises(WeightSyncError, match=r"ended without 1 of its tensors: model\.norm\.weight"):
        weights.publish(short, engine.take)
