"""Every element of every tensor changes, and changes back to the same bits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hybridflow.config.sections.optim import OptimSection
from hybridflow.engines.local import LocalEngine
from hybridflow.models.value import value_head
from hybridflow.protocols.training import Loss
from hybridflow.weights.drill import perturb

from on_ranks import engines, weights
from ranks import shared_ranks
from tiny import packed_model, ragged_batch, weights_of, with_policy_columns

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
INTEGER = {8: torch.int64, 4: torch.int32, 2: torch.int16}


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().view(INTEGER[tensor.element_size()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_of_all_numbers_that_there_are_each_has_a_partner(dtype: torch.dtype) -> None:
    """Every bit pattern of 16 bits, at places of every kind: the change undoes itself, and leaves few alone."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16)
    for shift in range(16):
        tensor = every.roll(shift).clone().view(dtype)
        before = bits(tensor)
        perturb([tensor])
        assert (bits(tensor) == before).sum() <= 6, "what zeros and small numbers, of two signs and masks, would become"
        perturb([tensor])
        assert torch.equal(bits(tensor), before)


@given(st.lists(st.floats(width=32), min_size=1, max_size=40), st.sampled_from(DTYPES))
def test_any_numbers_change_and_change_back(numbers: list[float], dtype: torch.dtype) -> None:
    tensor = torch.tensor(numbers, dtype=torch.float64).to(dtype)
    before = bits(tensor)
    perturb([tensor])
    assert not torch.equal(bits(tensor), before)
    perturb([tensor])
    assert torch.equal(bits(tensor), before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_keep_their_magnitude_and_constants_become_uneven(dtype: torch.dtype) -> None:
    tensor = torch.randn(4096, generator=torch.Generator().manual_seed(0)).to(dtype)
    changed = tensor.clone()
    perturb([changed])
    ratio = (changed / tensor).double()
    assert ratio.min() > 0.6 and ratio.max() < 1.6 and (ratio - 1).abs().min() > 0.1
    assert math.isclose(float(changed.double().square().mean() / tensor.double().square().mean()), 1, abs_tol=0.25)
    for value in (0.0, 1.0):
        constant = torch.full((64,), value, dtype=dtype)
        perturb([constant])
        assert len(constant.unique()) == 2 and (constant - value).abs().min() > 0.02


def test_what_lies_scattered_in_memory_changes_and_integers_do_not() -> None:
    whole = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    before, counts = whole.clone(), torch.arange(5)
    perturb([whole.t()[2:5], counts, torch.empty(0)])
    assert (whole[:, 2:5] != before[:, 2:5]).all() and torch.equal(
        whole[:, [0, 1, 5, 6, 7]], before[:, [0, 1, 5, 6, 7]]
    )
    perturb([whole.t()[2:5]])
    assert torch.equal(whole, before) and torch.equal(counts, torch.arange(5))


@pytest.mark.parametrize("kind", ["qwen3", "qwen2", "deepseek_v3"])
def test_training_goes_on_as_if_there_had_been_no_drill(kind: str) -> None:
    """Tied weights, biases, experts, a router's buffer, a value head that is not published, moments of AdamW."""

    def trained(drill: bool) -> dict[str, Tensor]:
        model = packed_model(kind)
        engine = LocalEngine(
            model, OptimSection(lr=1e-2), total_steps=9, tokens_per_microbatch=64, value_head=value_head(model)
        )
        batch = ragged_batch()
        batch = with_policy_columns(batch, engine.score(batch, ["logp"])["logp"])
        for _ in range(2):
            engine.update(batch, Loss("policy", {"policy_loss": "ppo_clip"}))
            if drill:
                before = {n: t.clone() for n, t in engine.published().items()}
                streamed = dict(engine.stream_weights().tensors).keys()
                engine.perturb()
                assert {n for n, t in engine.published().items() if not torch.equal(t, before[n])} == before.keys()
                assert before.keys() <= streamed and not any("value_head" in n for n in before)
                assert not torch.equal(engine.score(batch, ["logp"])["logp"], batch["old_logp_T"])
                engine.perturb()
        moments = {f"{kind}/{n}": t for n, kept in engine.moments().items() for kind, t in kept.items()}
        return engine.published() | {n: p for n, p in engine.trained.items() if "value_head" in n} | moments

    with_drill, without = trained(True), trained(False)
    assert with_drill.keys() == without.keys()
    assert all(torch.equal(bits(with_drill[name]), bits(without[name])) for name in without)


def test_one_tensor_can_be_changed_alone() -> None:
    engine = LocalEngine(packed_model(), OptimSection(), total_steps=1, tokens_per_microbatch=64)
    before = {n: t.clone() for n, t in engine.published().items()}
    engine.perturb(["model.norm.weight"])
    assert [n for n, t in engine.published().items() if not torch.equal(t, before[n])] == ["model.norm.weight"]


def test_adapters_change_with_what_they_are_beside() -> None:
    """The second matrix of an adapter begins as zeros, which no change of a mantissa would show."""
    model = weights.with_adapters(packed_model())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    engine = LocalEngine(model, OptimSection(), total_steps=1, tokens_per_microbatch=64)
    batch = ragged_batch()
    before, (names, plain) = bits_of(engine), [list(engine.published()), engine.score(batch, ["logp"])["logp"]]
    for name in names:
        engine.perturb([name])
        if "lora_A" not in name:  # what the first matrix gives is multiplied with zero
            assert (engine.score(batch, ["logp"])["logp"] - plain).abs().max() > 1e-4, name
        engine.perturb([name])
    assert before == bits_of(engine) and torch.equal(engine.score(batch, ["logp"])["logp"], plain)


def bits_of(engine: LocalEngine) -> dict[str, list[int]]:
    return {n: bits(t).flatten().tolist() for n, t in engine.published().items()}


@pytest.mark.parametrize("strategy", ["fsdp2", "fsdp1"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shards_change_and_change_back(strategy: str, dtype: str) -> None:
    """On every rank, with gathered and low-precision copies around; scores are those of the changed weights."""
    case = engines.Case(section={"strategy": strategy, "dtype": dtype})
    batch = ragged_batch()
    batch["policy_weight_T"] = weights_of(batch, "token-mean")
    shared_ranks(2).run(engines.drilled, case, batch)
