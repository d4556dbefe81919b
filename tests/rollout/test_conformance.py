"""What every generation engine must do, asked of each of them on tiny models in float32.

The engines are those of the environment: inline everywhere, vLLM and SGLang in the environments that hold them. Every
log-probability is held against a plain Hugging Face forward pass of the weights that the engine should have.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch

from hybridflow.config.sections.model import LoraSection
from hybridflow.errors import UserError
from hybridflow.models.lora import add_lora, merged
from hybridflow.noise import NoiseKey
from hybridflow.protocols.generation import Request, Sampling, Span, generate
from hybridflow.rollout.sampling import kept
from hybridflow.weights.stream import fingerprint, stream_of

from conformance import (
    CONTEXT,
    FAR,
    TOLERANCE,
    Setup,
    decode,
    expected,
    gap,
    requests,
    scores_of,
    start,
)

CASES = [
    ("inline", "qwen2_tied"),
    ("inline_turns", "qwen3"),
    ("inline", "qwen3_moe"),
    *(("vllm", kind) for kind in ("qwen2_tied", "qwen3", "qwen3_moe")),
    ("vllm_workers", "qwen3_moe"),
    ("vllm_server", "qwen2_tied"),
    *(("sglang_server", kind) for kind in ("qwen2_tied", "qwen3", "qwen3_moe")),
    ("sglang", "qwen2_tied"),
]
LONG = 240  # tokens of an answer that something is done to while it is generated


def _marks(name: str) -> list[pytest.MarkDecorator]:
    family = name.partition("_")[0]
    return [] if family == "inline" else [getattr(pytest.mark, family)]


@pytest.fixture(scope="module", params=[pytest.param(c, id="-".join(c), marks=_marks(c[0])) for c in CASES])
def setup(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    found = start(*request.param, tmp_path_factory.mktemp("model"))
    yield found
    found.engine.close()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_the_weights_before_and_after_every_update(setup: Setup, temperature: float) -> None:
    asked = requests(6, temperature)  # some prompts are longer than a block of a prefix cache
    other = [replace(r, sampling=replace(r.sampling, temperature=0.85)) for r in asked]
    before = None
    for update in range(3):
        results = generate(setup.engine, asked)
        assert gap(setup.model, asked, results) < TOLERANCE
        assert gap(setup.model, other, results) > FAR, "the comparison would not notice another temperature"
        assert all(r.spans == [Span(setup.version, 0, len(r.token_ids))] for r in results)
        if before is not None:
            assert gap(before, asked, results) > FAR, "the perturbation is too small to see old weights"
        if update < 2:
            before = setup.perturb(seed=update)
            setup.publish()


def test_greedy_answers_take_the_likeliest_token_and_say_how_likely_it_was(setup: Setup) -> None:
    asked = requests(3, 0.0, seed=1)
    for request, result in zip(asked, generate(setup.engine, asked)):
        best = scores_of(setup.model, request, result).log_softmax(-1).amax(-1)
        assert (best - torch.tensor(result.logps)).abs().max() < TOLERANCE


def test_a_mixed_batch_is_answered_as_each_alone(setup: Setup) -> None:
    asked = requests(2, 1.0) + requests(2, 0.0, seed=1) + requests(2, 0.7, seed=2)
    assert gap(setup.model, asked, generate(setup.engine, asked)) < TOLERANCE


def test_with_top_p_log_probs_are_of_what_was_kept(setup: Setup) -> None:
    asked = [replace(r, sampling=replace(r.sampling, top_p=0.6)) for r in requests(4, 0.7, seed=3)]
    for request, result in zip(asked, generate(setup.engine, asked)):
        score_TV = scores_of(setup.model, request, result)
        kept_TV = kept(score_TV, [request.sampling] * len(score_TV))
        logp_TV = score_TV.masked_fill(~kept_TV, -torch.inf).log_softmax(-1)
        logp_T = logp_TV.gather(-1, torch.tensor(result.token_ids)[:, None])[:, 0]
        assert (logp_T - torch.tensor(result.logps)).abs().max() < TOLERANCE
        assert (~kept_TV).any()
        if result.support is None:
            assert setup.name.startswith("vllm"), "only vLLM does not say what could have been sampled"
            continue
        ids = torch.tensor(result.support.ids).split(result.support.sizes)
        for kept_V, said in zip(kept_TV, ids, strict=True):
            assert set(said.tolist()) == set(kept_V.nonzero()[:, 0].tolist())


def test_the_same_requests_give_the_same_tokens_in_any_company(setup: Setup) -> None:
    asked = requests(6, seed=4)
    first = [r.token_ids for r in generate(setup.engine, asked)]
    assert [r.token_ids for r in generate(setup.engine, asked)] == first
    assert [r.token_ids for r in reversed(generate(setup.engine, asked[::-1]))] == first
    assert generate(setup.engine, asked[1:2])[0].token_ids == first[1]
    another = replace(asked[0], noise=NoiseKey(0, "eval", 0))
    assert generate(setup.engine, [another])[0].token_ids != first[0]


def test_n_answers_to_one_prompt_differ(setup: Setup) -> None:
    prompt = requests(1, seed=5)[0]
    asked = [replace(prompt, noise=NoiseKey(0, "train", 0, sample)) for sample in range(6)]
    results = generate(setup.engine, asked)
    assert gap(setup.model, asked, results) < TOLERANCE
    assert len({tuple(r.token_ids) for r in results}) == 6


def test_only_the_requests_stop_tokens_end_an_answer(setup: Setup) -> None:
    stops = tuple(range(4, 100, 16))
    asked = [replace(r, sampling=Sampling(16, stop_token_ids=stops)) for r in requests(12, seed=6)]
    results = generate(setup.engine, asked)
    assert {r.finish_reason for r in results} == {"stop", "length"}
    for result in results:
        ended = result.token_ids[-1] in stops
        assert result.finish_reason == ("stop" if ended else "length")
        assert ended or len(result.token_ids) == 16
        assert not set(result.token_ids[:-1]) & set(stops)
    assert gap(setup.model, asked, results) < TOLERANCE
    biased = [replace(r, sampling=Sampling(12, logit_bias=((1, 12.0),))) for r in requests(2, seed=6)]
    free = generate(setup.engine, biased)  # 1 is the model's own end-of-sequence token
    assert any(1 in r.token_ids[:-1] for r in free) and all(len(r.token_ids) == 12 for r in free)


@pytest.mark.parametrize("way", [{"stop": ("ab", *"0369BEHKcfilor+")}, {"stop_regex": "[0-9A-M]"}])
def test_a_stop_text_ends_an_answer_with_the_token_that_completes_it(setup: Setup, way: dict[str, Any]) -> None:
    asked = [replace(r, sampling=Sampling(16, **way)) for r in requests(8, seed=7)]
    free = generate(setup.engine, requests(8, seed=7))
    pattern = re.compile("|".join(map(re.escape, way["stop"])) if "stop" in way else way["stop_regex"])
    reasons = set()
    for whole, cut in zip(free, generate(setup.engine, asked), strict=True):
        ends = [n for n in range(1, len(whole.token_ids) + 1) if pattern.search(decode(whole.token_ids[:n]))]
        wanted = ends[0] if ends else len(whole.token_ids)
        assert cut.token_ids == whole.token_ids[:wanted]
        assert len(cut.logps) == wanted
        assert cut.finish_reason == ("stop" if ends else "length")
        reasons.add(cut.finish_reason)
    assert "stop" in reasons


def test_an_aborted_request_gives_its_part_and_can_go_on(setup: Setup) -> None:
    long, short = requests(2, seed=8)
    long = replace(long, sampling=Sampling(LONG, 0.7))
    handle = setup.engine.submit(long)
    setup.engine.submit(replace(short, sampling=Sampling(8)))
    assert [len(r.token_ids) for r in setup.engine.wait()] == [8]
    (part,) = setup.engine.abort([handle, handle, 10**6])
    done = len(part.token_ids)
    assert (part.handle, part.finish_reason) == (handle, "abort")
    assert 0 < done < LONG and part.spans == [Span(setup.version, 0, done)]
    assert gap(setup.model, [long], [part]) < TOLERANCE
    assert setup.engine.abort([handle]) == [] and setup.engine.wait() == []

    more = replace(long, sampling=Sampling(done + 8, 0.7), generated_ids=tuple(part.token_ids))
    (rest,) = generate(setup.engine, [more])
    assert rest.finish_reason == "length" and len(rest.token_ids) == 8
    assert gap(setup.model, [more], [rest]) < TOLERANCE
    assert generate(setup.engine, [more])[0].token_ids == rest.token_ids
    fresh = Request(long.prompt_ids + more.generated_ids, Sampling(8, 0.7), long.noise)
    if not setup.name.startswith("inline"):  # whose noise is a function of the place in the trajectory
        assert generate(setup.engine, [fresh])[0].token_ids != rest.token_ids, "it repeats its trajectory's seed"


def test_an_answer_goes_on_under_new_weights_and_says_which_token_is_whose(setup: Setup) -> None:
    long, short = requests(2, seed=9)
    long = replace(long, sampling=Sampling(LONG))
    handle = setup.engine.submit(long)
    setup.engine.submit(replace(short, sampling=Sampling(8)))
    assert [len(r.token_ids) for r in setup.engine.wait()] == [8]
    setup.engine.pause()
    old, before = setup.version, setup.perturb(seed=9)
    setup.publish()
    setup.engine.resume()
    (result,) = setup.engine.wait()
    assert (result.handle, result.finish_reason, len(result.token_ids)) == (handle, "length", LONG)
    first, second = result.spans
    assert (first.version, first.start) == (old, 0) and (second.version, second.end) == (old + 1, LONG)
    assert first.end == second.start and 0 < first.end < LONG
    logps, at = torch.tensor(result.logps), first.end
    assert (logps - expected(before, long, result))[:at].abs().max() < TOLERANCE
    assert (logps - expected(setup.model, long, result))[at:].abs().max() < TOLERANCE


def test_a_later_turn_draws_fresh_noise(setup: Setup) -> None:
    """A model that finds all tokens equally likely draws what its noise says, and nothing else."""
    found = deepcopy(setup.model.state_dict())
    with torch.no_grad():
        setup.model.get_parameter("model.norm.weight").zero_()
    setup.publish()
    whole = replace(requests(1, seed=15)[0], sampling=Sampling(32))
    first = replace(whole, sampling=Sampling(16))
    (long,), (said,) = generate(setup.engine, [whole]), generate(setup.engine, [first])
    assert said.token_ids == long.token_ids[:16]
    observed = replace(first, prompt_ids=(*first.prompt_ids, *said.token_ids, 5, 6, 7))
    assert generate(setup.engine, [observed])[0].token_ids == said.token_ids, "the model is not flat"
    second, third = replace(observed, position=16), replace(observed, position=32)
    drawn = [said, *generate(setup.engine, [second, third])]
    for one, other in [(0, 1), (0, 2), (1, 2)]:
        assert sum(a == b for a, b in zip(drawn[one].token_ids, drawn[other].token_ids)) < 4  # of 16; 0.16 by chance
    assert generate(setup.engine, [second])[0].token_ids == drawn[1].token_ids
    if not setup.name.startswith("vllm"):  # whose noise is its own generator's, with a seed for each turn
        assert drawn[1].token_ids == long.token_ids[16:]
    setup.model.load_state_dict(found)
    setup.publish()


def test_the_weights_of_a_turn_are_those_published_before_it(setup: Setup) -> None:
    """Its beginning, which the older weights have read, is read again."""
    first = requests(1, 0.7, seed=16)[0]
    (said,) = generate(setup.engine, [first])
    before = setup.perturb(seed=16)
    setup.publish()
    second = replace(first, prompt_ids=(*first.prompt_ids, *said.token_ids, 5, 6, 7), position=len(said.token_ids))
    (more,) = generate(setup.engine, [second])
    assert said.spans == [Span(setup.version - 1, 0, 16)] and more.spans == [Span(setup.version, 0, 16)]
    assert gap(before, [first], [said]) < TOLERANCE and gap(setup.model, [second], [more]) < TOLERANCE
    assert gap(before, [second], [more]) > FAR
    assert (said.replica, more.replica) == (0, 0)


def test_an_interrupted_wait_returns_and_nothing_is_lost(setup: Setup) -> None:
    engine, long = setup.engine, replace(requests(1, seed=17)[0], sampling=Sampling(LONG))
    undisturbed = generate(engine, [long])[0].token_ids
    handle = engine.submit(long)
    engine.interrupt()
    engine.interrupt()  # before any `wait`: they end the next one, and only that
    assert engine.wait() == []
    timer = threading.Timer(0.05, engine.interrupt)
    timer.start()
    began = time.monotonic()
    assert engine.wait() == [], "nothing had ended: another thread woke it"
    assert time.monotonic() - began < 5
    timer.join()
    (result,) = engine.wait()
    assert (result.handle, result.token_ids, result.finish_reason) == (handle, undisturbed, "length")
    engine.interrupt()
    assert engine.wait() == []  # with nothing in flight too
    assert generate(engine, [replace(long, sampling=Sampling(8))])[0].token_ids == undisturbed[:8]


def test_a_paused_engine_hands_nothing_out_until_it_goes_on(setup: Setup) -> None:
    asked = requests(2, seed=10)
    first = [r.token_ids for r in generate(setup.engine, asked)]
    setup.engine.pause()
    handles = [setup.engine.submit(r) for r in asked]
    setup.engine.resume()
    done = {}
    while len(done) < 2:
        done.update({r.handle: r.token_ids for r in setup.engine.wait()})
    assert [done[h] for h in handles] == first


def test_prompts_may_fill_the_context(setup: Setup) -> None:
    room = 8
    fits = Request(tuple(4 + i % 90 for i in range(CONTEXT - room)), Sampling(room), NoiseKey(0, "train"))
    (result,) = generate(setup.engine, [fits])
    assert len(result.token_ids) == room and gap(setup.model, [fits], [result]) < TOLERANCE
    with pytest.raises(UserError, match=f"does not fit in {CONTEXT} tokens"):
        setup.engine.submit(replace(fits, sampling=Sampling(room + 1)))
    assert setup.engine.wait() == []


def test_it_says_what_it_is_and_what_its_memory_holds(setup: Setup) -> None:
    engine = setup.engine
    assert (engine.replicas, engine.max_model_len, engine.same_memory) == (1, CONTEXT, False)
    assert (engine.cache_block > 0) == (not setup.name.startswith("inline")), (
        "who caches prompts must say so: an old cache is looked for"
    )
    assert engine.poll() == []
    for seed in (13, 14):
        setup.perturb(seed=seed)
        setup.publish()
        own = setup.model.state_dict()
        held = engine.read_back([*own, "model.nowhere.weight"])
        assert "model.norm.weight" in held
        assert held == {name: fingerprint(own[name]) for name in held}


def test_adapters_are_sampled_with_when_they_are_merged(setup: Setup) -> None:
    """Of attention, of feed-forward networks and of experts."""
    before = deepcopy(setup.model)
    trained = add_lora(deepcopy(setup.model), LoraSection(rank=4, alpha=8.0), seed=0)
    generator = torch.Generator().manual_seed(12)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    setup.publish(stream_of(trained, lora="merged"))
    setup.model = merged(trained)
    asked = requests(3, seed=11)
    results = generate(setup.engine, asked)
    assert gap(setup.model, asked, results) < TOLERANCE
    assert gap(before, asked, results) > FAR


def test_sleep_and_wake_keep_the_weights(setup: Setup) -> None:
    asked = requests(2, seed=12)
    first = [r.token_ids for r in generate(setup.engine, asked)]
    setup.engine.sleep()
    setup.engine.wake()
    assert [r.token_ids for r in generate(setup.engine, asked)] == first
