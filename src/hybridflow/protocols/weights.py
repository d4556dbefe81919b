"""The stream of weights from a trainer to a generation engine, and the receipt for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(slots=True)
class WeightStream:
    """Full tensors under Hugging Face names, one after the other.

    Args:
        tensors: (name, tensor) pairs; tied names are included. May be consumed once. A tensor is good until the next
            one is taken: a caller that keeps it copies it.
        names: every name that a complete stream holds.
        published: fingerprint of each tensor as it left the trainer, filled while `tensors` is consumed.
        same_memory: the receiver holds these very tensors (a local actor); nothing needs to be copied.
        adapter: name of the adapter that this stream carries; None for the model's own weights.
        send: sends it past this process, from the processes that hold the weights. Its arguments are the host of each
            process that takes it, and a function that has them receive from an address; it returns their receipts.
            None: the weights are in this process.
    """

    tensors: Iterator[tuple[str, Tensor]]
    names: frozenset[str]
    published: dict[str, int] = field(default_factory=dict)
    same_memory: bool = False
    adapter: str | None = None
    send: Callable[[Sequence[str], Callable[[str], list[Receipt]]], list[Receipt]] | None = None


@dataclass(frozen=True, slots=True)
class Receipt:
    """A generation engine's report of what it received, which `weights.stream.verify` compares with what was published.

    Args:
        version: weight version that the engine now samples from.
        received: fingerprint of each tensor as the engine got it.
        num_bytes: bytes received.
    """

    version: int
    received: Mapping[str, int]
    num_bytes: int
