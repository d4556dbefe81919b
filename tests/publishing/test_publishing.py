"""Weights that an engine does not compute with are noticed at the publication, and the message says which and where.

The engine is the inline one on a model of its own. Faults are put in where they would happen: in what the engine does
with a stream, or in the stream.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hybridflow.config.sections.optim import OptimSection
from hybridflow.engines.local import LocalEngine
from hybridflow.models.attention import ATTENTION
from hybridflow.noise import NoiseKey
from hybridflow.protocols.generation import Request, Result, Sampling
from hybridflow.protocols.weights import Receipt, WeightStream
from hybridflow.publishing.canary import Canary, computes_exactly, ordinary_tokens
from hybridflow.publishing.publisher import PROMPTS, Publisher
from hybridflow.rollout.inline.engine import InlineEngine
from hybridflow.weights.stream import WeightSyncError, fingerprint, stream_of

from conformance import CONTEXT, VOCAB, model_of, tokenizer

KINDS = ["qwen2_tied", "qwen3", "qwen3_moe"]


class Replica(InlineEngine):
    """An inline engine with a model of its own, and what may go wrong in it.

    Attributes:
        deaf: names of tensors that it acknowledges and does not take.
    """

    cache_block = 16

    def __init__(self, kind: str) -> None:
        model = model_of(kind)
        model.set_attn_implementation(ATTENTION)
        super().__init__(model)
        self.deaf: set[str] = set()
        self.publications = 0

    def update_weights(self, stream: WeightStream, version: int) -> list[Receipt]:
        self.publications += 1
        own = self.model.state_dict()
        kept = {name: own[name].clone() for name in self.deaf}
        receipts = super().update_weights(stream, version)
        for name, tensor in kept.items():
            own[name].copy_(tensor)
        return receipts


def trainer_of(kind: str) -> LocalEngine:
    model = model_of(kind)
    model.set_attn_implementation(ATTENTION)
    return LocalEngine(model, OptimSection(), total_steps=1, tokens_per_microbatch=2048)


def publisher_of(
    kind: str,
    rollout: Replica | None = None,
    on_the_way: Callable[[WeightStream], WeightStream] = lambda s: s,
    **how: int,
) -> Publisher:
    trainer, others = trainer_of(kind), list[Result]()
    canary = Canary(
        trainer=trainer,
        rollout=rollout or Replica(kind),
        tokens=ordinary_tokens(tokenizer()),
        room=CONTEXT,
        keep=others.extend,
    )
    return Publisher(canary, lambda whole: on_the_way(stream_of(trainer.model)), **how)


def step(publisher: Publisher) -> None:
    """What an optimizer step does, roughly."""
    generator = torch.Generator().manual_seed(publisher.count)
    with torch.no_grad():
        for weight in publisher.canary.trainer.model.parameters():
            weight += 0.01 * torch.randn(weight.shape, generator=generator)


@pytest.mark.parametrize("kind", KINDS)
def test_the_drill_sees_every_single_tensor_that_stayed_behind(kind: str) -> None:
    """Each in turn: it alone has its true value in the engine, all others the changed one."""
    publisher = publisher_of(kind)
    canary, trainer = publisher.canary, publisher.canary.trainer
    true = {n: t.detach().clone() for n, t in trainer.published().items()}
    trainer.perturb()
    publisher.send(0)
    assert canary.gap(canary.ask(0)).largest < 1e-4
    own, seen = canary.rollout.model.state_dict(), {}
    for name, tensor in true.items():
        changed = own[name].clone()
        own[name].copy_(tensor)
        seen[name] = canary.gap(canary.ask(0)).largest
        own[name].copy_(changed)
    assert len(seen) > 20 and min(seen.values()) > 10 * canary.limit, min(seen.items(), key=lambda item: item[1])
    assert canary.gap(canary.ask(0)).largest < 1e-4


def test_the_drill_sees_every_single_expert_that_stayed_behind() -> None:
    publisher = publisher_of("qwen3_moe")
    canary, trainer = publisher.canary, publisher.canary.trainer
    true = {n: t.detach().clone() for n, t in trainer.published().items() if "experts" in n}
    trainer.perturb()
    publisher.send(0)
    own = canary.rollout.model.state_dict()
    for name, tensor in true.items():
        for expert in range(len(tensor)):
            changed = own[name][expert].clone()
            own[name][expert] = tensor[expert]
            assert not canary.near(canary.gap(canary.ask(0, range(PROMPTS)))), f"{name}: {expert}"
            own[name][expert] = changed


@pytest.mark.parametrize(
    ("kind", "dead"),
    [
        ("qwen2_tied", ["model.layers.0.self_attn.k_proj.bias"]),
        ("qwen3", ["lm_head.weight"]),
        ("qwen3_moe", ["model.layers.1.mlp.experts.down_proj", "model.layers.0.mlp.gate.weight"]),
    ],
)
def test_the_message_names_the_tensors_that_stayed_behind(kind: str, dead: list[str]) -> None:
    publisher = publisher_of(kind)
    before = {n: fingerprint(t) for n, t in publisher.canary.trainer.published().items()}
    publisher.canary.rollout.deaf = {*dead}
    with pytest.raises(WeightSyncError) as error:
        publisher.publish(7)
    text = str(error.value)
    assert re.match(
        r"with weights of version 7 the generation engine's log-probabilities are not the start-up drill's, in which "
        r"every tensor is changed: they differ by [\d.e-]+ at token \d+ of the response, by [\d.e-]+ on average; "
        r"allowed is 0.001 at most. It computes as if it had not taken ",
        text,
    )
    assert {*text.partition("not taken ")[2].split(", ")} == {*dead}
    assert before == {n: fingerprint(t) for n, t in publisher.canary.trainer.published().items()}, "not put back"


@pytest.mark.parametrize("kind", KINDS)
def test_publications_of_an_engine_that_does_right_pass_and_are_measured(kind: str) -> None:
    notes = []
    publisher = publisher_of(kind, read_back_every=2)
    publisher.note = lambda kind, text: notes.append((kind, text))
    found = [publisher.publish(0)]
    assert publisher.canary.rollout.publications == 2, "changed weights, then the true ones"
    for version in (1, 2, 3):
        step(publisher)
        found.append(publisher.publish(version))
    num_bytes = sum(t.nbytes for t in publisher.canary.trainer.model.state_dict().values())
    assert all(m["rollout_sync/bytes"] == num_bytes and m["rollout_sync/canary_max_diff"] < 1e-4 for m in found)
    assert [m.get("rollout_sync/read_back_tensors", 0) > 20 for m in found] == [True, False, True, False]
    assert [kind for kind, _ in notes] == ["weights"] and "tensors changed and computed with" in notes[0][1]


def test_a_trainer_whose_memory_the_engine_uses_has_nothing_to_check() -> None:
    trainer = trainer_of("qwen3")
    canary = Canary(
        trainer=trainer,
        rollout=InlineEngine(trainer.model, same_memory=True),
        tokens=[5],
        room=100,
        keep=lambda results: None,
    )
    publisher = Publisher(canary, lambda whole: trainer.stream_weights())
    before = {n: t._version for n, t in trainer.published().items()}
    assert publisher.publish(0) == {} and {n: t._version for n, t in trainer.published().items()} == before


# --- later publications ---


def test_a_tensor_that_is_no_more_taken_is_named_by_what_is_read_back() -> None:
    publisher = publisher_of("qwen3")
    publisher.publish(0)
    step(publisher)
    publisher.canary.rollout.deaf = {"model.layers.1.mlp.up_proj.weight"}
    with pytest.raises(
        WeightSyncError, match=r"other values than were published: model\.layers\.1\.mlp\.up_proj\.weight$"
    ):
        publisher.publish(1)


def test_reading_back_sees_what_a_canary_cannot() -> None:
    """A change of one step in one row, far below any tolerance."""
    publisher = publisher_of("qwen3", read_back_every=1)
    publisher.publish(0)
    with torch.no_grad():
        publisher.canary.trainer.model.model.norm.weight[3] += 1e-6
    publisher.canary.rollout.deaf = {"model.norm.weight"}
    with pytest.raises(WeightSyncError, match=r"read back at version 1, holds other values .* 1 tensors: model\.norm"):
        publisher.publish(1)


def test_tensors_that_an_engine_keeps_in_another_form_are_not_read_back() -> None:
    class Packed(Replica):
        def read_back(self, names: list[str]) -> dict[str, int]:
            return {name: value ^ ("gate_proj" in name) for name, value in super().read_back(names).items()}

    publisher = publisher_of("qwen3", Packed("qwen3"), read_back_every=1)
    first, second = publisher.publish(0), publisher.publish(1)
    assert first["rollout_sync/read_back_tensors"] - second["rollout_sync/read_back_tensors"] == 2


def test_a_cache_that_was_not_dropped_is_told_from_wrong_weights() -> None:
    """The engine answers what it has answered before from what it remembers."""

    class Remembering(Replica):
        def __init__(self) -> None:
            super().__init__("qwen3")
            self.remembered: dict[tuple[int, ...], list[float]] = {}

        def wait(self) -> list[Result]:
            asked = {job.handle: job.request.prompt_ids for job in [*self._waiting, *self._rows.jobs]}
            results = super().wait()
            return [replace(r, logps=self.remembered.setdefault(asked[r.handle], r.logps)) for r in results]

    publisher = publisher_of("qwen3", Remembering())
    with pytest.raises(WeightSyncError, match="its prefix cache holds keys and values of older weights"):
        publisher.publish(0)


@pytest.mark.parametrize("fault", ["old weights", "swapped", "truncated", "corrupted", "tied name dropped", "version"])
def test_faults_of_a_stream_are_told(fault: str) -> None:
    broken = False
    first: dict[str, Tensor] = {}

    def on_the_way(stream: WeightStream) -> WeightStream:
        tensors = stream.tensors
        if not broken:
            return stream
        left = dict(tensors)
        a, b = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"

        def arriving() -> Iterator[tuple[str, Tensor]]:
            for place, (name, tensor) in enumerate(left.items()):
                if fault == "truncated" and place == 9:
                    return
                if fault == "old weights":
                    tensor = first[name]
                    stream.published[name] = fingerprint(tensor)  # it is an old stream throughout
                if fault == "swapped":
                    tensor = left[{a: b, b: a}.get(name, name)]
                if fault == "corrupted" and name == a:
                    tensor = tensor.clone()
                    tensor[5, 6] += 1e-4
                if fault != "tied name dropped" or name != "lm_head.weight":
                    yield name, tensor

        stream.tensors = arriving()
        return stream

    class Old(Replica):
        def update_weights(self, stream: WeightStream, version: int) -> list[Receipt]:
            (receipt,) = super().update_weights(stream, version)
            return [replace(receipt, version=0) if broken and fault == "version" else receipt]

    publisher = publisher_of("qwen2_tied", Old("qwen2_tied"), on_the_way)
    first |= {n: t.clone() for n, t in publisher.canary.trainer.model.state_dict().items()}
    publisher.publish(0)
    step(publisher)
    broken = True
    says = {
        "old weights": r"version 1 .* log-probabilities are not the trainer's: they differ by .* at token",
        "swapped": r"2 tensors arrived with other values: model\.layers\.0\.mlp\.up_proj\.weight, model\.layers\.1",
        "truncated": r"\d+ tensors never arrived: ",
        "corrupted": r"1 tensors arrived with other values: model\.layers\.0\.mlp\.up_proj\.weight",
        "tied name dropped": r"1 tensors never arrived: lm_head\.weight",
        "version": "the engine reports version 0, published was 1",
    }
    with pytest.raises(WeightSyncError, match=says[fault]):
        publisher.publish(1)


# --- in between ---


def test_what_is_in_flight_is_not_lost_to_the_canary() -> None:
    publisher = publisher_of("qwen3")
    engine, kept = publisher.canary.rollout, list[Result]()
    publisher.canary.keep = kept.extend
    publisher.publish(0)
    handles = [
        engine.submit(Request((5, 6, 7), Sampling(length), NoiseKey(0, "train", length))) for length in (3, 5, 100)
    ]
    engine.interrupt()  # by a trajectory that has ended meanwhile: its `wait` may be the canary's
    publisher.publish(1)
    done = {r.handle: r for r in kept}
    while len(done) < 3:
        done |= {r.handle: r for r in engine.wait()}
    assert done.keys() == {*handles} and [len(done[h].token_ids) for h in handles] == [3, 5, 100]
    assert len(kept) >= 2, "the short ones ended beside the canary"


def test_prompts_are_of_ordinary_tokens_and_of_two_blocks_where_they_fit() -> None:
    ids = tokenizer()
    special, text = {*ids.all_special_ids}, ordinary_tokens(ids)
    assert special and not special & {*text} and {*text} <= {*range(VOCAB)}
    publisher = publisher_of("qwen3")
    canary = publisher.canary
    assert len(canary.prompt()) == 35 and {*canary.prompt()} <= {*text} and canary.prompt() != canary.prompt(1)
    canary.room = 30
    assert len(canary.prompt()) == 15
    assert len(publisher.publish(0)) and canary.ask(3)[0].prompt_ids == canary.prompt()


def test_bfloat16_is_held_against_what_it_rounds_to() -> None:
    """Its limit follows what was measured at the start; a layer that is not taken is far beyond it."""
    publisher = publisher_of("qwen3", InBfloat16("qwen3"))
    publisher.canary.exact, publisher.canary.limit = False, 0.25
    found = publisher.publish(0)
    assert 1e-4 < found["rollout_sync/canary_mean_diff"] < 0.05
    assert 0.05 <= publisher.canary.limit < 0.25
    step(publisher)
    publisher.canary.rollout.deaf = {n for n in publisher.canary.trainer.published() if "layers.0." in n}
    for _ in range(3):
        step(publisher)
    with pytest.raises(WeightSyncError, match="on average"):
        publisher.publish(1)


class InBfloat16(Replica):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.dtype, self.quick = torch.bfloat16, False


def test_when_both_sides_compute_in_float32() -> None:
    assert computes_exactly("cpu", "auto", "auto") and computes_exactly("cpu", "float32", "float32")
    assert not computes_exactly("cpu", "auto", "bfloat16") and not computes_exactly("cpu", "bfloat16", "auto")
