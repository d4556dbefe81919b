"""What vLLM's workers do for this library: take weights and adapters, report what arrived, read back what they hold.

vLLM mixes `WeightTaker` into its worker class (``worker_extension_cls``), wherever its workers run: in the training
process, in processes of their own, or behind an HTTP server. Its methods are then called by name through
``collective_rpc``; arguments and results are plain, so that they pass through JSON. Nothing here raises: when one of
several workers replies with an exception, vLLM leaves the replies of the others unread, and every later call gets the
reply to an earlier one. The result holds the error, under "error".

Weights go through vLLM's layer-wise reload alone, which packs them for the kernels again; loading into the model
directly raises on CPUs. What a stream lacks keeps its old packed copy, silently: its receipt then lacks it too.
"""

from __future__ import annotations

import socket
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hybridflow.protocols.weights import WeightStream
from hybridflow.weights.adapters import ADAPTER, is_adapter, plain_name
from hybridflow.weights.channel import Inbox
from hybridflow.weights.readback import read_back
from hybridflow.weights.stream import receive

EXTENSION = "hybridflow.rollout.vllm.worker.WeightTaker"  # for vLLM's worker_extension_cls
ADAPTER_ID = 1  # vLLM's number for the adapter that is trained; requests name it


@dataclass
class _Taken:
    """The state that a worker keeps from one stream to the next."""

    inbox: Inbox | None = None
    shapes: dict[str, tuple[list[int], torch.dtype]] = field(default_factory=dict)


class WeightTaker:
    """Methods of a vLLM worker; `self` is the worker, of any of vLLM's platforms."""

    model_runner: Any
    model_config: Any
    device: torch.device
    rank: int
    reload_weights: Callable[..., None]

    def host_name(self) -> str:
        """Returns the name of the host that this worker runs on."""
        return socket.gethostname()

    def take_weights(
        self, address: str, first: int, version: int, lora: Mapping[str, float] | None = None
    ) -> dict[str, Any]:
        """Takes the next stream that is sent at an address.

        Args:
            address: of the sender: see `weights.channel.Inbox`.
            first: which receiver the first worker of this engine is; others follow by their rank.
            version: of the weights.
            lora: {"rank": r, "alpha": a} of the adapter, where the engine was started with `enable_lora`.

        Returns:
            {"version", "received": fingerprints by name, "num_bytes"} of a `Receipt`, or {"error": text}.
        """

        def take() -> dict[str, Any]:
            taken = self._taken()
            if taken.inbox is None:
                taken.inbox = Inbox(device=self.device)
            with taken.inbox.take(address, first + self.rank) as stream:
                return self._load(stream, version, lora)

        return _told(take)

    def take_stream(
        self, stream: WeightStream, version: int, lora: Mapping[str, float] | None = None
    ) -> dict[str, Any]:
        """Takes a stream of this process. An exception of the stream is raised here: there is one worker."""
        return self._load(stream, version, lora)

    def drop_adapter(self) -> dict[str, Any]:
        """Puts an adapter that changes nothing in the place of the trained one."""

        def drop() -> dict[str, Any]:
            self._put_adapter({}, {})
            return {}

        return _told(drop)

    def read_back(self, names: Iterable[str]) -> dict[str, Any]:
        """Fingerprints tensors as they are in this worker's memory now; see `weights.readback.read_back`.

        Returns:
            {"held": fingerprints by name} of those that it holds whole, unpacked and in the precision they arrived in,
            or {"error": text}.
        """

        def look() -> dict[str, Any]:
            known = self._taken().shapes
            shapes = {n: known[n][0] for n in names if n in known and known[n][1] == self.model_config.dtype}
            packed = {id(p) for module in self._packed_experts() for p in module.parameters()}
            named = self.model_runner.get_model().named_parameters()
            return {"held": read_back({name: p for name, p in named if id(p) not in packed}, shapes)}

        return _told(look)

    def _taken(self) -> _Taken:
        if not hasattr(self, "_hybridflow_taken"):
            self._hybridflow_taken = _Taken()
        return self._hybridflow_taken

    def _load(self, stream: WeightStream, version: int, lora: Mapping[str, float] | None) -> dict[str, Any]:
        received: dict[str, int] = {}
        adapter: dict[str, Tensor] = {}
        shapes = self._taken().shapes
        num_bytes = 0

        def arriving() -> Iterator[tuple[str, Tensor]]:
            nonlocal num_bytes
            for name, tensor in receive(stream, received):
                num_bytes += tensor.nbytes
                # vLLM keeps the tensors that it gets until a layer is complete, and a bucket is filled again before
                # that. It multiplies B of adapters by their scale, in place.
                kept = tensor if stream.same_memory and not is_adapter(name) else tensor.clone()
                if is_adapter(name):
                    adapter[name] = kept
                else:
                    shapes[plain_name(name)] = list(tensor.shape), tensor.dtype
                    yield plain_name(name), kept
                del tensor, kept

        with torch.no_grad():
            if stream.adapter is None:
                self.reload_weights(weights_iterator=arriving())
                self._pack_experts()
            else:
                for name, _ in arriving():
                    raise ValueError(f"{name} in a stream of the adapter {stream.adapter!r} belongs to no adapter")
            if adapter and lora is None:
                raise ValueError("adapters arrive, and this engine was started without any")
            if lora is not None:  # new weights drop adapters; without new ones the plain model is sampled from
                self._put_adapter(adapter, lora)
        return {"version": version, "received": received, "num_bytes": num_bytes}

    def _packed_experts(self) -> list[Any]:
        """Returns the experts of a mixture where CPU kernels store them in an order of their own, some in the same
        shape.
        """
        if self.device.type != "cpu":
            return []
        return [m for m in self.model_runner.get_model().modules() if type(m).__name__ == "RoutedExperts"]

    def _pack_experts(self) -> None:
        """Packs them again: vLLM's reload leaves this out."""
        for module in self._packed_experts():
            module.quant_method.moe_kernel.fused_experts.process_weights_after_loading(module)

    def _put_adapter(self, tensors: Mapping[str, Tensor], lora: Mapping[str, float]) -> None:
        """Puts an adapter by peft's names into the place of the one before."""
        from vllm.lora.lora_model import LoRAModel
        from vllm.lora.peft_helper import PEFTHelper
        from vllm.lora.request import LoRARequest

        workers = self.model_runner.lora_manager
        manager = workers._adapter_manager
        if not tensors:
            manager.remove_adapter(ADAPTER_ID)
            workers.add_dummy_lora(LoRARequest(ADAPTER, ADAPTER_ID, "unused"), rank=1)  # all zero
            manager.activate_adapter(ADAPTER_ID)
            return
        mapper = getattr(self.model_runner.get_model(), "hf_to_vllm_mapper", None)
        loaded = LoRAModel.from_lora_tensors(
            ADAPTER_ID,
            {name.replace(f".{ADAPTER}.", "."): tensor for name, tensor in tensors.items()},
            PEFTHelper(r=int(lora["rank"]), lora_alpha=lora["alpha"], target_modules=[]),
            device=str(self.device),
            dtype=workers.lora_config.lora_dtype,
            model_vocab_size=workers.vocab_size,
            weights_mapper=None if mapper is None else mapper.get_rename_mapper(),
        )
        homeless = sorted(loaded.loras.keys() - _adapted(manager))
        if homeless:
            raise ValueError(f"vLLM has no place for the adapter of {homeless[0]}: publish rollout.lora=merged")
        manager.remove_adapter(ADAPTER_ID)
        manager.add_adapter(loaded)
        manager.activate_adapter(ADAPTER_ID)


def _adapted(manager: Any) -> set[str]:
    """Returns the names of the modules that vLLM can put adapters beside, as an adapter names them."""
    names = set()
    for name in manager.modules:
        parent, _, own = name.rpartition(".")
        names |= {f"{parent}.{part}" for part in manager.packed_modules_mapping.get(own, [own])}
    return names


def _told(act: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Returns what a call returns, or the text of what it raised; the traceback goes to the worker's own output."""
    try:
        return act()
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}
