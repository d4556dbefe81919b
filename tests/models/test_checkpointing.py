"""Activation checkpointing: the same gradients from less memory, in every kind of run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from hybridflow.errors import UserError
from hybridflow.models.checkpointing import checkpoint_activations
from hybridflow.models.forward import score_tokens

from runs import assert_same_tensors, configuration, succeed
from tiny import packed_model, ragged_batch


def gradients_and_bytes(model: PreTrainedModel) -> tuple[dict[str, Tensor], int]:
    """The gradients of a loss, and how many bytes of activations were kept for them, each memory once."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        scores = score_tokens(model, ragged_batch((60, 7, 90, 33)), temperature=1.0, entropy="no")
    scores.logp_M.sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return gradients, sum(size for place, size in kept.items() if place not in own)


def test_the_same_gradients_from_less_memory() -> None:
    plain, checkpointed = packed_model(), packed_model()
    checkpoint_activations(checkpointed)
    (wanted, all_bytes), (found, fewer_bytes) = gradients_and_bytes(plain), gradients_and_bytes(checkpointed)
    assert found.keys() == wanted.keys()
    assert all(found[n].equal(wanted[n]) for n in wanted)
    assert fewer_bytes < all_bytes / 3


@pytest.mark.parametrize(
    ("command", "sections"),
    [
        ("sft", {}),
        ("train", {"train": {"sequences_per_update": 2}}),
        ("train", {"algorithm": {"preset": "ppo"}, "critic": {}}),
        ("train", {"model": {"packing": False}}),
    ],
)
def test_a_run_ends_with_the_same_weights_bit_for_bit(
    command: str, sections: dict[str, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("plain", "checkpointed"):
        (tmp_path / name).mkdir()
        path = configuration(tmp_path / name, command, **sections)
        succeed(capsys, command, path, f"model.activation_checkpointing={str(name == 'checkpointed').lower()}")
    assert_same_tensors(*(tmp_path / name / "run/model/model.safetensors" for name in ("plain", "checkpointed")))


def test_adapters_learn_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("plain", "checkpointed"):
        (tmp_path / name).mkdir()
        path = configuration(tmp_path / name, model={"lora": {"rank": 4}})
        succeed(capsys, "train", path, f"model.activation_checkpointing={str(name == 'checkpointed').lower()}")
    newest = "run/checkpoints/step-000002/adapter/adapter_model.safetensors"
    assert_same_tensors(*(tmp_path / name / newest for name in ("plain", "checkpointed")))


def test_a_model_that_cannot_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed_model()
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    with pytest.raises(UserError, match="has no activation checkpointing"):
        checkpoint_activations(model)
