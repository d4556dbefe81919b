"""What is packed into buckets comes out as it was, whatever the sizes; what is damaged on the way is named."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hybridflow.protocols.weights import Receipt, WeightStream
from hybridflow.weights.buckets import ALIGNMENT, Bucket, pack, unpack
from hybridflow.weights.stream import WeightSyncError, copy_weights, fingerprint, stream_of, verify

from tiny import packed_model

DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn]
tensors_of_any_size = st.lists(
    st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 9), max_size=3)), min_size=1, max_size=12
)


def through(stream: WeightStream, size: int, published: dict[str, int]) -> Iterator[tuple[str, Tensor]]:
    """The stream through one bucket of this size, its headers as text."""
    memory = torch.zeros(size, dtype=torch.uint8)
    arriving = ((Bucket.from_header(b.header()), memory) for b in pack(stream, lambda: memory))
    return unpack(arriving, published)


@given(tensors_of_any_size, st.integers(1, 20))
def test_any_tensors_survive_any_bucket(kinds: list[tuple[torch.dtype, list[int]]], size: int) -> None:
    rng = torch.Generator().manual_seed(0)
    sent = {f"t{i}": (4 * torch.randn(shape, generator=rng)).to(dtype) for i, (dtype, shape) in enumerate(kinds)}
    stream = WeightStream(iter(sent.items()), frozenset(sent))
    found = {name: tensor.clone() for name, tensor in through(stream, size * ALIGNMENT, {})}
    assert list(found) == list(sent)
    for name, tensor in sent.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert found[name].view(-1).view(torch.uint8).tolist() == tensor.view(-1).view(torch.uint8).tolist()


def test_buckets_are_full_and_only_what_is_larger_than_one_is_cut() -> None:
    model = packed_model()
    size = 8192
    memory = torch.zeros(size, dtype=torch.uint8)
    buckets = list(pack(stream_of(model), lambda: memory))
    assert all(b.used <= size for b in buckets) and len(buckets) > 3
    largest = {name: tensor.nbytes for name, tensor in model.state_dict().items()}
    cut = {e.name for b in buckets for e in b.entries if e.size < largest[e.name]}
    assert cut == {name for name, nbytes in largest.items() if nbytes > size}
    whole = sum(p.nbytes for p in model.parameters())  # tied weights lie in a bucket once, under both names
    assert sum(b.used for b in list(pack(stream_of(model), lambda: torch.zeros(1 << 20, dtype=torch.uint8)))) <= (
        whole + ALIGNMENT * len(largest)
    )


def test_a_view_of_a_bucket_is_only_good_until_the_next_tensor() -> None:
    """What the stream's contract says, and why vLLM's adapter copies."""
    names = {"a": torch.zeros(64), "b": torch.ones(64)}
    kept = [tensor for _, tensor in through(WeightStream(iter(names.items()), frozenset(names)), 256, {})]
    assert torch.equal(kept[0], names["b"])


@pytest.mark.parametrize("size", [4096, 1 << 20])
def test_a_flipped_bit_in_a_bucket_is_named(size: int) -> None:
    sender, receiver = packed_model(seed=0), packed_model(seed=1)
    stream = stream_of(sender)
    memory = torch.zeros(size, dtype=torch.uint8)

    def damaged() -> Iterator[tuple[Bucket, Tensor]]:
        for bucket in pack(stream, lambda: memory):
            for entry in bucket.entries:
                if entry.name == "model.layers.1.mlp.up_proj.weight" and entry.first == 0:
                    memory[entry.at + 77] ^= 4
            yield bucket, memory

    arrived = WeightStream(iter(()), stream.names)
    arrived.tensors = unpack(damaged(), arrived.published)
    received, num_bytes = copy_weights(arrived, receiver.state_dict())
    with pytest.raises(WeightSyncError, match=r"1 tensors arrived with other values: model\.layers\.1\.mlp\.up_proj"):
        verify(arrived, Receipt(3, received, num_bytes), 3)
    assert arrived.published == stream.published
    assert received["model.norm.weight"] == fingerprint(sender.state_dict()["model.norm.weight"])
