"""Generation in the training process: right distributions, the same tokens in any company, nothing lost on the way."""

from __future__ import annotations

import copy
import inspect
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hybridflow.batch import Batch
from hybridflow.config.sections.optim import OptimSection
from hybridflow.engines.local import LocalEngine
from hybridflow.errors import UserError
from hybridflow.noise import NoiseKey
from hybridflow.protocols.generation import Request, Result, RolloutEngine, Sampling, Span, generate
from hybridflow.rollout.inline.engine import InlineEngine
from hybridflow.weights.stream import WeightSyncError, stream_of, verify

from tiny import packed_model

END, USER, ASSISTANT = 1, 2, 3  # the recipe's special tokens
FIRST = 4  # its characters begin here, with the newline; the printable ones follow


@pytest.fixture(autouse=True, params=["quick", "plain"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test here holds for the decoder of covered families and for the model's own modules."""
    monkeypatch.setitem(InlineEngine.__init__.__kwdefaults__, "quick", request.param == "quick")
    return str(request.param)


@pytest.fixture(scope="module")
def _undisturbed() -> dict[str, tuple[list[Result], int]]:
    return {}


@pytest.fixture
def undisturbed(
    path: str, trained_model: PreTrainedModel, _undisturbed: dict[str, tuple[list[Result], int]]
) -> tuple[list[Result], int]:
    """The answers to `requests()`, asked all at once, and how many of their tokens nearly tied; made once per path."""
    if path not in _undisturbed:
        engine = InlineEngine(trained_model, count_near_ties=True)
        _undisturbed[path] = generate(engine, requests()), engine.near_ties
    return _undisturbed[path]


def prompt(text: str) -> tuple[int, ...]:
    return (USER, *(ord(c) - 32 + FIRST + 1 for c in text), END, ASSISTANT)


def requests(count: int = 32, *, temperature: float | None = None, seed: int = 0) -> list[Request]:
    """Groups of four answers to a prompt, of all lengths and temperatures, greedy ones included."""
    rng = random.Random(seed)
    made = []
    for i in range(count):
        draw, sample = divmod(i, 4)
        text = "9" * (draw % 5) + f"{100 + 37 * draw}+{999 - 53 * draw}="
        sampling = Sampling(
            max_tokens=rng.randint(1, 40),
            temperature=rng.choice([0.0, 0.7, 1.0, 1.3]) if temperature is None else temperature,
            stop_token_ids=(END,) if i % 3 else (),
        )
        made.append(Request(prompt(text), sampling, NoiseKey(seed, "train", draw, sample)))
    return made


def full_logps(model: PreTrainedModel, request: Request, tokens: list[int]) -> Tensor:
    """Log-probs of the tokens by Hugging Face's own forward of the whole sequence."""
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("sdpa")
    ids = torch.tensor([[*request.prompt_ids, *request.generated_ids, *tokens]])
    with torch.no_grad():
        logits = plain(input_ids=ids).logits[0, -len(tokens) - 1 : -1]
    temperature = request.sampling.temperature or 1.0
    return (logits / temperature).log_softmax(-1)[torch.arange(len(tokens)), torch.tensor(tokens)]


def run_until_short_one_ends(engine: InlineEngine, wanted: list[Request], steps: int) -> tuple[list[int], list[Result]]:
    """Submits these requests and an extra one of a few tokens, and stops when that one has ended."""
    extra = engine.submit(Request(prompt("1+1="), Sampling(max_tokens=steps), NoiseKey(9, "extra")))
    handles = [engine.submit(r) for r in wanted]
    done: list[Result] = []
    while extra not in [r.handle for r in done]:
        done += engine.wait()
    return handles, [r for r in done if r.handle != extra]


def drain(engine: InlineEngine) -> list[Result]:
    done: list[Result] = []
    while results := engine.wait():
        done += results
    return done


# --- distributions ---


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_trainer_and_rollout_agree_on_every_token(trained_model: PreTrainedModel, temperature: float) -> None:
    asked = requests(48, temperature=temperature)
    results = generate(InlineEngine(trained_model), asked)
    batch = Batch.from_rows(
        {
            "input_ids_T": [[*q.prompt_ids, *r.token_ids] for q, r in zip(asked, results)],
            "loss_mask_T": [[False] * len(q.prompt_ids) + [True] * len(r.token_ids) for q, r in zip(asked, results)],
            "rollout_T": [[0.0] * len(q.prompt_ids) + r.logps for q, r in zip(asked, results)],
        }
    )
    trainer = LocalEngine(trained_model, OptimSection(), total_steps=1, tokens_per_microbatch=256)
    logp_T = trainer.score(batch, ["logp"], temperature=temperature)["logp"]
    assert int(batch["loss_mask_T"].sum()) > 500 and float(logp_T.min()) < -1
    assert float((logp_T - batch["rollout_T"]).abs().max()) <= 1e-4


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_first_tokens_have_the_frequencies_of_softmax(trained_model: PreTrainedModel, temperature: float) -> None:
    count = 4000
    base = Request(prompt("12+"), Sampling(1, temperature=temperature), NoiseKey(5, "train"))
    asked = [replace(base, noise=NoiseKey(5, "train", draw=i // 8, sample=i % 8)) for i in range(count)]
    tokens = torch.tensor([r.token_ids[0] for r in generate(InlineEngine(trained_model), asked)])
    with torch.no_grad():
        trained_model.set_attn_implementation("sdpa")
        logits_V = trained_model(input_ids=torch.tensor([base.prompt_ids])).logits[0, -1]
    p_V, found_V = (logits_V / temperature).softmax(-1).double(), torch.bincount(tokens, minlength=len(logits_V))
    often = p_V * count >= 10  # rare tokens are counted together
    expected = torch.cat([p_V[often], p_V[~often].sum()[None]]) * count
    found = torch.cat([found_V[often], found_V[~often].sum()[None]])
    freedom = int(often.sum())
    assert freedom >= 5 and float(expected[-1]) > 5
    assert float(((found - expected) ** 2 / expected).sum()) < freedom + 3.5 * (2 * freedom) ** 0.5


def test_greedy_equals_hugging_face_token_for_token(trained_model: PreTrainedModel) -> None:
    texts = ["1+1=", "347+586=", "999+111=", "5", "100+200=", "12345678901234567890+1="]
    asked = [Request(prompt(t), Sampling(32, 0.0, (END,)), NoiseKey(0, "eval", i)) for i, t in enumerate(texts)]
    results = generate(InlineEngine(trained_model), asked)
    plain = copy.deepcopy(trained_model).eval()
    plain.set_attn_implementation("sdpa")
    for request, result in zip(asked, results):
        ids = torch.tensor([request.prompt_ids])
        out = plain.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=32, eos_token_id=END
        )
        assert out[0, ids.shape[1] :].tolist() == result.token_ids
        expected = full_logps(trained_model, request, result.token_ids)
        assert result.logps == pytest.approx(expected.tolist(), abs=1e-4)


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_other_architectures_agree_with_their_full_forward(kind: str) -> None:
    model = packed_model(kind)
    asked = [Request(tuple(range(1, n)), Sampling(12, 1.0), NoiseKey(0, "train", n)) for n in (3, 9, 20, 9)]
    for request, result in zip(asked, generate(InlineEngine(model), asked)):
        assert result.logps == pytest.approx(full_logps(model, request, result.token_ids).tolist(), abs=1e-4)


# --- the same tokens in any company ---


def differing(a: list[Result], b: list[Result]) -> int:
    return sum(x.token_ids != y.token_ids for x, y in zip(a, b))


@pytest.mark.parametrize("company", ["small cache", "tiny cache", "reversed", "shuffled", "singly", "split groups"])
def test_tokens_do_not_depend_on_the_company(
    trained_model: PreTrainedModel, company: str, undisturbed: tuple[list[Result], int]
) -> None:
    asked, (base, near_ties) = requests(), undisturbed
    order = list(range(len(asked)))
    if company == "reversed":
        order.reverse()
    elif company in ("shuffled", "split groups"):
        random.Random(1).shuffle(order)
    cache = {"small cache": 500, "tiny cache": 65}.get(company, 100_000)
    other = InlineEngine(trained_model, max_cache_tokens=cache)
    size = {"singly": 1, "split groups": 7}.get(company, len(order))
    found: dict[int, Result] = {}
    for start in range(0, len(order), size):
        chunk = order[start : start + size]
        found.update(zip(chunk, generate(other, [asked[i] for i in chunk])))
    results = [found[i] for i in range(len(asked))]
    # Only a token whose two best noisy scores tie within rounding may come out differently.
    assert near_ties <= 3
    assert differing(base, results) <= near_ties
    for a, b in zip(base, results):
        if a.token_ids == b.token_ids:
            assert a.finish_reason == b.finish_reason
            assert a.logps == pytest.approx(b.logps, abs=1e-4)


def test_requests_that_come_while_others_run_do_not_disturb_them(
    trained_model: PreTrainedModel, undisturbed: tuple[list[Result], int]
) -> None:
    """The cache grows in rows and in width under running rows."""
    asked = requests()
    order = sorted(range(len(asked)), key=lambda i: len(asked[i].prompt_ids) + asked[i].sampling.max_tokens)
    asked, base, near_ties = [asked[i] for i in order], [undisturbed[0][i] for i in order], undisturbed[1]
    grown = InlineEngine(trained_model)
    handles, done, sizes = [], [], set()
    for request in asked:
        handles.append(grown.submit(request))
        if len(handles) % 5 == 0:
            with watched(grown) as seen:
                done += grown.wait()
            sizes |= {(rows, width) for _, rows, width in seen}
    results = {r.handle: r for r in done + drain(grown)}
    assert len({rows for rows, _ in sizes}) > 2 and len({width for _, width in sizes}) > 1
    assert near_ties <= 3
    assert differing(base, [results[h] for h in handles]) <= near_ties
    for a, handle in zip(base, handles):
        if a.token_ids == results[handle].token_ids:
            assert a.logps == pytest.approx(results[handle].logps, abs=1e-4)


def test_the_same_run_repeats_bit_for_bit(trained_model: PreTrainedModel) -> None:
    a, b = (generate(InlineEngine(trained_model, max_cache_tokens=700), requests()) for _ in range(2))
    assert [(r.token_ids, r.logps) for r in a] == [(r.token_ids, r.logps) for r in b]


def test_uninitialised_memory_never_enters(trained_model: PreTrainedModel) -> None:
    base = generate(InlineEngine(trained_model, max_cache_tokens=700), requests())
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    try:
        again = generate(InlineEngine(trained_model, max_cache_tokens=700), requests())
    finally:
        torch.use_deterministic_algorithms(False)
    assert [(r.token_ids, r.logps) for r in again] == [(r.token_ids, r.logps) for r in base]


# --- ends ---


def test_finish_reasons_and_what_a_result_holds(trained_model: PreTrainedModel) -> None:
    asked = requests()
    engine = InlineEngine(trained_model)
    engine.version = 3
    results = generate(engine, asked)
    assert {r.finish_reason for r in results} == {"stop", "length"}
    for request, r in zip(asked, results):
        stops = request.sampling.stop_token_ids
        assert not set(r.token_ids[:-1]) & set(stops)
        assert (r.finish_reason == "stop") == (r.token_ids[-1] in stops)
        assert len(r.token_ids) == request.sampling.max_tokens or r.finish_reason == "stop"
        assert len(r.token_ids) == len(r.logps) > 0 and all(x <= 0 for x in r.logps)
        assert r.spans == [Span(3, 0, len(r.token_ids))]


def test_results_come_in_order_of_completion(trained_model: PreTrainedModel) -> None:
    engine = InlineEngine(trained_model)
    lengths = [20, 3, 11, 3]
    handles = [engine.submit(Request(prompt("1"), Sampling(n), NoiseKey(0, "train", i))) for i, n in enumerate(lengths)]
    waits = []
    while results := engine.wait():
        waits.append({r.handle for r in results})
    assert waits == [{handles[1], handles[3]}, {handles[2]}, {handles[0]}]


def test_a_stop_token_as_first_token_ends_at_once(trained_model: PreTrainedModel) -> None:
    greedy = Request(prompt("1+1="), Sampling(5, 0.0), NoiseKey(0, "eval"))
    [result] = generate(InlineEngine(trained_model), [greedy])
    first = result.token_ids[0]
    [stopped] = generate(InlineEngine(trained_model), [replace(greedy, sampling=Sampling(5, 0.0, (99, first)))])
    assert (stopped.token_ids, stopped.finish_reason) == ([first], "stop")


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(prompt("1+1="), Sampling(250), NoiseKey(0, "train")), "does not fit in 256 tokens"),
        (Request((), Sampling(5), NoiseKey(0, "train")), "0 prompt tokens"),
        (Request((5,), Sampling(0), NoiseKey(0, "train")), "nothing to do"),
        (Request((5,), Sampling(3), NoiseKey(0, "train"), generated_ids=(7, 8, 9)), "nothing to do"),
    ],
)
def test_a_request_that_can_never_run_is_refused(
    trained_model: PreTrainedModel, request_: Request, message: str
) -> None:
    engine = InlineEngine(trained_model)
    with pytest.raises(UserError, match=message):
        engine.submit(request_)
    assert engine.wait() == []


def test_a_request_over_the_cache_bound_is_refused(trained_model: PreTrainedModel) -> None:
    engine = InlineEngine(trained_model, max_cache_tokens=40)
    fits = Request(prompt("1+1="), Sampling(33), NoiseKey(0, "train"))
    assert len(fits.prompt_ids) + 33 == 40
    with pytest.raises(UserError, match="does not fit in 40 tokens") as caught:
        engine.submit(replace(fits, sampling=Sampling(34)))
    assert "rollout.max_cache_tokens" in caught.value.fix
    assert len(generate(engine, [fits])[0].token_ids) == 33


# --- memory and work ---


@contextmanager
def watched(engine: InlineEngine) -> Iterator[list[tuple[int, int, int]]]:
    """Of every forward pass: tokens computed, rows of the cache, width of the cache."""
    seen: list[tuple[int, int, int]] = []
    draw, forward = engine._draw, engine._forward

    def forwarded(ids_T: Tensor, *rest: Any) -> Tensor:
        seen.append((ids_T.numel(), 0, 0))
        return forward(ids_T, *rest)

    def drawn(*given: Any) -> None:
        assert engine._cache is not None
        seen[-1] = (seen[-1][0], engine._cache.rows, engine._cache.width)
        draw(*given)

    engine._forward, engine._draw = forwarded, drawn  # type: ignore[method-assign]
    yield seen
    engine._forward, engine._draw = forward, draw  # type: ignore[method-assign]


@pytest.mark.parametrize("bound", [57, 64, 100, 200, 333, 5000])
def test_the_cache_never_exceeds_its_bound(trained_model: PreTrainedModel, bound: int) -> None:
    engine = InlineEngine(trained_model, max_cache_tokens=bound)
    asked = requests(16)
    with watched(engine) as seen:
        results = generate(engine, asked)
    assert all(r.token_ids for r in results)
    assert max(rows * width for _, rows, width in seen) <= bound
    if bound >= 200:
        assert max(rows for _, rows, _ in seen) > 2  # the room there is is used
    assert engine._cache is None  # and given back


def test_equal_prompts_are_computed_once(trained_model: PreTrainedModel) -> None:
    engine = InlineEngine(trained_model)
    with watched(engine) as seen:
        generate(engine, [Request(prompt(t), Sampling(2), NoiseKey(0, "train", 0, i)) for i in range(8) for t in "12"])
    assert [tokens for tokens, _, _ in seen] == [len(prompt("1")) + len(prompt("2")), 16]


def test_waiting_requests_enter_as_others_leave(trained_model: PreTrainedModel) -> None:
    engine = InlineEngine(trained_model, max_cache_tokens=4 * 32)
    asked = [Request(prompt("1+1="), Sampling(n), NoiseKey(0, "train", i)) for i, n in enumerate([4, 25, 4, 25] * 3)]
    with watched(engine) as seen:
        generate(engine, asked)
    # Of 174 tokens, the 12 first ones come from prefills; four rows at most decode the others together.
    assert sum(tokens <= 4 for tokens, _, _ in seen) < 60


# --- interruptions ---


def test_an_aborted_request_goes_on_as_if_nothing_had_been(
    trained_model: PreTrainedModel, undisturbed: tuple[list[Result], int]
) -> None:
    asked, (base, near_ties) = requests(), undisturbed
    interrupted = InlineEngine(trained_model, max_cache_tokens=1500)
    handles, done = run_until_short_one_ends(interrupted, asked, steps=7)
    parts = {r.handle: r for r in [*done, *interrupted.abort(handles)]}
    assert sorted(parts) == sorted(handles)
    aborted = [i for i, h in enumerate(handles) if parts[h].finish_reason == "abort"]
    sizes = {len(parts[handles[i]].token_ids) for i in aborted}
    assert len(aborted) > 20 and 0 in sizes and max(sizes) >= 6  # some had not begun
    assert interrupted.wait() == [] and interrupted.abort(handles) == []
    rest = generate(interrupted, [replace(asked[i], generated_ids=tuple(parts[handles[i]].token_ids)) for i in aborted])
    joined = dict(enumerate(base))
    for i, second in zip(aborted, rest):
        first = parts[handles[i]]
        assert first.spans == ([Span(0, 0, len(first.token_ids))] if first.token_ids else [])
        assert len(first.logps) == len(first.token_ids)
        tokens, logps = first.token_ids + second.token_ids, first.logps + second.logps
        joined[i] = replace(base[i], token_ids=tokens, logps=logps, finish_reason=second.finish_reason)
    assert near_ties <= 3
    assert differing(base, [joined[i] for i in range(len(base))]) <= near_ties
    for i in aborted:
        if joined[i].token_ids == base[i].token_ids:
            assert joined[i].finish_reason == base[i].finish_reason
            assert joined[i].logps == pytest.approx(base[i].logps, abs=1e-4)


def test_aborting_some_leaves_the_others_alone(
    trained_model: PreTrainedModel, undisturbed: tuple[list[Result], int]
) -> None:
    asked, (base, _) = requests(), undisturbed
    engine = InlineEngine(trained_model, count_near_ties=True)
    handles, done = run_until_short_one_ends(engine, asked, steps=5)
    ties = engine.near_ties
    gone = engine.abort(handles[::2])
    results = {r.handle: r for r in done + gone + drain(engine)}
    assert sorted(results) == sorted(handles)
    for i, handle in enumerate(handles):
        found = results[handle].token_ids
        assert found == base[i].token_ids[: len(found)] or engine.near_ties > ties
        assert (results[handle].finish_reason == "abort") == (handle in [r.handle for r in gone])


def perturbed(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    other, rng = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in other.parameters():
            p += 0.02 * torch.randn(p.shape, generator=rng)
    return other


def test_new_weights_take_over_requests_in_flight(trained_model: PreTrainedModel) -> None:
    models = [copy.deepcopy(trained_model), perturbed(trained_model, 1), perturbed(trained_model, 2)]
    asked = [replace(r, sampling=replace(r.sampling, max_tokens=30)) for r in requests(24)]
    engine = InlineEngine(trained_model, max_cache_tokens=12 * 64)
    handles, done = run_until_short_one_ends(engine, asked, steps=6)
    for version in (1, 2):
        stream = stream_of(models[version])
        (receipt,) = engine.update_weights(stream, version)
        verify(stream, receipt, version)
        assert receipt.num_bytes == sum(t.nbytes for t in models[version].state_dict().values())
        if version == 1:
            for _ in range(3):
                done += engine.wait()
    results = {r.handle: r for r in done + drain(engine)}
    seen = set()
    for request, handle in zip(asked, handles):
        r = results[handle]
        assert [s.start for s in r.spans] == [0] + [s.end for s in r.spans[:-1]]
        assert r.spans[-1].end == len(r.token_ids) and all(s.start < s.end for s in r.spans)
        seen.add(tuple(s.version for s in r.spans))
        for span in r.spans:
            full = full_logps(models[span.version], request, r.token_ids)
            part = slice(span.start, span.end)
            assert r.logps[part] == pytest.approx(full[part].tolist(), abs=1e-4)
    assert (0, 1, 2) in seen and (2,) in seen  # running through both updates, and begun after them
    other = full_logps(models[0], asked[0], results[handles[0]].token_ids)
    assert float((other - torch.tensor(results[handles[0]].logps)).abs().max()) > 0.01  # the weights do differ


def test_the_trainers_own_memory_is_used_without_a_copy(trained_model: PreTrainedModel) -> None:
    engine = InlineEngine(trained_model)
    stream = stream_of(trained_model, same_memory=True)
    (receipt,) = engine.update_weights(stream, 5)
    verify(stream, receipt, 5)
    assert receipt.num_bytes == 0 and engine.version == 5
    assert receipt.received == stream.published and receipt.received.keys() == stream.names


def test_a_stream_of_another_model_is_noticed(trained_model: PreTrainedModel) -> None:
    before = copy.deepcopy(trained_model.state_dict())
    with pytest.raises(WeightSyncError, match=r"6 published tensors that it lacks: .*self_attn\.\w_proj\.bias"):
        InlineEngine(trained_model).update_weights(stream_of(packed_model("qwen2")), 1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained_model.state_dict().items())


def test_pause_keeps_what_is_in_flight(trained_model: PreTrainedModel) -> None:
    asked = requests(8, temperature=1.0)
    base = generate(InlineEngine(trained_model), asked)
    engine = InlineEngine(trained_model)
    handles, done = run_until_short_one_ends(engine, asked, steps=4)
    engine.pause()
    with pytest.raises(AssertionError, match="paused"):
        engine.wait()
    engine.resume()
    results = {r.handle: r for r in done + drain(engine)}
    assert [results[h].token_ids for h in handles] == [r.token_ids for r in base]


def test_generation_leaves_the_model_as_it_was(trained_model: PreTrainedModel) -> None:
    trained_model.train()
    before = copy.deepcopy(trained_model.state_dict())
    engine = InlineEngine(trained_model)
    generate(engine, requests(8))
    engine.sleep()
    engine.wake()
    assert trained_model.training and len(generate(engine, requests(8))) == 8
    engine.close()
    for name, tensor in trained_model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_the_engine_has_the_methods_of_the_protocol() -> None:
    for name, method in inspect.getmembers(RolloutEngine, inspect.isfunction):
        if not name.startswith("_"):
            assert inspect.signature(method) == inspect.signature(getattr(InlineEngine, name))
