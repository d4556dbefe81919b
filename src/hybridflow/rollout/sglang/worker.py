"""What SGLang's schedulers do for this library: take weights, report what arrived, read back what they hold.

SGLang calls a custom weight loader in every scheduler process with its model and whatever tensors the call for an
update carried. `load_weights` is ours (``--custom-weight-loader``); the only "tensor" that it is given is empty, and
its name is an order in JSON. Weights come over the stream that vLLM's workers take, whatever its transport.

The loader never raises: an exception ends a scheduler, and the server with it. The outcome of an order is written to
the key-value store of the process that gave it.
"""

from __future__ import annotations

import base64
import json
import pickle
import socket
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hybridflow.rollout.sglang import sampler as sglang_sampler
from hybridflow.weights.channel import Inbox
from hybridflow.weights.readback import read_back
from hybridflow.weights.stream import WeightSyncError, receive

LOADER = "hybridflow.rollout.sglang.worker.load_weights"  # for SGLang's custom_weight_loader, and as load_format
STORE_TIMEOUT = timedelta(seconds=30)


@dataclass
class _Worker:
    """The state that this process keeps from one order to the next."""

    inbox: Inbox | None = None
    stores: dict[str, dist.Store] = field(default_factory=dict)
    shapes: dict[str, tuple[list[int], torch.dtype]] = field(default_factory=dict)


_WORKER = _Worker()


def order(number: str, reply: str, what: Mapping[str, Any]) -> str:
    """Returns an order as the text that ``update_weights_from_tensor`` wants for every process.

    Args:
        number: of the order, never used twice.
        reply: ``host:port`` of the store that replies go to, as "answer/NUMBER/RANK".
        what: {"do": "look"}, {"do": "take", "address", "first", "version"}, or {"do": "read_back", "names"}.
    """
    text = json.dumps({"number": number, "reply": reply, **what})
    return base64.b64encode(pickle.dumps([(text, torch.empty(0))])).decode()


def load_weights(model: torch.nn.Module, named_tensors: Sequence[tuple[str, Tensor]]) -> None:
    """Obeys one order; SGLang calls it."""
    try:
        ((text, _),) = named_tensors
        told = json.loads(text)
        rank = dist.get_rank()
        try:
            answer = _obey(model, told, rank)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": str(error) if isinstance(error, WeightSyncError) else f"{type(error).__name__}: {error}"}
        _store(told["reply"]).set(f"answer/{told['number']}/{rank}", json.dumps(answer))
    except Exception:  # the process that gave the order has ended, or is of another version: it gets no reply
        traceback.print_exc()


def _obey(model: torch.nn.Module, told: Mapping[str, Any], rank: int) -> dict[str, Any]:
    if told["do"] == "look":
        sglang_sampler.install()
        return {"host": socket.gethostname(), "vocabulary": model.config.vocab_size}  # type: ignore[union-attr]
    parameters = dict(model.named_parameters())
    dtype, device = _of_most(parameters.values())
    if told["do"] == "read_back":
        known = _WORKER.shapes
        shapes = {n: known[n][0] for n in told["names"] if n in known and known[n][1] == dtype}
        return {"held": read_back(parameters, shapes)}
    assert told["do"] == "take"
    if _WORKER.inbox is None:
        _WORKER.inbox = Inbox(device=device)
    received: dict[str, int] = {}
    num_bytes = 0

    def arriving() -> Iterator[tuple[str, Tensor]]:
        nonlocal num_bytes
        for name, tensor in receive(stream, received):
            num_bytes += tensor.nbytes
            _WORKER.shapes[name] = list(tensor.shape), tensor.dtype
            # Loaders may copy in threads, after they asked for the next tensor; a bucket is filled again by then.
            yield from as_stored(name, tensor.clone(), parameters)
            del tensor

    with _WORKER.inbox.take(told["address"], told["first"] + rank) as stream, torch.no_grad():
        if stream.adapter is not None:
            raise ValueError("an adapter alone arrives, and SGLang takes whole weights: publish rollout.lora=merged")
        model.load_weights(arriving())  # type: ignore[operator]
    return {"version": told["version"], "received": received, "num_bytes": num_bytes}


def as_stored(name: str, tensor: Tensor, parameters: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yields a tensor under the names that SGLang's loaders know.

    Hugging Face joins a mixture's experts in memory and not in files; SGLang reads files, and silently skips names that
    it does not know.

    Args:
        name: of the tensor in the model.
        tensor: "experts.gate_up_proj" ``[E, 2 I, H]`` and "experts.down_proj" ``[E, H, I]`` are taken apart (E experts,
            H hidden size, I size between).
        parameters: of SGLang's model; where they do not show these shapes, the model reads joined experts itself.
    """
    parent, _, own = name.rpartition(".")
    fused = parameters.get(f"{parent}.w13_weight" if own == "gate_up_proj" else f"{parent}.w2_weight")
    side = -1 if own == "gate_up_proj" else -2  # the hidden size, which tensor parallelism does not cut
    apart = parent.endswith(".experts") and own in ("gate_up_proj", "down_proj") and tensor.ndim == 3
    if not apart or fused is None or fused.shape[side] != tensor.shape[side]:
        yield name, tensor
        return
    for expert, weight in enumerate(tensor):
        if own == "down_proj":
            yield f"{parent}.{expert}.down_proj.weight", weight
        else:
            gate, up = weight.chunk(2)
            yield f"{parent}.{expert}.gate_proj.weight", gate
            yield f"{parent}.{expert}.up_proj.weight", up


def _of_most(parameters: Any) -> tuple[torch.dtype, torch.device]:
    """Returns type and device of the largest parameter."""
    largest = max(parameters, key=Tensor.numel)
    return largest.dtype, largest.device


def _store(address: str) -> dist.Store:
    if address not in _WORKER.stores:
        host, _, port = address.rpartition(":")
        _WORKER.stores = {address: dist.TCPStore(host, int(port), is_master=False, timeout=STORE_TIMEOUT)}
    return _WORKER.stores[address]
