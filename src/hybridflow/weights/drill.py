"""A drill: it changes every tensor of a model so that an engine that missed one of them shows it, and changes it back.

The change is its own inverse, bit for bit, element by element: done twice, everything is as it was. So it takes no copy
of the weights, and shards of a tensor need not know of each other. Half of the elements get the first bit of their
mantissa flipped, half the second: numbers change by 10 to 50 percent either way and keep their magnitude, so a model
that has been changed is as well conditioned as it was. A zero changes places with a small number.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

PIECE = 1 << 20  # elements that are changed at once: bounds what it takes beside the tensor
SMALL = 0.0303  # the value that zeros become, with either sign; no weight begins as it
FORMATS = {  # the integer of the same size, and how many bits the mantissa has
    torch.float64: (torch.int64, 52),
    torch.float32: (torch.int32, 23),
    torch.bfloat16: (torch.int16, 7),
    torch.float16: (torch.int16, 10),
}


def perturb(tensors: Iterable[Tensor]) -> None:
    """Changes tensors of floating-point numbers in place, every element; a second call restores them.

    Args:
        tensors: each once, of any layout; of a DTensor, this rank's part. Others, of integers, are left alone.
    """
    with torch.no_grad():
        for tensor in tensors:
            local = tensor.detach()
            if isinstance(local, DTensor):
                local = local.to_local()
            if local.dtype in FORMATS and local.numel():
                flat = local.view(-1) if local.is_contiguous() else local.flatten()
                _flip(flat)
                if not local.is_contiguous():
                    local.copy_(flat.view_as(local))


def _flip(flat: Tensor) -> None:
    """Flips ``[N]`` values in place.

    Zero and the small number change places, so what these two would have been flipped to must stay as it is.
    """
    kind, mantissa = FORMATS[flat.dtype]
    places = torch.arange(min(PIECE, len(flat)), device=flat.device) * -0x61C8864680B583EB  # 2^64 / golden ratio
    first, negative = places < 0, (places << 1) < 0  # scattered, and independent of each other
    mask = torch.where(first, 1 << (mantissa - 1), 1 << (mantissa - 2)).to(kind)
    size = torch.tensor(SMALL, dtype=flat.dtype, device=flat.device)
    small = torch.where(negative, -size, size).view(kind)
    for bits in flat.view(kind).split(PIECE):
        m, s = mask[: len(bits)], small[: len(bits)]
        flipped = torch.where((bits == m) | (bits == s ^ m), bits, bits ^ m)
        flipped.masked_fill_(bits == s, 0)
        bits.copy_(torch.where(bits == 0, s, flipped))
