"""Adapters swapped in place in vLLM, held against peft's own forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import pytest
import torch

from hybridflow.config.sections.model import LoraSection
from hybridflow.errors import UserError
from hybridflow.models.lora import add_lora, merged
from hybridflow.protocols.generation import Sampling, generate
from hybridflow.rollout.startup import EngineModel
from hybridflow.rollout.vllm.engine import VllmEngine
from hybridflow.rollout.vllm.start import LORA_RANKS
from hybridflow.weights.stream import fingerprint, stream_of, verify

from conformance import CONTEXT, FAR, TOLERANCE, Setup, expected, gap, model_of, requests

LORA = LoraSection(rank=4, alpha=12.0)


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    folder = tmp_path_factory.mktemp("adapters")
    model = model_of("qwen2_tied")
    model.save_pretrained(folder)
    engine = VllmEngine(EngineModel(folder, CONTEXT), lora=LORA)
    yield Setup(engine, add_lora(model, LORA, seed=0), "vllm")
    engine.close()


def train(setup: Setup, seed: int) -> None:
    """Changes every adapter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in setup.model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.vllm
def test_each_adapter_that_arrives_takes_the_place_of_the_one_before(setup: Setup):
    asked = requests(6)
    train(setup, seed=0)
    setup.publish(stream_of(setup.model))  # base and adapter, as a run begins
    results = generate(setup.engine, asked)
    assert gap(setup.model, asked, results) < TOLERANCE
    for seed in (1, 2):
        before = deepcopy(setup.model)
        train(setup, seed)
        setup.publish(stream_of(setup.model, lora="adapters"))
        results = generate(setup.engine, asked)
        assert gap(setup.model, asked, results) < TOLERANCE
        assert gap(before, asked, results) > FAR
        plain = [replace(r, sampling=replace(r.sampling, temperature=0.7)) for r in asked]
        assert gap(setup.model, plain, generate(setup.engine, plain)) < TOLERANCE


@pytest.mark.vllm
@pytest.mark.parametrize("lora", [None, "adapters"])
def test_the_trainers_own_adapter_stays_as_it_is(setup: Setup, lora: Literal["adapters"] | None):
    """vLLM multiplies B with the adapter's scale, in the tensor that it was given."""
    train(setup, seed=8)
    before = deepcopy(setup.model)
    setup.publish(stream_of(setup.model, same_memory=True, lora=lora))
    assert all(torch.equal(a, b) for a, b in zip(setup.model.parameters(), before.parameters(), strict=True))
    asked = requests(3)
    assert gap(setup.model, asked, generate(setup.engine, asked)) < TOLERANCE


@pytest.mark.vllm
def test_a_receipt_of_an_adapter_has_what_the_worker_got(setup: Setup):
    train(setup, seed=3)
    stream = stream_of(setup.model, lora="adapters")
    (receipt,) = setup.engine.update_weights(stream, setup.version)
    verify(stream, receipt, setup.version)
    own = setup.model.state_dict()
    assert receipt.received == {name: fingerprint(own[name]) for name in own if ".lora_" in name}
    assert receipt.num_bytes == sum(own[name].nbytes for name in receipt.received)


@pytest.mark.vllm
def test_answers_in_flight_go_on_with_the_new_adapter(setup: Setup):
    train(setup, seed=4)
    setup.publish(stream_of(setup.model))
    long, short = requests(2, seed=5)
    long = replace(long, sampling=Sampling(100))
    setup.engine.submit(long)
    setup.engine.submit(replace(short, sampling=Sampling(10)))
    setup.engine.wait()
    before = deepcopy(setup.model)
    train(setup, seed=5)
    setup.publish(stream_of(setup.model, lora="adapters"))
    (result,) = setup.engine.wait()
    at, logps = result.spans[0].end, torch.tensor(result.logps)
    assert len(result.spans) == 2 and 0 < at < 100
    assert (logps - expected(before, long, result))[:at].abs().max() < TOLERANCE
    assert (logps - expected(setup.model, long, result))[at:].abs().max() < TOLERANCE


@pytest.mark.vllm
def test_whole_weights_without_an_adapter_are_sampled_from_without_one(setup: Setup):
    train(setup, seed=6)
    setup.publish(stream_of(setup.model))
    train(setup, seed=7)
    setup.publish(stream_of(setup.model, lora="merged"))
    asked = requests(4)
    assert gap(merged(setup.model), asked, generate(setup.engine, asked)) < TOLERANCE


@pytest.mark.vllm
def test_the_ranks_are_those_of_vllm():
    from vllm.config.lora import MaxLoRARanks

    assert sorted(get_args(MaxLoRARanks)) == [*LORA_RANKS]


@pytest.mark.vllm
def test_adapters_that_vllm_cannot_take_are_refused(tmp_path: Path):
    model_of("qwen3_moe").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="mixture of experts") as error:
        VllmEngine(EngineModel(tmp_path, CONTEXT), lora=LORA)
    assert "rollout.lora=merged" in error.value.fix
    model_of("qwen3").save_pretrained(tmp_path)
    with pytest.raises(UserError) as error:
        VllmEngine(EngineModel(tmp_path, CONTEXT), lora=LoraSection(rank=600))
    assert str(error.value) == (
        "vLLM takes no adapters of rank 600\n"
        "  why: its buffers are made for ranks up to 1, 8, 16, 32, 64, 128, 256, 320, 512\n"
        "  fix: lower model.lora.rank to 512, or publish whole weights: rollout.lora=merged"
    )
