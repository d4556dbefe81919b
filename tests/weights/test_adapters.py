"""Adapters travel alone or added into weights; both give the model that peft itself computes with."""

from __future__ import annotations

import pytest
import torch

from hybridflow.config.sections.model import LoraSection
from hybridflow.errors import UserError
from hybridflow.models.lora import add_lora, merged
from hybridflow.weights.stream import copy_weights, stream_of, weight_names

from on_ranks.weights import consumed, with_adapters
from tiny import packed_model


@pytest.mark.parametrize("kind", ["qwen3", "qwen2", "qwen3_moe"])
def test_merged_streams_are_peft_s_merge_under_plain_names(kind: str) -> None:
    model = with_adapters(packed_model(kind))
    plain = merged(model).state_dict()
    tensors, published, _ = consumed(model, lora="merged")
    assert tensors.keys() == plain.keys() == packed_model(kind).state_dict().keys() == published.keys()
    assert weight_names(model, "merged") == tensors.keys()
    moved = 0
    for name, tensor in tensors.items():
        assert (tensor - plain[name]).abs().max() <= 1e-6, name
        moved += not torch.equal(tensor, packed_model(kind).state_dict()[name])
    assert moved >= 8  # the four projections of attention in two layers at least
    assert all("lora" not in name and "base" not in name for name in tensors)


def test_weights_of_few_bits_are_merged_in_float32() -> None:
    model = with_adapters(packed_model()).to(torch.bfloat16)
    tensors, _, _ = consumed(model, lora="merged")
    module = model.get_base_model().model.layers[0].self_attn.q_proj
    a, b = (getattr(module, f"lora_{x}")["default"].weight.float() for x in "AB")
    exact = module.base_layer.weight.float() + module.scaling["default"] * b @ a
    found = tensors["model.layers.0.self_attn.q_proj.weight"]
    assert found.dtype == torch.bfloat16 and torch.equal(found, exact.to(torch.bfloat16))


def test_a_stream_of_adapters_alone_brings_a_receiver_up_to_date() -> None:
    trained, receiver = with_adapters(packed_model(), seed=1), with_adapters(packed_model(), seed=2)
    stream = stream_of(trained, lora="adapters")
    assert stream.adapter == "default" and stream.names == {n for n in trained.state_dict() if "lora_" in n}
    received, num_bytes = copy_weights(stream, receiver.state_dict())
    assert received == stream.published and num_bytes == sum(p.nbytes for p in trained.parameters() if p.requires_grad)
    for name, tensor in trained.state_dict().items():
        assert torch.equal(receiver.state_dict()[name], tensor), name


def test_adapters_that_cannot_be_added_are_refused_by_name() -> None:
    model = add_lora(packed_model("qwen2"), LoraSection(target_modules=["embed_tokens"]), seed=0)
    with pytest.raises(UserError, match=r"lora_embedding_A.*cannot be added into a weight"):
        stream_of(model, lora="merged")
    assert consumed(model, lora="adapters")[0]
