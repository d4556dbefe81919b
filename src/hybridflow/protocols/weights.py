"""Weights on their way from a trainer to a generation engine: the stream, and the receipt for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(slots=True)
class WeightStream:
    """Full tensors under Hugging Face names, one after the other.

    Args:
        tensors: (name, tensor) pairs; tied names are included. May be consumed once. A tensor is good until the next
            one is taken: whoever keeps it copies it.
        names: every name that a complete stream holds.
        published: fingerprint of each tensor as it left the trainer, filled while `tensors` is consumed.
        same_memory: the receiver holds these very tensors (a local actor); nothing needs to be copied.
        adapter: name of the adapter that this stream carries; None for the model's own weights.
        send: sends it past this process, from those that hold the weights: given the host of each process that takes
            it, and what has them take what comes from an address; returns their receipts. None: it is here.
    """

    tensors: Iterator[tuple[str, Tensor]]
    names: frozenset[str]
    published: dict[str, int] = field(default_factory=dict)
    same_memory: bool = False
    adapter: str | None = None
    send: Callable[[Sequence[str], Callable[[str], list[Receipt]]], list[Receipt]] | None = None


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a generation engine says it received: held against what was published by `weights.stream.verify`.

    Args:
        version: weight version that the engine now samples from.
        received: fingerprint of each tensor as the engine got it.
        num_bytes: bytes received.
    """

    version: int
    received: Mapping[str, int]
    num_bytes: int
