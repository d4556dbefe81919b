"""Every family generates what it would generate by itself, and training scores what was sampled the same."""

from __future__ import annotations

import pytest
import torch

from hybridflow.batch import Batch
from hybridflow.config.sections.optim import OptimSection
from hybridflow.engines.local import LocalEngine
from hybridflow.noise import NoiseKey
from hybridflow.protocols.generation import Request, Result, Sampling, generate
from hybridflow.rollout.inline.engine import InlineEngine

from tiny import KINDS, packed_model, plain_model

QUICK = ("llama", "llama3", "qwen2", "qwen3")
PROMPTS = [tuple(range(1, n)) for n in (4, 9, 15, 9)]


def sampled(kind: str, **options: object) -> tuple[list[Request], list[Result], InlineEngine]:
    """Long answers, longer than the window of the families that have one, at several temperatures."""
    engine = InlineEngine(packed_model(kind), count_near_ties=True, **options)  # type: ignore[arg-type]
    asked = [Request(p, Sampling(20 + 3 * i), NoiseKey(0, "train", i)) for i, p in enumerate(PROMPTS)]
    return asked, generate(engine, asked), engine


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packed", [True, False])
def test_greedy_equals_hugging_face_token_for_token(kind: str, packed: bool) -> None:
    model, plain = packed_model(kind) if packed else plain_model(kind), plain_model(kind)
    asked = [Request(p, Sampling(24, 0.0), NoiseKey(0, "greedy", i)) for i, p in enumerate(PROMPTS)]
    for request, result in zip(asked, generate(InlineEngine(model), asked)):
        ids = torch.tensor([request.prompt_ids])
        out = plain.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24, eos_token_id=None
        )
        assert out[0, ids.shape[1] :].tolist() == result.token_ids


@pytest.mark.parametrize("kind", KINDS)
def test_training_scores_what_was_sampled(kind: str) -> None:
    asked, results, engine = sampled(kind)
    rows = [(list(q.prompt_ids), r.token_ids, r.logps) for q, r in zip(asked, results)]
    batch = Batch.from_rows(
        {
            "input_ids_T": [p + t for p, t, _ in rows],
            "loss_mask_T": [[False] * len(p) + [True] * len(t) for p, t, _ in rows],
            "rollout_T": [[0.0] * len(p) + x for p, _, x in rows],
        }
    )
    trainer = LocalEngine(engine.model, OptimSection(), total_steps=1, tokens_per_microbatch=256)
    logp_T = trainer.score(batch, ["logp"])["logp"]
    assert float(logp_T.min()) < -1
    assert float((logp_T - batch["rollout_T"]).abs().max()) <= 1e-4


@pytest.mark.parametrize("kind", QUICK)
def test_the_quick_path_is_the_plain_one(kind: str) -> None:
    _, quick, engine = sampled(kind)
    _, plain, other = sampled(kind, quick=False)
    assert engine.quick and not other.quick and engine.near_ties == 0
    for a, b in zip(quick, plain):
        assert a.token_ids == b.token_ids
        assert a.logps == pytest.approx(b.logps, abs=1e-5)


@pytest.mark.parametrize("kind", sorted(set(KINDS) - set(QUICK)))
def test_what_the_quick_path_does_not_cover_takes_the_plain_one(kind: str) -> None:
    assert not InlineEngine(packed_model(kind)).quick


@pytest.mark.parametrize("kind", QUICK)
def test_weights_that_stay_in_the_models_own_memory_give_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, joined, _ = sampled(kind)
    monkeypatch.setattr("hybridflow.rollout.inline.decoder.JOINED_BYTES", 0)
    _, apart, _ = sampled(kind)
    for a, b in zip(joined, apart):
        assert a.token_ids == b.token_ids
        assert a.logps == pytest.approx(b.logps, abs=1e-5)


@pytest.mark.parametrize("quick", [True, False])
def test_bfloat16_stays_near_float32(quick: bool) -> None:
    """Log-probabilities of the tokens that it samples differ from training's in float32 by its rounding only."""
    asked, results, _engine = sampled("qwen3", dtype=torch.bfloat16, quick=quick)
    plain = plain_model("qwen3")
    gaps = []
    for request, result in zip(asked, results):
        ids = torch.tensor([[*request.prompt_ids, *result.token_ids]])
        with torch.no_grad():
            logps = plain(input_ids=ids).logits[0, len(request.prompt_ids) - 1 : -1].log_softmax(-1)
        exact = logps.gather(-1, torch.tensor(result.token_ids)[:, None])[:, 0]
        gaps.append((exact - torch.tensor(result.logps)).abs())
    assert 1e-5 < float(torch.cat(gaps).mean()) < 0.02


@pytest.mark.slow
def test_compiled_layers_give_the_same() -> None:
    _, plain, _ = sampled("qwen3")
    _, compiled, engine = sampled("qwen3", compile=True)
    assert engine.quick
    for a, b in zip(plain, compiled):
        assert a.token_ids == b.token_ids
        assert a.logps == pytest.approx(b.logps, abs=1e-5)
