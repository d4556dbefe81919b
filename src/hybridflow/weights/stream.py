"""Publishing weights tensor by tensor, and holding what arrived against what left."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from hybridflow.protocols import Receipt, WeightStream


class WeightSyncError(RuntimeError):
    """A generation engine does not hold the weights that were published to it. Sampling on would be silently wrong."""


def fingerprint(tensor: Tensor) -> int:
    """A 64-bit fingerprint of a tensor's bits and their order, the same on every device.

    Each 32-bit (or 16-bit) word is multiplied with an odd number of its position, and the products are added modulo
    2^64: changing, swapping or dropping any value changes it.
    """
    flat = tensor.detach().contiguous().view(-1)
    if flat.element_size() == 8:
        words = flat.view(torch.int64)
    else:
        words = flat.view({4: torch.int32, 2: torch.int16, 1: torch.int8}[flat.element_size()]).long()
    position = torch.arange(len(words), device=words.device)
    return int(((words + 1) * (2 * position + 1)).sum()) ^ (len(words) * 0x9E3779B97F4A7C15 & 0x7FFFFFFFFFFFFFFF)


def weight_names(model: PreTrainedModel) -> frozenset[str]:
    """Every name that a complete stream of this model holds: tied weights under each of their names."""
    return frozenset(name for name, _ in _named_weights(model))


def stream_of(model: PreTrainedModel, *, same_memory: bool = False) -> WeightStream:
    """A stream of the model's weights under Hugging Face names; fingerprints are taken as tensors leave.

    Args:
        model: the model; with LoRA adapters, their tensors are part of the stream.
        same_memory: the receiver computes with these very tensors.
    """
    stream = WeightStream(tensors=iter(()), names=weight_names(model), same_memory=same_memory)

    def leave() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in _named_weights(model):
            stream.published[name] = fingerprint(tensor)
            yield name, tensor

    stream.tensors = leave()
    return stream


def receive(stream: WeightStream, received: dict[str, int]) -> Iterator[tuple[str, Tensor]]:
    """The stream's tensors, as a receiver takes them: their fingerprints go to `received`."""
    for name, tensor in stream.tensors:
        received[name] = fingerprint(tensor)
        yield name, tensor


def verify(stream: WeightStream, receipt: Receipt, version: int) -> None:
    """Holds a receipt against the stream it acknowledges.

    Raises:
        WeightSyncError: another version, a missing tensor, or one with other bits; the message names them.
    """
    problems = []
    if receipt.version != version:
        problems.append(f"the engine says version {receipt.version}, published was {version}")
    missing = sorted(stream.names - receipt.received.keys())
    if missing:
        problems.append(f"{len(missing)} tensors never arrived: {', '.join(missing[:5])}")
    changed = sorted(n for n, value in stream.published.items() if receipt.received.get(n, value) != value)
    if changed:
        problems.append(f"{len(changed)} tensors arrived with other values: {', '.join(changed[:5])}")
    if problems:
        raise WeightSyncError("weights in the generation engine are not the trainer's: " + "; ".join(problems))


def _named_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    # state_dict, not named_parameters: it holds tied weights under every name, as engines need them.
    for name, tensor in model.state_dict().items():
        yield name, tensor.detach()
