"""Each way of sampling against a brute-force reference, in batches whose rows differ, and training on what was kept."""

from __future__ import annotations

import copy
import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hybridflow.config.sections.optim import OptimSection
from hybridflow.engines.local import LocalEngine
from hybridflow.errors import UserError
from hybridflow.noise import NoiseKey
from hybridflow.protocols.generation import Request, Sampling, generate
from hybridflow.protocols.groups import Group, Trajectory, one_turn
from hybridflow.rollout.inline.engine import InlineEngine
from hybridflow.rollout.sampling import kept
from hybridflow.trainers.rl.batches import batch_of

PROMPT = (2, 22, 23, 17, 25, 34, 1, 3)
WAYS: dict[str, dict[str, Any]] = {
    "top-k": {"top_k": 3},
    "top-p": {"top_p": 0.8},
    "min-p": {"min_p": 0.15},
    "all three, hot": {"temperature": 1.7, "min_p": 0.02, "top_k": 12, "top_p": 0.9},
    "repetition penalty": {"repetition_penalty": 1.6},
    "logit bias": {"logit_bias": ((21, 2.5), (30, 1.0), (22, -100.0))},
    "everything": {
        "temperature": 1.3, "top_k": 9, "top_p": 0.95, "repetition_penalty": 1.2, "logit_bias": ((21, 3.0),),
    },
}  # fmt: skip


def reference(logits: list[float], s: Sampling, context: tuple[int, ...]) -> tuple[list[float], list[int]]:
    """Probabilities, and what is kept, as one would write them down: sets and sorted lists, no tensors."""
    scores = list(logits)
    for token, value in s.logit_bias:
        scores[token] += value
    for token in set(context):
        scores[token] = (
            scores[token] / s.repetition_penalty if scores[token] > 0 else scores[token] * s.repetition_penalty
        )
    scores = [x / (s.temperature or 1.0) for x in scores]
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    order = [i for i in order if s.min_p == 0 or scores[i] >= scores[order[0]] + math.log(s.min_p)]
    order = order[: s.top_k or None]
    weights = [math.exp(scores[i] - scores[order[0]]) for i in order]
    total, before = sum(weights), 0.0
    chosen = []
    for i, w in zip(order, weights):
        if s.top_p < 1 and before >= s.top_p * total:
            break
        chosen.append(i)
        before += w
    p = [0.0] * len(scores)
    for i in chosen:
        p[i] = math.exp(scores[i] - scores[order[0]]) / before
    return p, sorted(chosen)


def logits_of(model: PreTrainedModel, ids: tuple[int, ...]) -> Tensor:
    """Logits after every token, by Hugging Face's own forward."""
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("sdpa")
    with torch.no_grad():
        return plain(input_ids=torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("seed", range(30))
def test_the_kept_set_is_exactly_that_of_the_definition(seed: int) -> None:
    """Shares such as 0.77 of 300 equal tokens would hang on rounding: no top_p here is a round number."""
    rng = random.Random(seed)
    vocab = rng.choice([1, 7, 40, 700])
    ways = [
        Sampling(1, top_k=rng.choice([0, 1, 3, 20, 300, 5000]), top_p=rng.choice([1, 0.1237, 0.7713, 0.9711]),
                 min_p=rng.choice([0, 0, 0.013, 0.3]))
        for _ in range(12)
    ]  # fmt: skip
    spread = rng.choice([0.1, 1.0, 5.0])
    score_PV = torch.randn(12, vocab, generator=torch.Generator().manual_seed(seed)) * spread
    if seed % 2:
        score_PV = score_PV.round()  # many ties
    for row, (way, mask_V) in enumerate(zip(ways, kept(score_PV, ways))):
        _, expected = reference(score_PV[row].tolist(), replace(way, temperature=1.0), ())
        assert mask_V.nonzero()[:, 0].tolist() == expected, way


def test_among_equally_likely_tokens_lower_ids_are_kept() -> None:
    score_PV = torch.tensor([[1.0, 2.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    mask_PV = kept(score_PV, [Sampling(1, top_k=3), Sampling(1, top_p=0.55)])
    assert mask_PV.tolist() == [[True, True, True, False, False], [True, True, True, False, False]]


@pytest.mark.parametrize("way", WAYS)
def test_tokens_have_the_frequencies_of_the_filtered_distribution(trained_model: PreTrainedModel, way: str) -> None:
    count, sampling = 3000, Sampling(1, **WAYS[way])
    base = Request(PROMPT, sampling, NoiseKey(5, "train"))
    results = generate(
        InlineEngine(trained_model), [replace(base, noise=NoiseKey(5, "train", i // 8, i % 8)) for i in range(count)]
    )
    p, chosen = reference(logits_of(trained_model, PROMPT)[-1].tolist(), sampling, PROMPT)
    tokens = [r.token_ids[0] for r in results]
    assert set(tokens) <= set(chosen) and len(set(tokens)) > 1
    for token in set(tokens):
        assert results[tokens.index(token)].logps[0] == pytest.approx(math.log(p[token]), abs=1e-4)
    often = [i for i in chosen if p[i] * count >= 5]
    expected = [p[i] * count for i in often] + [max(1e-9, count - sum(p[i] * count for i in often))]
    found = [tokens.count(i) for i in often]
    found.append(count - sum(found))
    if expected[-1] < 5:
        found[-2:], expected[-2:] = [found[-2] + found[-1]], [expected[-2] + expected[-1]]
    freedom = len(expected) - 1
    assert sum((f - e) ** 2 / e for f, e in zip(found, expected)) < freedom + 3.5 * (2 * freedom) ** 0.5 + 3


@pytest.mark.parametrize("quick", [True, False])
def test_rows_of_one_batch_each_have_their_own_parameters(trained_model: PreTrainedModel, quick: bool) -> None:
    """What a row is batched with changes nothing, and each log-probability is of the distribution it was drawn from."""
    ways = [{}, {"temperature": 0.0}, *WAYS.values(), {"temperature": 0.0, "top_p": 0.5}]
    asked = [
        Request(PROMPT, Sampling(14, stop_token_ids=(1,), **way), NoiseKey(0, "train", i)) for i, way in enumerate(ways)
    ]
    together = generate(InlineEngine(trained_model, quick=quick), asked)
    alone = [generate(InlineEngine(trained_model, quick=quick), [request])[0] for request in asked]
    for request, result, single in zip(asked, together, alone):
        assert result.token_ids == single.token_ids and result.support == single.support
        assert result.logps == pytest.approx(single.logps, abs=1e-4)
        logits_LV = logits_of(trained_model, (*PROMPT, *result.token_ids))
        s, ids = request.sampling, 0
        if not s.temperature:
            s = replace(s, top_p=1.0)
        for t, (token, logp) in enumerate(zip(result.token_ids, result.logps)):
            context = (*PROMPT, *result.token_ids[:t])
            p, chosen = reference(logits_LV[len(context) - 1].tolist(), s, context)
            assert logp == pytest.approx(math.log(p[token]), abs=2e-4)
            if result.support is not None and (size := result.support.sizes[t]):
                assert result.support.ids[ids : ids + size] == chosen
                ids += size
        assert (result.support is not None) == bool(
            request.sampling.temperature and (s.top_k or s.top_p < 1 or s.min_p)
        )


def test_greedy_with_a_repetition_penalty_equals_hugging_face(trained_model: PreTrainedModel) -> None:
    asked = Request(PROMPT, Sampling(30, 0.0, repetition_penalty=1.4), NoiseKey(0, "greedy"))
    [result] = generate(InlineEngine(trained_model), [asked])
    [other] = generate(InlineEngine(trained_model), [replace(asked, sampling=Sampling(30, 0.0))])
    plain = copy.deepcopy(trained_model).eval()
    plain.set_attn_implementation("sdpa")
    ids = torch.tensor([PROMPT])
    out = plain.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=30, repetition_penalty=1.4,
        eos_token_id=None,
    )  # fmt: skip
    assert result.token_ids == out[0, len(PROMPT) :].tolist() != other.token_ids


def test_greedy_and_sampled_streams_share_no_noise(trained_model: PreTrainedModel) -> None:
    """A greedy answer does not depend on its noise key at all; keys of two streams give two answers."""
    texts = []
    for stream in ("train", "eval", "greedy"):
        pair = [Request(PROMPT, Sampling(20, t), NoiseKey(0, stream)) for t in (0.0, 1.5)]
        texts.append([tuple(r.token_ids) for r in generate(InlineEngine(trained_model), pair)])
    assert len({greedy for greedy, _ in texts}) == 1 and len({drawn for _, drawn in texts}) == 3


def test_many_stop_tokens(trained_model: PreTrainedModel) -> None:
    greedy = Request(PROMPT, Sampling(10, 0.0), NoiseKey(0, "greedy"))
    [free] = generate(InlineEngine(trained_model), [greedy])
    last = free.token_ids[4]
    stops = (*range(200, 230), last)
    [result] = generate(InlineEngine(trained_model), [replace(greedy, sampling=Sampling(10, 0.0, stops))])
    assert result.finish_reason == "stop" and result.token_ids == free.token_ids[: free.token_ids.index(last) + 1]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"logit_bias": ((100, 1.0),)}, "names token 100, the model's tokens are 0 to 99"),
        ({"stop": ("",)}, "a stop string is empty"),
        ({"stop_regex": "(a"}, "not a regular expression"),
        ({"stop": ("a",)}, "need an engine that can decode"),
    ],
)
def test_parameters_that_mean_nothing_are_refused(
    trained_model: PreTrainedModel, wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        InlineEngine(trained_model).submit(Request(PROMPT, Sampling(3, **wrong), NoiseKey(0, "train")))


# --- training on what was kept ---


def groups_of(model: PreTrainedModel, way: dict[str, Any]) -> list[Group]:
    """Four groups of four answers; the first group is drawn from the whole vocabulary."""
    asked = [
        Request((*PROMPT[:-3], 20 + i // 4, 1, 3), Sampling(24, stop_token_ids=(1,), **(way if i > 3 else {})),
                NoiseKey(0, "train", i // 4, i % 4))
        for i in range(16)
    ]  # fmt: skip
    results = generate(InlineEngine(model), asked)
    answers = [
        Trajectory(i % 4, [one_turn(list(asked[i].prompt_ids), r, 24)], r.finish_reason, "", 0.0)
        for i, r in enumerate(results)
    ]
    return [Group(i, i, list(asked[4 * i].prompt_ids), answers[4 * i : 4 * i + 4]) for i in range(4)]


@pytest.mark.parametrize("way", ["top-k", "top-p", "min-p", "all three, hot"])
def test_training_scores_under_the_sampled_support(trained_model: PreTrainedModel, way: str) -> None:
    trained_model.requires_grad_(True)
    values = WAYS[way]
    batch = batch_of(groups_of(trained_model, values)[1:])
    engine = LocalEngine(trained_model, OptimSection(), total_steps=1, tokens_per_microbatch=256)
    temperature = values.get("temperature", 1.0)
    logp_T = engine.score(batch, ["logp"], temperature=temperature)["logp"]
    assert int(batch["loss_mask_T"].sum()) > 100
    assert float((logp_T - batch["rollout_logp_T"]).abs().max()) <= 1e-4  # the ratio is 1
    del batch.columns["support_size_T"], batch.columns["support_ids_K"]
    logp_T = engine.score(batch, ["logp"], temperature=temperature)["logp"]
    assert float((logp_T - batch["rollout_logp_T"]).abs().max()) > 0.05


def test_answers_with_and_without_a_support_share_a_batch(trained_model: PreTrainedModel) -> None:
    groups = groups_of(trained_model, {"top_p": 0.8})
    supports = [g.trajectories[0].sequences[0].support for g in groups]
    assert supports[0] is None and supports[1] is not None
    batch = batch_of(groups)
    engine = LocalEngine(trained_model, OptimSection(), total_steps=1, tokens_per_microbatch=256)
    logp_T = engine.score(batch, ["logp"])["logp"]
    assert float((logp_T - batch["rollout_logp_T"]).abs().max()) <= 1e-4
    assert "support_size_T" not in batch_of(groups[:1])
