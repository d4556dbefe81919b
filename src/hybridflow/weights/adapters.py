"""Adapters in a weight stream: which tensors they are by peft's names, and how they are added into plain weights.

Shapes: O outputs and I inputs of a layer, r rank, E experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hybridflow.errors import UserError

ADAPTER = "default"  # peft's name of the one that `models.lora` adds
PREFIX = "base_model.model."
WRAPPED = "_fsdp_wrapped_module."  # what FSDP1 puts into the names of modules


@dataclass(frozen=True)
class Adapted:
    """A weight and its two adapters, by their names in the model.

    Args:
        weight: ``[O, I]``, or of experts ``[E, O, I]`` (``[E, I, O]`` if `inputs_first`).
        a: ``[r, I]``, of experts ``[E x r, I]``.
        b: ``[O, r]``, of experts ``[O, r x E]``.
        scale: factor of their product.
        experts: E; 1 for a plain layer.
        inputs_first: which way round the weight of experts lies.
    """

    weight: str
    a: str
    b: str
    scale: float
    experts: int = 1
    inputs_first: bool = False


def is_adapter(name: str) -> bool:
    """Returns whether a tensor of this name belongs to an adapter."""
    return ".lora_" in name


def plain_name(name: str) -> str:
    """Returns the name in the plain model of a tensor that is no adapter."""
    return re.sub(r"(\.base_layer)+\.", ".", name.removeprefix(PREFIX))


def adapted_weights(model: nn.Module, names: Iterable[str]) -> list[Adapted]:
    """Returns the weights that adapters belong to.

    Args:
        model: a model with adapters by peft.
        names: its tensors.

    Raises:
        UserError: there are adapters that are not two matrices beside a linear layer or experts.
    """
    found = []
    for name, module in ((n.replace(WRAPPED, ""), m) for n, m in model.named_modules()):
        if not (hasattr(module, "base_layer") and hasattr(module, "scaling")):
            continue
        if getattr(module, "fan_in_fan_out", False):
            continue  # of a transposed layer: refused below
        experts, base, parameter = 1, f"{name}.base_layer", "weight"
        if hasattr(module, "parameter_name"):  # of experts, whose parameters are wrapped one in the other; or a router
            experts, parameter = module.num_experts, module.parameter_name
            while f"{base}.{parameter}" not in names:
                base += ".base_layer"
        a, b = (f"{name}.lora_{x}.{ADAPTER}.weight" for x in "AB")
        scale, swapped = float(module.scaling[ADAPTER]), getattr(module, "_did_swap_in_out_features", False)
        found.append(Adapted(f"{base}.{parameter}", a, b, scale, experts, not swapped))
    unknown = {name for name in names if is_adapter(name)} - {n for w in found for n in (w.a, w.b)}
    if unknown:
        raise UserError(
            f"the adapter {min(unknown)} cannot be added into a weight",
            why="only adapters of linear layers and experts are: the weight plus the scaled product of two matrices",
            fix="choose linear layers in model.lora.target_modules, or set rollout.lora=adapters",
        )
    return found


def merge_adapters(tensors: Iterable[tuple[str, Tensor]], adapted: Iterable[Adapted]) -> Iterator[tuple[str, Tensor]]:
    """Yields plain weights under plain names: W + scale * B @ A, computed in float32 (LoRA, arXiv 2106.09685, section
    4.1).

    Args:
        tensors: of a model with adapters, under peft's names. A weight waits for its two adapters, or they for it.
        adapted: see `adapted_weights`.
    """
    parts = {name: weight for weight in adapted for name in (weight.weight, weight.a, weight.b)}
    waiting: dict[Adapted, dict[str, Tensor]] = {}
    for name, tensor in tensors:
        whole = parts.get(name)
        if whole is None:
            yield plain_name(name), tensor
        else:
            there = waiting.setdefault(whole, {})
            there[name] = tensor
            if len(there) == 3:
                del waiting[whole]
                yield plain_name(whole.weight), _merged(whole, there)
                del there
        del tensor
    assert not waiting, f"adapters without a weight, or the other way round: {[w.weight for w in waiting][:5]}"


def _merged(adapted: Adapted, parts: dict[str, Tensor]) -> Tensor:
    weight, wide = parts[adapted.weight], torch.promote_types(parts[adapted.weight].dtype, torch.float32)
    a, b = parts[adapted.a].to(wide), parts[adapted.b].to(wide)
    if adapted.experts > 1:
        a_ErI = a.view(adapted.experts, -1, a.shape[-1])
        b_EOr = b.view(len(b), -1, adapted.experts).permute(2, 0, 1)
        delta = b_EOr @ a_ErI
        delta = delta.mT if adapted.inputs_first else delta
    else:
        delta = b @ a
    return delta.mul_(adapted.scale).add_(weight).to(weight.dtype).contiguous()
