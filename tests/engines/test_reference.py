"""The reference: the model that the run began with, whatever the actor has become."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from hybridflow.config.sections.model import LoraSection
from hybridflow.config.sections.optim import OptimSection
from hybridflow.engines.local import LocalEngine
from hybridflow.engines.reference import LocalReference
from hybridflow.models.lora import add_lora
from hybridflow.protocols.training import Loss

from tiny import packed_model, ragged_batch, with_policy_columns


@pytest.mark.parametrize("adapters", [False, True])
def test_it_scores_as_the_actor_did_before_training(adapters: bool, tmp_path: Path) -> None:
    batch = ragged_batch()
    began = LocalEngine(packed_model(), OptimSection(), total_steps=1, tokens_per_microbatch=20)
    expected = began.score(batch, ["logp", "entropy"], temperature=0.8)
    model = add_lora(packed_model(), LoraSection(rank=4), seed=0) if adapters else packed_model()
    actor = LocalEngine(model, OptimSection(lr=1e-2), total_steps=9, tokens_per_microbatch=20)
    frozen = LocalReference(packed_model(), tokens_per_microbatch=20, device="cpu")
    reference = actor.without_adapters() if adapters else frozen
    trained = with_policy_columns(batch, expected["logp"])
    for _ in range(3):
        assert actor.update(trained, Loss("policy", {"policy_loss": "ppo_clip"})).applied
    found = reference.score(batch, ["logp", "entropy"], temperature=0.8)
    for name, column_T in expected.items():
        assert torch.equal(found[name], column_T), name
    now = actor.score(batch, ["logp"], temperature=0.8)["logp"]
    assert float((now - expected["logp"]).abs().max()) > 0.01  # the adapters are on again, and had been trained
    before = copy.deepcopy(actor.trained)
    assert actor.update(trained, Loss("policy", {"policy_loss": "ppo_clip"})).applied
    assert all(not torch.equal(p, before[n]) for n, p in actor.trained.items() if "lora_A" in n)


def test_a_frozen_model_gets_no_gradient() -> None:
    model = packed_model()
    reference = LocalReference(model, tokens_per_microbatch=20, device="cpu")
    assert not reference.score(ragged_batch(), ["logp"])["logp"].requires_grad
    assert not model.training and not any(p.requires_grad for p in model.parameters())
