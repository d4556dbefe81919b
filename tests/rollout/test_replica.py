"""A replica, which has weights of its own, answers as an engine on the trainer's memory does."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers.modeling_utils import PreTrainedModel

from hybridflow.noise import NoiseKey
from hybridflow.protocols.generation import Request, Result, Sampling, generate
from hybridflow.protocols.weights import WeightStream
from hybridflow.rollout.inline.engine import InlineEngine
from hybridflow.weights.buckets import Bucket, pack, unpack
from hybridflow.weights.stream import WeightSyncError, stream_of, verify

from on_ranks.weights import with_adapters
from tiny import VOCAB, packed_model


def requests(count: int = 12, seed: int = 0) -> list[Request]:
    rng = torch.Generator().manual_seed(seed)
    return [
        Request(
            tuple(torch.randint(VOCAB, (int(torch.randint(3, 20, (1,), generator=rng)),), generator=rng).tolist()),
            Sampling(16),
            NoiseKey(seed, "train", draw),
        )
        for draw in range(count)
    ]


def step(model: PreTrainedModel, seed: int) -> None:
    """Moves what is trained, as an optimizer step does."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=rng)


def through_buckets(stream: WeightStream, size: int = 2048) -> WeightStream:
    memory = torch.zeros(size, dtype=torch.uint8)
    arrived = WeightStream(iter(()), stream.names, adapter=stream.adapter)
    headers = ((Bucket.from_header(b.header()), memory) for b in pack(stream, lambda: memory))
    arrived.tensors = unpack(headers, arrived.published)
    return arrived


def answers(engine: InlineEngine, stream: WeightStream, version: int) -> list[Result]:
    verify(stream, engine.update_weights(stream, version), version)
    return generate(engine, requests())


def same(ours: list[Result], theirs: list[Result]) -> bool:
    return [(r.token_ids, r.logps, r.spans) for r in ours] == [(r.token_ids, r.logps, r.spans) for r in theirs]


@pytest.mark.parametrize("kind", ["qwen3", "qwen2", "qwen3_moe"])
def test_a_replica_generates_what_the_trainers_own_memory_does(kind: str) -> None:
    trained = packed_model(kind)
    own, replica = InlineEngine(trained), InlineEngine(packed_model(kind, seed=5))
    seen = []
    for version in (1, 2):
        step(trained, version)
        on_memory = answers(own, stream_of(trained, same_memory=True), version)
        assert same(answers(replica, through_buckets(stream_of(trained)), version), on_memory)
        seen.append([r.token_ids for r in on_memory])
    assert seen[0] != seen[1], "the weights of both updates answer alike: this proves nothing"


def test_adapters_alone_keep_a_replica_up_to_date() -> None:
    """All weights once, then adapters only."""
    trained = with_adapters(packed_model(), seed=1)
    own, replica = InlineEngine(trained), InlineEngine(with_adapters(packed_model(seed=5), seed=2))
    for version, lora in [(1, None), (2, "adapters"), (3, "adapters")]:
        step(trained, version)
        on_memory = answers(own, stream_of(trained, same_memory=True), version)
        stream = through_buckets(stream_of(trained, lora=lora))
        assert same(answers(replica, stream, version), on_memory)


def test_merged_adapters_keep_a_plain_replica_up_to_date() -> None:
    """On the quick path, which models with adapters do not have; sums are ordered otherwise, so logps are close."""
    trained = with_adapters(packed_model(), seed=1)
    own, replica = InlineEngine(trained), InlineEngine(packed_model(seed=5))
    assert replica.quick and not own.quick
    for version in (1, 2):
        step(trained, version)
        on_memory = answers(own, stream_of(trained, same_memory=True), version)
        merged = answers(replica, through_buckets(stream_of(trained, lora="merged")), version)
        assert [r.token_ids for r in merged] == [r.token_ids for r in on_memory]
        for ours, theirs in zip(merged, on_memory):
            assert ours.logps == pytest.approx(theirs.logps, abs=1e-4)


def test_a_stream_that_does_not_fit_the_replica_is_refused_by_name() -> None:
    replica = InlineEngine(packed_model(seed=5))
    with pytest.raises(WeightSyncError, match=r"published tensors that it lacks: .*\.lora_A\."):
        replica.update_weights(stream_of(with_adapters(packed_model()), lora="adapters"), 1)
    stream = stream_of(packed_model())
    stream.names = frozenset(n for n in stream.names if "_norm" not in n or "self_attn" not in n)
    with pytest.raises(WeightSyncError, match=r"4 tensors of its own that are not published: .*k_norm"):
        replica.update_weights(stream, 1)
    stream = stream_of(packed_model())
    tensors = stream.tensors
    stream.tensors = ((n, t[:-1] if n == "model.layers.1.mlp.down_proj.weight" else t) for n, t in tensors)
    with pytest.raises(WeightSyncError, match=r"down_proj\.weight arrives as \[31, 48\]; .* is \[32, 48\]"):
        replica.update_weights(stream, 1)
    stream = stream_of(packed_model())
    tensors = stream.tensors
    stream.tensors = (pair for pair in tensors if "down_proj" not in pair[0])
    with pytest.raises(WeightSyncError, match=r"2 tensors never arrived: model\.layers\.0\.mlp\.down_proj\.weight"):
        replica.update_weights(stream, 1)
    with pytest.raises(WeightSyncError, match=r"arrives as torch\.float32, .* keeps torch\.bfloat16"):
        InlineEngine(packed_model().to(torch.bfloat16)).update_weights(stream_of(packed_model()), 1)


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
def test_what_is_published_in_few_bits_is_verified_in_them(kept: torch.dtype) -> None:
    trained, replica = packed_model(), InlineEngine(packed_model(seed=5).to(kept))
    stream = stream_of(trained, dtype=torch.bfloat16)
    (receipt,) = replica.update_weights(stream, 1)
    verify(stream, receipt, 1)
    assert receipt.num_bytes == sum(2 * t.numel() for t in trained.state_dict().values())
    for name, tensor in replica.model.state_dict().items():
        assert torch.equal(tensor, trained.state_dict()[name].to(torch.bfloat16).to(kept))


def test_what_a_replica_generates_leaves_its_weights_alone() -> None:
    replica = InlineEngine(packed_model(seed=5))
    stream = stream_of(packed_model())
    verify(stream, replica.update_weights(stream, 1), 1)
    before = copy.deepcopy(replica.model.state_dict())
    generate(replica, requests())
    assert all(torch.equal(tensor, before[name]) for name, tensor in replica.model.state_dict().items())
