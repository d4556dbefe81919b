"""Reading weights back out of an engine that keeps them in layers of its own: vLLM's and SGLang's fused parameters.

An engine computes with what lies in its memory now, long after a receipt was written. Engines join tensors of a Hugging
Face model (queries, keys and values; gate and up) along their rows; such a part is read as the rows it became. Tensors
that cannot be read one by one are left out: parameters that were packed for a kernel (empty, or of another shape), and
those of which a process holds a part only (tensor parallelism).

Shapes: O outputs and I inputs of a layer, E experts, V words.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from hybridflow.weights.stream import WeightSyncError, fingerprint

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
EXPERTS = {"gate_up_proj": "w13_weight", "down_proj": "w2_weight"}  # ``[E, 2 O, I]`` and ``[E, O, I]`` in all of them
ROWS = 64  # engines pad the rows of embeddings and output layers to a multiple of this


def read_back(parameters: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Returns the fingerprints of Hugging Face tensors as they lie in an engine's parameters now.

    Args:
        parameters: the ``named_parameters()`` of the engine's module, of one process.
        shapes: the whole shape of each tensor to read, by its Hugging Face name. Fused parameters are read where all
            their parts are named.

    Returns:
        By name, those tensors that the parameters hold whole, as they are; others are left out.
    """
    held = {name.replace(".base_layer.", ".").replace(".routed_experts.", "."): p for name, p in parameters.items()}
    found = {}
    for name, shape in shapes.items():
        tensor = _whole(held.get(name), shape)
        if tensor is None:
            tensor = _experts(name, shape, held)
        if tensor is None:
            tensor = _rows(name, held, shapes)
        if tensor is not None:
            found[name] = fingerprint(tensor)
    return found


def together(held: Iterable[Mapping[str, int]], whose: str) -> dict[str, int]:
    """Joins the fingerprints that several processes hold of the same weights.

    Args:
        held: of each process, fingerprints by name.
        whose: names the processes in messages.

    Raises:
        WeightSyncError: two of them hold different values of one tensor.
    """
    found: dict[str, int] = {}
    for one in held:
        for name, value in one.items():
            if found.setdefault(name, value) != value:
                raise WeightSyncError(f"{whose} hold different values of {name}")
    return found


def _whole(parameter: Tensor | None, shape: Sequence[int]) -> Tensor | None:
    """Returns a parameter of this shape, or of this shape and padded rows."""
    if parameter is None or parameter.ndim != len(shape) or not shape:
        return None
    rows = {shape[0], -(-shape[0] // ROWS) * ROWS if len(shape) == 2 else shape[0]}
    if parameter.shape[0] not in rows or list(parameter.shape[1:]) != list(shape[1:]):
        return None
    return parameter[: shape[0]]


def _experts(name: str, shape: Sequence[int], held: Mapping[str, Tensor]) -> Tensor | None:
    parent, _, own = name.rpartition(".")
    parameter = held.get(f"{parent}.{EXPERTS[own]}") if own in EXPERTS and parent.endswith(".experts") else None
    return parameter if parameter is not None and list(parameter.shape) == list(shape) else None


def _rows(name: str, held: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> Tensor | None:
    """Returns a part of a fused parameter: its rows, if the parameter has the rows of all parts and no more."""
    module, _, kind = name.rpartition(".")  # "...self_attn.q_proj", "weight"
    parent, _, own = module.rpartition(".")
    for fused, parts in FUSED.items():
        parameter = held.get(f"{parent}.{fused}.{kind}") if own in parts else None
        siblings = [shapes.get(f"{parent}.{part}.{kind}") for part in parts]
        if parameter is None or None in siblings:
            continue
        rows = [sibling[0] for sibling in siblings if sibling]
        if list(parameter.shape) == [sum(rows), *shapes[name][1:]]:
            first = sum(rows[: parts.index(own)])
            return parameter[first : first + shapes[name][0]]
    return None
