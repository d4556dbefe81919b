"""Activations in host memory until the backward pass reads them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

SMALL = 2**16  # bytes: moving fewer costs more than it frees


@contextmanager
def kept_on_host() -> Iterator[None]:
    """Moves to host memory what a forward pass in the block saves for its backward pass, except weights.

    Weights stay where they are: they are gathered again in the backward pass.
    """

    def pack(tensor: Tensor) -> tuple[torch.device, Tensor]:
        base = tensor if tensor._base is None else tensor._base
        if isinstance(base, torch.nn.Parameter) or tensor.nbytes < SMALL:
            return tensor.device, tensor
        pinned = torch.cuda.is_available()
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
        return tensor.device, host.copy_(tensor, non_blocking=pinned)

    def unpack(packed: tuple[torch.device, Tensor]) -> Tensor:
        device, tensor = packed
        return tensor.to(device, non_blocking=torch.cuda.is_available())

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
