"""FSDP2 (`fully_shard`): every parameter is a DTensor of which each rank holds some rows.

PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel, arXiv 2304.11277.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from hybridflow.config.sections.engine import Fsdp2Section
from hybridflow.engines.scoring import TokenScorer


class Fsdp2:
    """A scorer whose parameters are cut over a mesh; see `sharded.Sharding`.

    Args:
        root: on the meta device.
        layers: its modules whose parameters are gathered together.
        mesh: of all ranks: one dimension, or two where several copies of the parameters are kept (HSDP).
        section: how it is cut.
        compute: the type that products are computed in.
        device: of this rank.
    """

    def __init__(
        self,
        root: TokenScorer,
        layers: Sequence[torch.nn.Module],
        *,
        mesh: DeviceMesh,
        section: Fsdp2Section,
        compute: torch.dtype,
        device: torch.device,
    ) -> None:
        low = compute == torch.bfloat16
        reduce = torch.bfloat16 if section.reduce_dtype == "bfloat16" else torch.float32 if low else None
        precision = MixedPrecisionPolicy(param_dtype=compute if low else None, reduce_dtype=reduce)
        # Pinned memory needs an accelerator: without one, torch's default fails.
        offload = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if section.cpu_offload else OffloadPolicy()
        for layer in layers:
            if section.compile:
                layer.compile()
            fully_shard(
                layer,
                mesh=mesh,
                reshard_after_forward=section.reshard_after_forward,
                mp_policy=precision,
                offload_policy=offload,
            )
        if root.value_head is not None:  # values are float32 whatever the trunk computes in
            fully_shard(root.value_head, mesh=mesh, reshard_after_forward=False, offload_policy=offload)
        # The output layer belongs to the root, and the backward pass reads it again outside of any module
        # (log_probs.py).
        fully_shard(root, mesh=mesh, reshard_after_forward=False, mp_policy=precision, offload_policy=offload)
        self.root: torch.nn.Module = root
        self.device, self.home = device, torch.device("cpu") if section.cpu_offload else device
        for module in self._modules():  # weights were computed for the whole mini-batch: sums, not means
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """Returns every parameter by its name in the scorer: DTensors."""
        return dict(self.root.named_parameters())

    def fill(self, source: Mapping[str, Tensor]) -> None:
        """Takes weights and buffers, tensor by tensor, from rank 0: no other rank ever holds more than one of them.

        Args:
            source: full tensors by name in the scorer; empty on all ranks but the first.
        """
        self.root.to_empty(device=self.home)
        for module in self.root.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(self.device)
        with torch.no_grad():
            for name, parameter in self.parameters().items():
                assert isinstance(parameter, DTensor)
                full = from_first(source.get(name), parameter, self.device)
                part = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
                parameter.to_local().copy_(part.to_local())
            for name, buffer in self.root.named_buffers():
                buffer.copy_(from_first(source.get(name), buffer, self.device))

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Keeps the gradients of backward passes in the block on their rank."""
        assert isinstance(self.root, FSDPModule)
        self.root.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.root.set_requires_gradient_sync(True)

    def clip(self, parameters: Sequence[torch.nn.Parameter], most: float) -> float:
        """Scales the gradients down to a global norm of at most this; returns the norm before."""
        norm = torch.nn.utils.clip_grad_norm_(parameters, most)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def reshard(self) -> None:
        """Frees gathered parameters: after a pass without a backward pass they would stay, and become outdated."""
        for module in self._modules():
            module.reshard()

    def to(self, device: torch.device) -> None:
        """Moves the parameters."""
        self.root.to(device)

    def full_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yields the whole parameters, one after the other, by name in the scorer; all ranks take them in lock step."""
        for name, parameter in self.parameters().items():
            assert isinstance(parameter, DTensor)
            own = parameter.detach().to(self.device)
            assert isinstance(own, DTensor)
            yield name, own.full_tensor()

    def _modules(self) -> list[FSDPModule]:
        return [module for module in self.root.modules() if isinstance(module, FSDPModule)]


def from_first(source: Tensor | None, like: Tensor, device: torch.device) -> Tensor:
    """Returns rank 0's tensor, on every rank; the others give None, and a tensor that it is like."""
    if source is None:
        tensor = torch.empty(like.shape, dtype=like.dtype, device=device)
    else:
        tensor = source.detach().to(device, like.dtype).contiguous()
    dist.broadcast(tensor, 0)
    return tensor
