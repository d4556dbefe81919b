"""vLLM's silent ways to sample from other weights than the trainer's, each brought about, and each told.

A publisher of its own for every test: it begins with the drill. The engine is one for all tests of a model, and what a
test broke in it is mended by the next publication.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from hybridflow.config.sections.model import LoraSection
from hybridflow.config.sections.optim import OptimSection
from hybridflow.engines.local import LocalEngine
from hybridflow.models.attention import ATTENTION
from hybridflow.models.lora import add_lora
from hybridflow.protocols.generation import RolloutEngine
from hybridflow.protocols.weights import WeightStream
from hybridflow.publishing.canary import Canary, ordinary_tokens
from hybridflow.publishing.publisher import Publisher
from hybridflow.rollout.vllm.worker import WeightTaker
from hybridflow.weights.stream import WeightSyncError, fingerprint, stream_of

from conformance import CONTEXT, model_of, start, tokenizer

pytestmark = pytest.mark.vllm
Change = Callable[[dict[str, Tensor], WeightStream], Iterator[tuple[str, Tensor]]]


class Setup:
    """An engine, and a trainer whose stream a test can tamper with."""

    def __init__(self, engine: RolloutEngine, kind: str) -> None:
        model = model_of(kind)
        model.set_attn_implementation(ATTENTION)
        self.engine, self.kind = engine, kind
        self.trainer = LocalEngine(model, OptimSection(), total_steps=1, tokens_per_microbatch=4096)
        self.change: Change | None = None

    def publisher(self, **how: Any) -> Publisher:
        canary = Canary(
            trainer=self.trainer,
            rollout=self.engine,
            tokens=ordinary_tokens(tokenizer()),
            room=CONTEXT,
            keep=lambda results: None,
        )
        return Publisher(canary, lambda whole: self.stream(), **how)

    def stream(self) -> WeightStream:
        stream = stream_of(self.trainer.model)
        if self.change is not None:
            stream.tensors = self.change(dict(stream.tensors), stream)
        return stream

    def step(self) -> None:
        """What an optimizer step does, roughly."""
        with torch.no_grad():
            for weight in self.trainer.model.parameters():
                weight += 0.01 * torch.randn(weight.shape)


@pytest.fixture(scope="module", params=["qwen2_tied", "qwen3_moe"])
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    engine = start("vllm", request.param, tmp_path_factory.mktemp("model")).engine
    yield Setup(engine, request.param)
    engine.close()


@pytest.fixture
def setup(shared: Setup) -> Iterator[Setup]:
    yield shared
    shared.change = None


def told(setup: Setup, publisher: Publisher, version: int = 1) -> str:
    """What the publication raises."""
    with pytest.raises(WeightSyncError) as error:
        publisher.publish(version)
    setup.change = None
    return str(error.value)


def test_publications_pass_and_what_lies_unpacked_is_read_back(setup: Setup):
    publisher = setup.publisher(read_back_every=1)
    assert len(publisher.canary.prompt()) > 2 * setup.engine.cache_block > 0
    for version in range(3):
        found = publisher.publish(version)
        assert found["rollout_sync/canary_max_diff"] < 1e-4
        assert (
            found["rollout_sync/read_back_tensors"] >= 3
        )  # norms and embeddings at least: vLLM packs the rest on CPUs
        setup.step()


def test_the_drill_sees_every_single_tensor_that_vllm_does_not_take(setup: Setup):
    """Each in turn has its true value in the engine and all others the changed one; receipts show nothing."""
    publisher = setup.publisher()
    canary, true = publisher.canary, {n: t.detach().clone() for n, t in setup.trainer.model.state_dict().items()}
    setup.trainer.perturb()
    seen = {}
    for dead in true:
        setup.change = lambda left, stream: iter((left | {dead: true[dead]}).items())  # noqa: B023
        setup.engine.update_weights(setup.stream(), 1)
        seen[dead] = canary.gap(canary.ask(1, range(2))).largest
    setup.change = None
    publisher.send(1)
    clean = canary.gap(canary.ask(1, range(2))).largest
    setup.trainer.perturb()
    if setup.kind == "qwen2_tied":  # vLLM takes both from the same tensor, and the last one stays
        seen.pop("model.embed_tokens.weight")
    assert clean < 1e-4 and len(seen) > 20 and min(seen.values()) > 10 * canary.limit, sorted(seen.items())


def test_a_tensor_that_is_not_taken_is_named(setup: Setup):
    """As the engine had it from before: the drill is its first publication."""
    setup.publisher().publish(0)
    dead = "model.layers.1.post_attention_layernorm.weight"
    kept = setup.trainer.model.state_dict()[dead].clone()
    setup.change = lambda left, stream: iter((left | {dead: kept}).items())

    def unseen(left: dict[str, Tensor], stream: WeightStream) -> Iterator[tuple[str, Tensor]]:
        stream.published.update({name: fingerprint(t) for name, t in (left | {dead: kept}).items()})
        yield from (left | {dead: kept}).items()

    setup.change = unseen
    assert told(setup, setup.publisher()).endswith(f"It computes as if it had not taken {dead}")


def test_a_prefix_cache_that_is_not_reset_is_told(setup: Setup, monkeypatch: pytest.MonkeyPatch):
    publisher = setup.publisher()
    publisher.publish(0)
    setup.step()
    monkeypatch.setattr(setup.engine._engine, "reset_prefix_cache", lambda **how: True)  # type: ignore[attr-defined]
    assert "its prefix cache holds keys and values of older weights" in told(setup, publisher)
    monkeypatch.undo()
    publisher.publish(2)


def test_experts_that_are_not_packed_are_told(setup: Setup, monkeypatch: pytest.MonkeyPatch):
    if setup.kind != "qwen3_moe":
        pytest.skip("it has no experts")
    monkeypatch.setattr(WeightTaker, "_pack_experts", lambda self: None)
    text = told(setup, setup.publisher())
    assert "log-probabilities are not the start-up drill's" in text and "packed" in text
    monkeypatch.undo()
    publisher = setup.publisher()
    publisher.publish(0)
    monkeypatch.setattr(WeightTaker, "_pack_experts", lambda self: None)
    setup.step()
    assert "with weights of version 1 the generation engine's log-probabilities are not the trainer's" in told(
        setup, publisher
    )


def test_the_output_layer_of_a_tied_model_cannot_be_left_out(setup: Setup):
    """vLLM would keep its old packed copy. Where names lack it too, the drill tells; else the receipt."""
    if setup.kind != "qwen2_tied":
        pytest.skip("it is not tied")

    def dropped(left: dict[str, Tensor], stream: WeightStream) -> Iterator[tuple[str, Tensor]]:
        yield from ((name, t) for name, t in left.items() if name != "lm_head.weight")

    def unnamed(left: dict[str, Tensor], stream: WeightStream) -> Iterator[tuple[str, Tensor]]:
        del stream.published["lm_head.weight"]
        stream.names -= {"lm_head.weight"}
        yield from dropped(left, stream)

    setup.change = dropped
    assert "1 tensors never arrived: lm_head.weight" in told(setup, setup.publisher())
    setup.change = unnamed
    assert "log-probabilities are not the start-up drill's" in told(setup, setup.publisher())
    setup.publisher().publish(1)


@pytest.mark.parametrize("fault", ["corrupted", "swapped", "truncated", "old"])
def test_what_went_wrong_on_the_way_is_told(setup: Setup, fault: str):
    publisher = setup.publisher()
    publisher.publish(0)
    first = {n: t.detach().clone() for n, t in setup.trainer.model.state_dict().items()}
    setup.step()
    a, b = (f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1))

    def arriving(left: dict[str, Tensor], stream: WeightStream) -> Iterator[tuple[str, Tensor]]:
        if fault == "corrupted":
            left[a] = left[a].clone()
            left[a][3, 4] += 1e-4
        elif fault == "swapped":
            left[a], left[b] = left[b], left[a]
        elif fault == "old":
            left = first
            stream.published.update({name: fingerprint(t) for name, t in first.items()})
        yield from list(left.items())[: -5 if fault == "truncated" else None]

    setup.change = arriving
    says = {
        "corrupted": f"1 tensors arrived with other values: {a}",
        "swapped": f"2 tensors arrived with other values: {a}, {b}",
        "truncated": "5 tensors never arrived: ",
        "old": "with weights of version 1 the generation engine's log-probabilities are not the trainer's",
    }
    assert says[fault] in told(setup, publisher)
    publisher.publish(2)


def test_a_wrong_version_is_told(setup: Setup, monkeypatch: pytest.MonkeyPatch):
    publisher = setup.publisher()
    publisher.publish(0)
    load = WeightTaker._load
    monkeypatch.setattr(WeightTaker, "_load", lambda self, stream, version, lora: load(self, stream, 0, lora))
    assert "the engine reports version 0, published was 5" in told(setup, publisher, version=5)


def test_adapters_are_drilled_beside_the_weights(setup: Setup):
    """The stream of a run with rollout.lora=merged: each adapter is added into its weight, and seen there."""
    if setup.kind != "qwen2_tied":
        pytest.skip("once is enough")
    adapted = Setup(setup.engine, setup.kind)
    model = add_lora(adapted.trainer.model, LoraSection(rank=4), seed=0)
    adapted.trainer = LocalEngine(model, OptimSection(), total_steps=1, tokens_per_microbatch=4096)
    publisher = adapted.publisher()
    publisher.stream = lambda whole: adapted.trainer.stream_weights(lora="merged")
    assert publisher.publish(0)["rollout_sync/canary_max_diff"] < 1e-4
