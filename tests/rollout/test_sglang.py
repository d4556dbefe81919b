"""SGLang as a rollout engine, held against a plain Hugging Face forward pass of the weights it was given.

A server on a mixture of experts, and SGLang's Engine object on a Qwen2 with tied embeddings; the `model` of the fixture
always has the weights that the engine holds. Batches are small: on a CPU SGLang computes one sequence after the other.
"""

from __future__ import annotations

import importlib.util
import os
import random
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.modeling_utils import PreTrainedModel

import hybridflow.models.load  # noqa: F401  (it registers the attention of `InlineEngine`)
from hybridflow.errors import UserError
from hybridflow.models.attention import ATTENTION
from hybridflow.noise import NoiseKey
from hybridflow.protocols.generation import Request, Result, Sampling, Span, generate
from hybridflow.protocols.weights import WeightStream
from hybridflow.rollout.inline.engine import InlineEngine
from hybridflow.rollout.served import guardian
from hybridflow.rollout.served.process import free_port
from hybridflow.rollout.sglang.engine import SglangEngine
from hybridflow.rollout.sglang.server import SglangServerEngine
from hybridflow.rollout.sglang.start import arguments, check_version, environment, flags, require_sglang
from hybridflow.rollout.sglang.worker import as_stored
from hybridflow.rollout.startup import EngineModel, Launch
from hybridflow.weights.stream import WeightSyncError, stream_of, verify

import conformance
from conformance import expected, gap

VOCAB, CONTEXT, LONG = 100, 512, 400
TOLERANCE = 1e-4
FAR = 0.02  # other weights or another temperature are further away than this
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": CONTEXT,
    "eos_token_id": 1,
}


@dataclass
class Setup(conformance.Setup):
    """And the inline engine, which holds the same weights."""

    inline: InlineEngine = field(kw_only=True)

    def publish(self, stream: WeightStream | None = None) -> None:
        super().publish(stream)
        beside = stream_of(self.model)
        verify(beside, self.inline.update_weights(beside, self.version), self.version)


def mixture() -> PreTrainedModel:
    config = Qwen3MoeConfig(
        **SIZES, moe_intermediate_size=64, head_dim=32, num_experts=8, num_experts_per_tok=2, tie_word_embeddings=False
    )
    return Qwen3MoeForCausalLM(config)


def tied() -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True))


@contextmanager
def server(folder: Path, logs: Path) -> Iterator[dict[str, Any]]:
    """A server that somebody else started, as docs/generation.md says."""
    port = free_port()
    named = arguments(EngineModel(folder, CONTEXT))
    command = [sys.executable, "-m", "sglang.launch_server", *flags(named), "--port", str(port)]
    with (logs / "server.log").open("wb") as log:
        process = subprocess.Popen(  # with a guardian, which ends it when this process ends, however
            [sys.executable, "-I", "-S", guardian.__file__, *command],
            env={**os.environ, **environment(1)},
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
        )
    assert process.stdin is not None
    try:
        yield {"servers": [f"http://127.0.0.1:{port}"]}
    finally:
        process.stdin.close()
        process.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


@pytest.fixture(scope="module", params=["server", "object"])
def setup(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = (mixture if request.param == "server" else tied)().eval()
    with torch.no_grad():  # random weights predict nearly uniformly, which would hide a wrong temperature
        model.get_output_embeddings().weight *= 4
    folder, logs = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("logs")
    model.save_pretrained(folder)
    replica = deepcopy(model)
    replica.set_attn_implementation(ATTENTION)
    with server(folder, logs) if request.param == "server" else nullcontext({}) as where:
        while where and not answers(where["servers"][0]):
            time.sleep(0.2)
        kind = SglangServerEngine if where else SglangEngine
        engine = kind(
            EngineModel(folder, CONTEXT),
            launch=Launch(run_folder=logs),
            decode=lambda ids: "".join(map(letter, ids)),
            **where,  # type: ignore[arg-type]
        )
        yield Setup(engine, model, "sglang", inline=InlineEngine(replica))
        engine.close()


def letter(token: int) -> str:
    return chr(48 + token)


def requests(count: int, temperature: float = 1.0, *, seed: int = 0, max_tokens: int = 12) -> list[Request]:
    rng = random.Random(seed)
    return [
        Request(
            tuple(rng.randrange(2, VOCAB) for _ in range(rng.randint(3, 60))),
            Sampling(max_tokens, temperature),
            NoiseKey(seed, "train", draw),
        )
        for draw in range(count)
    ]


def begin(setup: Setup, long: list[Request]) -> list[int]:
    """Handles of requests that have begun and will take a while: a short one beside them has ended."""
    handles = [setup.engine.submit(request) for request in [*long, *requests(1, seed=99, max_tokens=6)]]
    (short,) = setup.engine.wait()
    assert short.handle == handles.pop()
    return handles


def finish(setup: Setup, handles: list[int]) -> list[Result]:
    """Their results, in order."""
    results: dict[int, Result] = {}
    while ended := setup.engine.wait():
        results |= {result.handle: result for result in ended}
    assert results.keys() == set(handles)
    return [results[handle] for handle in handles]


@pytest.mark.sglang
@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_log_probs_are_those_of_the_sampled_distribution(setup: Setup, temperature: float):
    asked = requests(6, temperature)
    results = generate(setup.engine, asked)
    assert gap(setup.model, asked, results) < TOLERANCE
    other = [replace(r, sampling=replace(r.sampling, temperature=0.85)) for r in asked]
    assert gap(setup.model, other, results) > FAR, "the comparison would not notice another temperature"


@pytest.mark.sglang
def test_weights_are_those_published_after_every_update(setup: Setup):
    asked = requests(4, 0.7)
    for seed in (1, 2):
        old = setup.perturb(seed)
        setup.publish()
        results = generate(setup.engine, asked)
        assert gap(setup.model, asked, results) < TOLERANCE
        assert gap(old, asked, results) > FAR, "the comparison would not notice the old weights"
        assert [r.spans for r in results] == [[Span(setup.version, 0, 12)]] * 4
    names = sorted(setup.model.state_dict())
    stream = stream_of(setup.model)
    held = setup.engine.read_back(names)
    published = {name: stream.published[name] for name, _ in stream.tensors}
    assert held.keys() >= set(names) - {"lm_head.weight"} and all(held[n] == published[n] for n in held)


@pytest.mark.sglang
def test_tokens_are_those_of_the_inline_engine(setup: Setup):
    """The same noise, the same filters, the same supports; whatever a request was batched with."""
    ways: list[dict[str, Any]] = [
        {},
        {"top_p": 0.6},
        {"top_k": 5, "top_p": 0.9},
        {"min_p": 0.1},
        {"logit_bias": ((7, 3.0),)},
    ]
    asked = [replace(r, sampling=Sampling(12, 0.9, **way)) for r, way in zip(requests(5, seed=3), ways)]
    asked.append(replace(asked[0], sampling=Sampling(12, 0.0)))
    found = generate(setup.engine, asked)
    for ours, theirs in zip(generate(setup.inline, asked), found, strict=True):
        assert theirs.token_ids == ours.token_ids
        assert (torch.tensor(ours.logps) - torch.tensor(theirs.logps)).abs().max() < TOLERANCE
        assert theirs.support == ours.support
    assert found[1].support and max(found[1].support.sizes) > 1
    assert [generate(setup.engine, [r])[0].token_ids for r in asked[:2]] == [r.token_ids for r in found[:2]]


@pytest.mark.sglang
def test_only_the_requests_stops_end_it(setup: Setup):
    stops = tuple(range(40, 44))
    asked = [replace(r, sampling=Sampling(24, stop_token_ids=stops)) for r in requests(6)]
    results = generate(setup.engine, asked)
    assert {r.finish_reason for r in results} == {"stop", "length"}
    for result in results:
        ended = result.token_ids[-1] in stops
        assert result.finish_reason == ("stop" if ended else "length")
        assert ended or len(result.token_ids) == 24
        assert not set(result.token_ids[:-1]) & set(stops)
    assert gap(setup.model, asked, results) < TOLERANCE

    # The model's own end-of-sequence token, made likely, ends nothing: neither alone nor beside other stop tokens.
    likely = Sampling(12, logit_bias=((1, 4.0),))
    for sampling in (likely, replace(likely, stop_token_ids=(99,))):
        free = generate(setup.engine, [replace(r, sampling=sampling) for r in requests(3, seed=4)])
        assert all(len(r.token_ids) == 12 or r.token_ids[-1] == 99 for r in free)
        assert any(1 in r.token_ids[:-1] for r in free), "no end-of-sequence token was drawn: this proves nothing"

    (whole,) = generate(setup.engine, requests(1, seed=6))
    text = "".join(map(letter, whole.token_ids))
    (cut,) = generate(setup.engine, [replace(r, sampling=Sampling(12, stop=(text[4:6],))) for r in requests(1, seed=6)])
    end = text.index(text[4:6]) + 2
    assert (cut.token_ids, cut.finish_reason) == (whole.token_ids[:end], "stop")


@pytest.mark.sglang
def test_a_request_goes_on_over_an_update_and_its_spans_say_where(setup: Setup):
    asked = [replace(r, sampling=Sampling(LONG, 0.7)) for r in requests(2, seed=8)]
    old, before = setup.perturb(5), setup.version
    handles = begin(setup, asked)
    setup.publish()
    for request, result in zip(asked, finish(setup, handles), strict=True):
        first, second = result.spans
        assert (first.version, second.version) == (before, setup.version)
        assert (first.start, first.end, second.end) == (0, second.start, LONG) and 0 < first.end < LONG
        logps, cut = torch.tensor(result.logps), second.start
        assert (logps - expected(old, request, result))[:cut].abs().max() < TOLERANCE
        assert (logps - expected(setup.model, request, result))[cut:].abs().max() < TOLERANCE
        assert (logps - expected(old, request, result))[cut:].abs().max() > FAR


@pytest.mark.sglang
@pytest.mark.parametrize("paused", [False, True])
def test_aborted_requests_give_their_part_and_go_on_with_their_own_noise(setup: Setup, paused: bool):
    asked = [replace(r, sampling=Sampling(LONG, 0.7)) for r in requests(2, seed=7)]
    first, second = begin(setup, asked)
    if paused:
        setup.engine.pause()
    parts = setup.engine.abort([first, first, 10**6])
    assert setup.engine.abort([first]) == []
    if paused:
        setup.engine.resume()
    (part,) = parts
    done = len(part.token_ids)
    assert (part.handle, part.finish_reason) == (first, "abort")
    assert 0 < done < LONG and part.spans == [Span(setup.version, 0, done)]
    whole, other = generate(setup.inline, asked)
    assert part.token_ids == whole.token_ids[:done]
    assert gap(setup.model, asked[:1], parts) < TOLERANCE
    assert [r.token_ids for r in finish(setup, [second])] == [other.token_ids]
    more = replace(asked[0], generated_ids=tuple(part.token_ids), sampling=Sampling(done + 10, 0.7))
    (rest,) = generate(setup.engine, [more])
    assert rest.token_ids == whole.token_ids[done : done + 10]
    assert gap(setup.model, [more], [rest]) < TOLERANCE


@pytest.mark.sglang
def test_a_damaged_stream_is_told_and_the_engine_lives(setup: Setup):
    def damaged() -> WeightStream:
        stream = stream_of(setup.model)
        tensors = stream.tensors

        def leave() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in tensors:
                yield name, tensor if name != "model.norm.weight" else tensor.repeat(2)

        stream.tensors = leave()
        return stream

    with pytest.raises(WeightSyncError, match=r"process 0 of .*AssertionError"):
        setup.engine.update_weights(damaged(), setup.version + 1)
    setup.publish()
    asked = requests(2)
    assert gap(setup.model, asked, generate(setup.engine, asked)) < TOLERANCE


@pytest.mark.sglang
def test_a_server_samples_for_one_run(setup: Setup):
    if isinstance(setup.engine, SglangEngine):
        pytest.skip("it has no address that another run could name")
    url = setup.engine._live[0].state.url
    with pytest.raises(UserError) as error:
        SglangServerEngine(EngineModel(None, CONTEXT), servers=[url])
    assert "samples for another run" in str(error.value) and "servers of its own" in error.value.fix
    with pytest.raises(UserError, match="takes sequences of 512 tokens, and this run's have up to 513"):
        SglangServerEngine(EngineModel(None, CONTEXT + 1), servers=[url])
    with pytest.raises(UserError, match="does not answer"):
        SglangServerEngine(EngineModel(None, CONTEXT), servers=[f"http://127.0.0.1:{free_port()}"])
    asked = requests(2)
    assert gap(setup.model, asked, generate(setup.engine, asked)) < TOLERANCE


@pytest.mark.sglang
def test_a_process_that_is_killed_is_started_again_and_nothing_is_lost(setup: Setup):
    if not setup.engine.managed:
        pytest.skip("a server that somebody else started is not started again")
    asked = [replace(r, sampling=Sampling(LONG, 0.7)) for r in requests(2, seed=11)]
    told: list[str] = []
    setup.engine.note = lambda kind, text: told.append(text)
    setup.engine.on_restart = setup.publish
    handles = begin(setup, asked)
    os.kill(scheduler_of(setup.engine), signal.SIGKILL)
    results = finish(setup, handles)
    assert [r.token_ids for r in results] == [r.token_ids for r in generate(setup.inline, asked)]
    assert gap(setup.model, asked, results) < TOLERANCE
    assert any("was started again" in text for text in told), told


def scheduler_of(engine: Any) -> int:
    """The process that computes."""
    import psutil

    process = engine._live[0].state.process._process
    children = psutil.Process(process.pid).children(recursive=True)
    return next(p.pid for p in children if "scheduler" in p.name() or "scheduler" in "".join(p.cmdline()))


@pytest.mark.sglang
def test_requests_that_can_never_run_are_refused_in_words(setup: Setup):
    fits = Request((5,) * 500, Sampling(CONTEXT - 500), NoiseKey(0, "train"))
    assert len(generate(setup.engine, [fits])[0].token_ids) == CONTEXT - 500
    with pytest.raises(UserError) as error:
        setup.engine.submit(replace(fits, sampling=Sampling(CONTEXT - 499)))
    assert str(error.value) == (
        "a request of 500 prompt tokens and up to 13 new ones does not fit in 512 tokens\n"
        "  why: that is the max_model_len which the engine was started with\n"
        "  fix: lower rollout.max_response_tokens or data.max_prompt_tokens, or start it with a larger one"
    )
    with pytest.raises(UserError, match="repetition penalty"):
        setup.engine.submit(replace(fits, sampling=Sampling(2, repetition_penalty=1.1)))
    assert setup.engine.wait() == []


def test_engines_that_can_never_start_are_refused_in_words(tmp_path: Path):
    with pytest.raises(UserError, match="no model at"):
        SglangEngine(EngineModel(tmp_path, CONTEXT))
    tied().config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="does not divide the model's heads"):
        SglangServerEngine(EngineModel(tmp_path, CONTEXT, tensor_parallel=4))
    with pytest.raises(UserError, match=r"whose version 0\.5\.12 is not supported"):
        check_version("0.5.12", "the server http://127.0.0.1:1 runs SGLang, whose version")
    for fine in ("0.5.23", "0.5.24.post1"):
        check_version(fine, "SGLang")


@pytest.mark.skipif(importlib.util.find_spec("sglang") is not None, reason="SGLang is installed here")
def test_missing_sglang_is_told_with_the_line_that_installs_it():
    with pytest.raises(UserError) as error:
        require_sglang()
    assert "make install-sglang-cpu" in error.value.fix and "pip install 'sglang>=0.5.23,<0.6'" in error.value.fix
    with pytest.raises(UserError, match="is no Python that runs"):
        require_sglang("/nowhere/python")


def test_joined_experts_are_taken_apart_as_files_have_them():
    model = mixture()
    state = model.state_dict()
    prefix = "model.layers.0.mlp.experts"
    held = {f"{prefix}.w13_weight": torch.empty(8, 128, 64), f"{prefix}.w2_weight": torch.empty(8, 64, 64)}
    stored = dict(as_stored(f"{prefix}.gate_up_proj", state[f"{prefix}.gate_up_proj"], held))
    stored |= dict(as_stored(f"{prefix}.down_proj", state[f"{prefix}.down_proj"], held))
    assert len(stored) == 3 * 8
    x = torch.randn(64)
    for expert in (0, 7):
        gate, up, down = (stored[f"{prefix}.{expert}.{p}_proj.weight"] for p in ("gate", "up", "down"))
        joined = state[f"{prefix}.gate_up_proj"][expert] @ x
        assert torch.equal(joined, torch.cat([gate @ x, up @ x])) or torch.allclose(
            joined, torch.cat([gate @ x, up @ x])
        )
        assert torch.equal(down, state[f"{prefix}.down_proj"][expert])
    assert [n for n, _ in as_stored("lm_head.weight", state["lm_head.weight"], held)] == ["lm_head.weight"]
