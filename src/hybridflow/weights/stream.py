"""Weights that are published tensor by tensor, and the comparison of what arrived with what left."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.modeling_utils import PreTrainedModel

from hybridflow.protocols.weights import Receipt, WeightStream
from hybridflow.weights.adapters import ADAPTER, WRAPPED, adapted_weights, is_adapter, merge_adapters, plain_name

BLOCK, LANES = 2048, 16  # of fingerprints: bytes that are summed together, and how many sums they become
SMALL = 1 << 16  # bytes that are hashed as they are

Gather = Callable[[frozenset[str]], Iterator[tuple[str, Tensor]]]


class WeightSyncError(RuntimeError):
    """A generation engine does not hold the weights that were published to it. Its samples would be silently wrong."""


def fingerprint(tensor: Tensor) -> int:
    """Computes a 64-bit fingerprint of a tensor's bytes and their order, the same on every device.

    Every `BLOCK` bytes become `LANES` sums, each with odd multipliers of its own; the sums' bytes are taken together in
    the same way until little is left, which is hashed (BLAKE2b, RFC 7693). The sums are exact: a byte that changes
    changes them, and so does a swap. They are one product of matrices of 8-bit integers, which processors and GPUs
    compute about as quickly as they read memory.
    """
    count = tensor.numel()
    flat = tensor.detach().contiguous().view(-1).view(torch.int8)
    if flat.device.type not in ("cpu", "cuda"):  # other types have no such product
        flat = flat.cpu()
    found = hashlib.blake2b(count.to_bytes(8, "little"), digest_size=8)
    while len(flat) > SMALL:
        whole = len(flat) // BLOCK * BLOCK
        found.update(_bytes(flat[whole:]))
        sums = torch._int_mm(flat[:whole].view(-1, BLOCK), _multipliers(flat.device))  # [bytes / BLOCK, LANES] int32
        flat = sums.view(-1).view(torch.int8)
    found.update(_bytes(flat))
    return int.from_bytes(found.digest(), "little")


def _bytes(flat: Tensor) -> Any:
    """Returns the values as hashlib takes them."""
    return flat.cpu().numpy()


@functools.cache
def _multipliers(device: torch.device) -> Tensor:
    """Returns odd numbers ``[BLOCK, LANES]`` (int8), none beyond 63: older processors add products in 16 bits."""
    noise = torch.frombuffer(bytearray(hashlib.shake_128(b"weights").digest(BLOCK * LANES)), dtype=torch.uint8)
    odd = (noise & 62).to(torch.int8) + 1
    return torch.where(noise >= 128, -odd, odd).view(BLOCK, LANES).to(device)


def weight_names(model: PreTrainedModel, lora: Literal["adapters", "merged"] | None = None) -> frozenset[str]:
    """Returns every name that a complete stream of this model holds: tied weights under each of their names."""
    return _published_names(model.state_dict().keys(), lora)


def stream_of(
    model: PreTrainedModel,
    *,
    same_memory: bool = False,
    lora: Literal["adapters", "merged"] | None = None,
    dtype: torch.dtype | None = None,
    fingerprints: bool = True,
    names: Iterable[str] | None = None,
    gather: Gather | None = None,
) -> WeightStream:
    """Makes a stream of the model's weights under Hugging Face names; fingerprints are taken as tensors leave.

    Parameters that are cut over processes leave whole: every process of the mesh must consume the stream, in lock step.
    At any time one tensor is whole; tied weights are made whole once and leave under one name after the other.

    Args:
        model: the model; its parameters may be DTensors.
        same_memory: the receiver computes with these very tensors.
        lora: "adapters": the adapters alone, for a receiver that has the rest. "merged": plain full weights, each with
            its adapter added in float32. None: everything that the model holds, under the model's own names.
        dtype: the type that parameters are published in; None keeps theirs. Buffers always keep theirs.
        fingerprints: whether they are taken: one process of several is enough.
        names: of a model that `gather` reads: what it holds, under the names that it had before it was cut.
        gather: yields these of its tensors, whole; for parameters that are no DTensors (FSDP1).

    Raises:
        UserError: "merged", and adapters of a kind that cannot be added to one weight.
    """
    held = frozenset(model.state_dict().keys() if names is None else names)
    wanted = frozenset(filter(is_adapter, held)) if lora == "adapters" else held
    assert wanted, "a stream of adapters needs a model that has some"
    stream = WeightStream(iter(()), _published_names(held, lora), same_memory=same_memory)
    if lora == "adapters":
        stream.adapter = ADAPTER
    adapted = adapted_weights(model, held) if lora == "merged" else []
    buffers = {plain_name(name.replace(WRAPPED, "")) for name, _ in model.named_buffers()}

    def leave() -> Iterator[tuple[str, Tensor]]:
        tensors = (gather or _gatherer(model))(wanted)
        for name, tensor in merge_adapters(tensors, adapted) if lora == "merged" else tensors:
            if dtype is not None and tensor.is_floating_point() and plain_name(name) not in buffers:
                tensor = tensor.to(dtype)
            if fingerprints:
                stream.published[name] = fingerprint(tensor)
            yield name, tensor
            del tensor  # without this it would stay in memory beside the next one

    stream.tensors = leave()
    return stream


def receive(stream: WeightStream, received: dict[str, int]) -> Iterator[tuple[str, Tensor]]:
    """Yields the stream's tensors, as a receiver takes them: their fingerprints go to `received`."""
    for name, tensor in stream.tensors:
        received[name] = fingerprint(tensor)
        yield name, tensor
        del tensor


def copy_weights(stream: WeightStream, own: Mapping[str, Tensor]) -> tuple[dict[str, int], int]:
    """Copies a stream into a model of the same kind, tensor by tensor.

    Args:
        stream: of all weights, or of adapters alone.
        own: the model's ``state_dict()``.

    Returns:
        The fingerprint of every tensor, read back from the model's own memory, and the bytes received.

    Raises:
        WeightSyncError: names, shapes or types are not the model's, or tensors are missing. Names are compared before
            anything is copied.
    """
    expected = frozenset(own if stream.adapter is None else filter(is_adapter, own))
    _same_names(stream.names, expected)
    received: dict[str, int] = {}
    num_bytes = 0
    with torch.no_grad():
        for name, tensor in stream.tensors:
            if name not in expected:
                raise WeightSyncError(f"the generation engine's model has no tensor {name}")
            target = own[name]
            if target.shape != tensor.shape:
                raise WeightSyncError(
                    f"{name} arrives as {list(tensor.shape)}; the generation engine's is {list(target.shape)}"
                )
            if torch.promote_types(target.dtype, tensor.dtype) != target.dtype:
                raise WeightSyncError(
                    f"{name} arrives as {tensor.dtype}, and the generation engine keeps {target.dtype}, which is less: "
                    "publish in that type"
                )
            target.copy_(tensor)
            num_bytes += tensor.nbytes
            received[name] = fingerprint(target.to(tensor.dtype))
            del tensor
    missing = sorted(expected - received.keys())
    if missing:
        raise WeightSyncError(f"{len(missing)} tensors never arrived: {', '.join(missing[:5])}")
    return received, num_bytes


def verify(stream: WeightStream, receipts: Receipt | Sequence[Receipt], version: int) -> None:
    """Compares receipts with the stream that they acknowledge.

    Args:
        stream: consumed.
        receipts: of the engine, or of each of its processes.
        version: what was published.

    Raises:
        WeightSyncError: another version, a missing tensor, one with other bits, or one that was not sent; the message
            names them, and the processes.
    """
    every = [receipts] if isinstance(receipts, Receipt) else list(receipts)
    assert every, "no process acknowledges the weights"
    who: dict[str, list[str]] = {}  # processes, by what is wrong with them
    for place, receipt in enumerate(every):
        for problem in _problems(stream, receipt, version):
            who.setdefault(problem, []).append(str(place))
    if not who:
        return
    of = f" of {len(every)} (counted from 0): " if len(every) > 1 else ""
    told = [f"process {', '.join(places)}{of}{problem}" if of else problem for problem, places in who.items()]
    raise WeightSyncError("weights in the generation engine are not the trainer's: " + "; ".join(told))


def _problems(stream: WeightStream, receipt: Receipt, version: int) -> Iterator[str]:
    """Yields the faults of a receipt, in words."""
    received, published = receipt.received, stream.published
    if receipt.version != version:
        yield f"the engine reports version {receipt.version}, published was {version}"
    for names, what in [
        (stream.names - received.keys(), "never arrived"),
        ({n for n in received if published.get(n, received[n]) != received[n]}, "arrived with other values"),
        (received.keys() - stream.names, "arrived and were not published"),
        ((stream.names & received.keys()) - published.keys(), "arrived, and what left is unknown"),
    ]:
        if names:
            yield f"{len(names)} tensors {what}: {', '.join(sorted(names)[:5])}"


def _published_names(held: Iterable[str], lora: Literal["adapters", "merged"] | None) -> frozenset[str]:
    if lora == "merged":
        return frozenset(plain_name(name) for name in held if not is_adapter(name))
    return frozenset(filter(is_adapter, held) if lora == "adapters" else held)


def _same_names(published: frozenset[str], expected: frozenset[str]) -> None:
    problems = [
        f"{len(names)} {what}: {', '.join(sorted(names)[:5])}"
        for what, names in [
            ("published tensors that it lacks", published - expected),
            ("tensors of its own that are not published", expected - published),
        ]
        if names
    ]
    if problems:
        raise WeightSyncError("the generation engine's model is another one than the trainer's: " + "; ".join(problems))


def _gatherer(model: PreTrainedModel) -> Gather:
    """Makes a function that gives this model's tensors, whole, in its own order; tied ones one after the other."""

    def gather(wanted: frozenset[str]) -> Iterator[tuple[str, Tensor]]:
        # state_dict, not named_parameters: it holds tied weights under every name, as engines need them.
        same: dict[int, list[str]] = {}
        values = {n: v for n, v in model.state_dict(keep_vars=True).items() if n in wanted}
        for name, value in values.items():
            same.setdefault(id(value), []).append(name)
        for tied in same.values():
            whole: Tensor = values[tied[0]].detach()
            if isinstance(whole, DTensor):  # of a model that is offloaded: gathered on the mesh's device
                on_mesh: DTensor = whole.to(whole.device_mesh.device_type)  # type: ignore[assignment]
                whole = on_mesh.full_tensor()
                del on_mesh
            for name in tied:
                yield name, whole
            del whole

    return gather
