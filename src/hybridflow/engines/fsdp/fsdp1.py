"""FSDP1 (`FullyShardedDataParallel`), for users who depend on it: shards, HSDP, bfloat16, host offload on a GPU.

It keeps the parameters of a layer end to end in one flat tensor, of which every rank holds a piece: `parameters` are
views of this rank's piece, of one dimension, and empty where the piece holds nothing of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffload, FullyShardedDataParallel, MixedPrecision, ShardingStrategy

from hybridflow.config.sections.engine import Fsdp1Section
from hybridflow.engines.fsdp.fsdp2 import from_first
from hybridflow.engines.scoring import TokenScorer
from hybridflow.errors import UserError
from hybridflow.weights.adapters import WRAPPED


class Fsdp1:
    """A scorer whose parameters are cut over a mesh; see `sharded.Sharding`. The arguments are those of `Fsdp2`.

    Raises:
        UserError: something that FSDP1 does not do.
    """

    def __init__(
        self,
        root: TokenScorer,
        layers: Sequence[torch.nn.Module],
        *,
        mesh: DeviceMesh,
        section: Fsdp1Section,
        compute: torch.dtype,
        device: torch.device,
    ) -> None:
        _refuse(section, device, root)
        low = compute == torch.bfloat16
        reduce = torch.bfloat16 if section.reduce_dtype == "bfloat16" else torch.float32 if low else None
        strategies = {
            (1, True): ShardingStrategy.FULL_SHARD,
            (1, False): ShardingStrategy.SHARD_GRAD_OP,
            (2, True): ShardingStrategy.HYBRID_SHARD,
            (2, False): ShardingStrategy._HYBRID_SHARD_ZERO2,
        }
        materialize = _on(device)

        def wrapped(module: torch.nn.Module, precision: MixedPrecision | None) -> FullyShardedDataParallel:
            return FullyShardedDataParallel(
                module,
                device_mesh=mesh,
                sharding_strategy=strategies[mesh.ndim, section.reshard_after_forward],
                mixed_precision=precision,
                cpu_offload=CPUOffload(offload_params=section.cpu_offload),
                device_id=device if device.type == "cpu" or device.index is not None else torch.device(device.type, 0),
                param_init_fn=materialize,
                use_orig_params=True,
            )

        precision = MixedPrecision(param_dtype=compute if low else None, reduce_dtype=reduce)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*FSDP.*", category=FutureWarning)
            wanted = {id(layer) for layer in layers}
            for parent in list(root.modules()):
                for name, child in list(parent.named_children()):
                    if id(child) in wanted:
                        setattr(parent, name, wrapped(child, precision))
            if root.value_head is not None:  # values are float32 whatever the trunk computes in
                root.value_head = wrapped(root.value_head, None)  # type: ignore[assignment]
            self._root = wrapped(root, precision)
        self.root: torch.nn.Module = self._root
        self.device = device
        for unit in self._units().values():  # weights were computed for the whole mini-batch: sums, not means
            assert unit._gradient_predivide_factor and unit._gradient_postdivide_factor
            unit._gradient_predivide_factor = unit._gradient_postdivide_factor = 1

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """Returns this rank's piece of every parameter, by its name in the scorer."""
        named = torch.nn.Module.named_parameters(self._root)
        return {name.replace(WRAPPED, ""): parameter for name, parameter in named}

    def fill(self, source: Mapping[str, Tensor]) -> None:
        """See `Sharding.fill`: a rank holds the parameters of one layer at most."""
        for prefix, unit in self._units().items():
            with FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=True), torch.no_grad():
                for name, parameter in _own_parameters(prefix, unit):
                    parameter.copy_(from_first(source.get(name), parameter, self.device))
        for name, buffer in torch.nn.Module.named_buffers(self._root):
            buffer.copy_(from_first(source.get(name.replace(WRAPPED, "")), buffer, self.device))

    def no_sync(self) -> AbstractContextManager[None]:
        """See `Sharding.no_sync`."""
        return self._root.no_sync()

    def clip(self, parameters: Sequence[torch.nn.Parameter], most: float) -> float:
        """See `Sharding.clip`; all parameters that have a gradient are among those given."""
        return float(self._root.clip_grad_norm_(most))

    def reshard(self) -> None:
        """See `Sharding.reshard`."""
        for unit in self._units().values():
            handle = unit._handle
            if handle is not None and handle.uses_sharded_strategy and not handle.needs_unshard():
                handle.reshard(True)

    def to(self, device: torch.device) -> None:
        """Leaves the parameters where they are: `_refuse` has refused every other request."""

    def full_tensors(self, *, gradients: bool = False) -> Iterator[tuple[str, Tensor]]:
        """See `Sharding.full_tensors`: the parameters of one layer are gathered together.

        Args:
            gradients: give the gradients instead, of those that have one.
        """
        for prefix, unit in self._units().items():
            with FullyShardedDataParallel.summon_full_params(
                unit, recurse=False, writeback=False, with_grads=gradients
            ):
                own = [(n, p.grad if gradients else p) for n, p in _own_parameters(prefix, unit)]
                copies = [(name, tensor.detach().clone()) for name, tensor in own if tensor is not None]
            yield from copies  # outside of the block: a caller that stops in the middle then leaves nothing gathered

    def _units(self) -> dict[str, FullyShardedDataParallel]:
        """Returns the modules that are gathered as a whole, by name."""
        named = torch.nn.Module.named_modules(self._root)
        return {name: m for name, m in named if isinstance(m, FullyShardedDataParallel)}


def _refuse(section: Fsdp1Section, device: torch.device, root: torch.nn.Module) -> None:
    what = None
    if section.cpu_offload and device.type == "cpu":
        what = "engine.cpu_offload", "it needs memory that an accelerator has pinned"
    elif any(
        type(module).__name__ == "ParamWrapper" for module in root.modules()
    ):  # peft's, of weights without a layer
        what = "adapters of experts", "they are added to weights that it has replaced by views"
    if what is not None:
        raise UserError(f"FSDP1 has no {what[0]} here", why=what[1], fix="set engine.strategy=fsdp2, or leave it out")


def _own_parameters(prefix: str, unit: FullyShardedDataParallel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yields the parameters of a module that are gathered with it, by their names in the scorer."""
    for name, parameter in torch.nn.Module.named_parameters(unit):
        inner = name.removeprefix(WRAPPED)
        if WRAPPED not in inner:  # otherwise it is of an inner module that is gathered on its own
            yield ".".join(part for part in (prefix, inner) if part).replace(WRAPPED, ""), parameter


def _on(device: torch.device) -> Callable[[torch.nn.Module], None]:
    """Returns a function that gives a module's own parameters and buffers memory; those that are tied stay tied."""
    made: dict[int, tuple[torch.nn.Parameter, torch.nn.Parameter]] = {}

    def materialize(module: torch.nn.Module) -> None:
        for name, p in module._parameters.items():
            if p is not None and p.is_meta:
                real = torch.nn.Parameter(torch.empty_like(p, device=device), requires_grad=p.requires_grad)
                module._parameters[name] = made.setdefault(id(p), (real, p))[0]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device=device)

    return materialize
