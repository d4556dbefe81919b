"""The inline engine reads what is new in a later turn, and gives what reading all of it again gives."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from hybridflow.noise import NoiseKey, fork_stream
from hybridflow.protocols.generation import Request, Result, Sampling, generate
from hybridflow.rollout.inline.engine import InlineEngine

from tiny import VOCAB, packed_model

TURNS, ANSWERS = 3, 8


def turns_of(engine: InlineEngine, seed: int = 0) -> list[list[Result]]:
    """Three turns of eight sequences: they end at their own lengths, observe 0 to 9 tokens, and one forks."""
    rng = random.Random(seed)
    prompts = [tuple(rng.randrange(2, VOCAB) for _ in range(n)) for n in (3, 20)]
    asked = [
        Request(prompts[i % 2], Sampling(rng.randint(2, 14), stop_token_ids=(1,)), NoiseKey(seed, "train", i))
        for i in range(ANSWERS)
    ]
    found = []
    for turn in range(TURNS):
        found.append(generate(engine, asked))
        for i, (request, result) in enumerate(zip(asked, found[-1], strict=True)):
            seen = tuple(rng.randrange(2, VOCAB) for _ in range(rng.choice((0, 1, 9))))
            position = request.position + len(result.token_ids)
            asked[i] = replace(
                request, prompt_ids=request.prompt_ids + tuple(result.token_ids) + seen, position=position
            )
        if turn == 0:  # its history is rewritten
            ids = asked[2].prompt_ids[2:]
            key = replace(asked[2].noise, stream=fork_stream("train", ids, 0))
            asked[2] = replace(asked[2], prompt_ids=ids, noise=key, position=0)
            asked[3] = replace(asked[3], prompt_ids=ids)  # the same noise and position with another context
    return found


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe", "gemma2", "deepseek_v3"])
def test_turns_that_are_kept_give_what_reading_them_again_gives(kind: str) -> None:
    """On the quick path, and through modules: of experts, windows and soft caps, values smaller than keys."""
    model = packed_model(kind)
    again, kept = InlineEngine(model), InlineEngine(model, keep_turns=True)
    tight = InlineEngine(model, keep_turns=True, max_cache_tokens=128)  # there is room for few of them
    expected = turns_of(again)
    for engine in (kept, tight):
        for theirs, ours in zip(expected, turns_of(engine), strict=True):
            assert [r.token_ids for r in ours] == [r.token_ids for r in theirs]
            for one, other in zip(ours, theirs, strict=True):
                assert one.logps == pytest.approx(other.logps, abs=1e-5)
    assert kept.tokens_read < 0.45 * again.tokens_read
    assert kept.tokens_read < tight.tokens_read, "there was room for all"
    repeated = [InlineEngine(model, keep_turns=True) for _ in range(2)]
    assert turns_of(repeated[0]) == turns_of(repeated[1]), "bits depend on something else than the requests"


def test_what_is_kept_goes_when_training_needs_the_memory() -> None:
    engine = InlineEngine(packed_model(), keep_turns=True)
    first = Request((3, 4, 5), Sampling(6), NoiseKey(0, "train"))
    (said,) = generate(engine, [first])
    second = replace(first, prompt_ids=(*first.prompt_ids, *said.token_ids, 7), position=6)
    before = engine.tokens_read
    (more,) = generate(engine, [second])
    assert engine.tokens_read - before == 2, "the last token of the first turn, and what was observed"
    (said,) = generate(engine, [first])
    engine.forget()
    before = engine.tokens_read
    (again,) = generate(engine, [second])
    assert engine.tokens_read - before == len(second.prompt_ids)
    assert again.token_ids == more.token_ids and again.logps == pytest.approx(more.logps, abs=1e-5)
