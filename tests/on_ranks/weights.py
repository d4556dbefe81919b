"""What processes of `tests/weights` do."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers.modeling_utils import PreTrainedModel

from hybridflow.config.sections.model import LoraSection
from hybridflow.models.lora import add_lora
from hybridflow.protocols.weights import Receipt
from hybridflow.rollout.inline.engine import InlineEngine
from hybridflow.weights.carriers import Kind
from hybridflow.weights.stream import receive, stream_of, verify
from hybridflow.weights.transport import drain, open_receiver, open_sender

from conformance import model_of
from tiny import packed_model, plain_model


def sharded(model: PreTrainedModel, mesh_shape: tuple[int, ...]) -> PreTrainedModel:
    """The model, every layer and the rest cut over all ranks (or over those of a row of the mesh)."""
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("copies", "parts")[-len(mesh_shape) :])
    trunk = model.get_base_model().model if hasattr(model, "peft_config") else model.model
    for layer in trunk.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert isinstance(model, FSDPModule)
    return model


def with_adapters(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """The model with adapters of which both halves are random."""
    model = add_lora(model, LoraSection(rank=3, alpha=5.0), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def consumed(model: PreTrainedModel, **how: Any) -> tuple[dict[str, Tensor], dict[str, int], list[str]]:
    stream = stream_of(model, **how)
    order = []
    tensors = {}
    for name, tensor in stream.tensors:
        order.append(name)
        tensors[name] = tensor.clone()
    assert frozenset(order) == stream.names and len(order) == len(stream.names)
    return tensors, stream.published, order


def gathered_as_the_whole_model(kind: str, mesh_shape: tuple[int, ...]) -> int:
    """Sharded and whole models publish the same bits; also while parameters stand gathered after a forward pass."""
    whole, parts = plain_model(kind), sharded(plain_model(kind), mesh_shape)
    fingerprints = dist.get_rank() == 0
    for _ in range(2):
        expected, published, order = consumed(whole)
        tensors, left, found = consumed(parts, fingerprints=fingerprints)
        assert found == order and (left == published if fingerprints else not left)
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)
        assert not any(type(tensor).__name__ == "DTensor" for tensor in tensors.values())
        with torch.no_grad():  # the root keeps its parameters gathered after this
            parts(torch.tensor([[1, 2, 3]]))
    return len(order)


def adapters_of_sharded(mesh_shape: tuple[int, ...]) -> None:
    """A sharded model's adapters leave alone, and added into weights, with the bits of the whole model's."""
    whole, parts = with_adapters(packed_model()), sharded(with_adapters(packed_model()), mesh_shape)
    for lora in ("adapters", "merged"):
        expected, tensors = (consumed(model, lora=lora)[0] for model in (whole, parts))
        assert expected.keys() == tensors.keys()
        assert all(torch.equal(tensors[name], expected[name]) for name in expected), lora


def send(kind: Kind, port: int, receivers: int, updates: int, **how: Any) -> list[tuple[int, dict[str, int]]]:
    """Both ranks of a training group publish; rank 0 is the one that sends."""
    rank = dist.get_rank()
    model = sharded(packed_model("qwen3"), (dist.get_world_size(),))
    answers = []
    sender = None
    if rank == 0:
        sender = open_sender(kind, receivers, port=port, timeout=40, **how)
    for _ in range(updates):
        stream = stream_of(model, fingerprints=rank == 0)
        num_bytes = 0
        if sender is None:
            drain(stream)
        else:
            num_bytes = sender.send(stream)
        answers.append((num_bytes, stream.published))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
    if sender is not None:
        sender.close()
    return answers


def send_halves(port: int, receivers: int, updates: int, **how: Any) -> list[dict[str, int]]:
    """Two ranks, with half of every layer each, publish the conformance suite's Qwen3, larger every time."""
    whole = model_of("qwen3")
    all_bytes = sum(p.nbytes for p in whole.parameters())
    model = sharded(whole, (dist.get_world_size(),))
    assert sum(p.to_local().nbytes for p in model.parameters()) < 0.6 * all_bytes  # type: ignore[operator]
    sender = None
    if dist.get_rank() == 0:
        sender = open_sender("shared_memory", receivers, port=port, timeout=60, **how)
    published = []
    for _ in range(updates):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.2)
        stream = stream_of(model, fingerprints=sender is not None)
        if sender is None:
            drain(stream)
        else:
            sender.send(stream)
        published.append(stream.published)
    if sender is not None:
        sender.close()
    return published


def receive_into_replica(address: str, updates: int) -> list[tuple[Receipt, dict[str, int]]]:
    """A replica in another pool takes and acknowledges every stream."""
    receiver = open_receiver(address, dist.get_rank(), timeout=40)
    engine = InlineEngine(packed_model("qwen3", seed=9))
    answers = []
    for version in range(1, updates + 1):
        stream = receiver.receive()
        (receipt,) = engine.update_weights(stream, version)
        verify(stream, receipt, version)
        answers.append((receipt, stream.published))
    expected = packed_model("qwen3").state_dict()
    for name, tensor in engine.model.state_dict().items():
        assert torch.equal(tensor, expected[name] * 1.5 ** (updates - 1)), name
    receiver.close()
    return answers


def send_and_die(kind: Kind, port: int, after: int, folder: str) -> None:
    """Sends a few tensors and is killed."""
    stream = stream_of(packed_model())
    stream.tensors = dying(stream.tensors, after)
    open_sender(kind, 1, port=port, bucket_bytes=2048, timeout=60, folder=folder).send(stream)


def receive_and_die(address: str, after: int) -> None:
    """Takes a few tensors and is killed."""
    host, _, port = address.rpartition(":")
    dist.TCPStore(host, int(port), is_master=False).set("the process is up", "")
    stream = open_receiver(address, 0, timeout=60).receive()
    for _ in receive(stream, {}):
        after -= 1
        if not after:
            os.kill(os.getpid(), signal.SIGKILL)


def dying(tensors: Iterator[tuple[str, Tensor]], after: int) -> Iterator[tuple[str, Tensor]]:
    for i, pair in enumerate(tensors):
        if i == after:
            os.kill(os.getpid(), signal.SIGKILL)
        yield pair
