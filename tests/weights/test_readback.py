"""What lies in fused parameters is found again tensor by tensor; what is not whole there is left out."""

from __future__ import annotations

import torch
from torch import Tensor

from hybridflow.weights.readback import read_back
from hybridflow.weights.stream import fingerprint

from conformance import model_of


def fused(state: dict[str, Tensor], *, inside: str = "") -> dict[str, Tensor]:
    """A Hugging Face model's tensors as vLLM and SGLang join them; the output layer of 100 words is padded to 128."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        parent, _, last = name.rpartition(".")
        module, _, own = parent.rpartition(".")
        if own == "q_proj":
            parts = [state[f"{module}.{part}.{last}"] for part in ("q_proj", "k_proj", "v_proj")]
            found[f"{module}.qkv_proj.{last}"] = torch.cat(parts)
        elif own == "gate_proj":
            parts = [state[f"{module}.{part}.{last}"] for part in ("gate_proj", "up_proj")]
            found[f"{module}.gate_up_proj.{last}"] = torch.cat(parts)
        elif own == "experts":
            renamed = {"gate_up_proj": "w13_weight", "down_proj": "w2_weight"}[last]
            found[f"{parent}.{inside}{renamed}"] = tensor
        elif own in ("lm_head", "embed_tokens"):
            found[name] = torch.cat([tensor, torch.zeros(28, tensor.shape[1])])
        elif own not in ("k_proj", "v_proj", "up_proj"):
            found[name] = tensor
    return found


def test_every_tensor_of_fused_layers_is_found() -> None:
    for kind, inside in [("qwen2_tied", ""), ("qwen3", ""), ("qwen3_moe", "routed_experts."), ("qwen3_moe", "")]:
        state = {n: t.detach() for n, t in model_of(kind).state_dict().items()}
        held = fused(state, inside=inside)
        assert held.keys() != state.keys()
        found = read_back(held, {n: list(t.shape) for n, t in state.items()})
        assert found == {n: fingerprint(t) for n, t in state.items()}
        with torch.no_grad():
            joined = next(name for name in held if "qkv_proj.weight" in name)
            held[joined][-1, 0] += 1
        changed = read_back(held, {n: list(t.shape) for n, t in state.items()})
        assert [n for n in state if changed[n] != found[n]] == [joined.replace("qkv_proj", "v_proj")]


def test_layers_with_room_for_adapters_are_read_too() -> None:
    state = {n: t.detach() for n, t in model_of("qwen3").state_dict().items()}
    held = {n.replace("_proj.weight", "_proj.base_layer.weight"): t for n, t in fused(state).items()}
    assert read_back(held, {n: list(t.shape) for n, t in state.items()}).keys() == state.keys()


def test_what_is_packed_cut_or_unknown_is_left_out() -> None:
    state = {n: t.detach() for n, t in model_of("qwen3").state_dict().items()}
    shapes = {n: list(t.shape) for n, t in state.items()}
    whole = fused(state)
    packed = {n: torch.empty(0) if "proj" in n else t for n, t in whole.items()}
    assert not any("proj" in n for n in read_back(packed, shapes)) and len(read_back(packed, shapes)) > 8
    for rank in range(2):  # tensor parallel: halves of layers and embeddings, whole norms
        cut = {
            n: t if t.ndim == 1 else t.chunk(2, dim=int("o_proj" in n or "down" in n))[rank] for n, t in whole.items()
        }
        assert {n for n in state if "norm" in n} == read_back(cut, shapes).keys()
    assert read_back(whole, {"model.layers.0.self_attn.q_proj.weight": [128, 64]}) == {}, "its parts are not all named"
    assert read_back(whole, {"model.nowhere.weight": [3]}) == {}
