"""Fingerprints notice every change, and a receipt that does not fit its stream is refused by name."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hybridflow.protocols.weights import Receipt, WeightStream
from hybridflow.weights.stream import WeightSyncError, fingerprint, receive, stream_of, verify, weight_names

from tiny import packed_model

values = st.lists(st.floats(-1e3, 1e3, width=16), min_size=1, max_size=40)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])


@given(values, dtypes, st.data())
def test_any_single_changed_element_changes_the_fingerprint(
    numbers: list[float], dtype: torch.dtype, data: st.DataObject
) -> None:
    tensor = torch.tensor(numbers).to(dtype)
    place = data.draw(st.integers(0, len(numbers) - 1))
    flipped = tensor.clone()
    bits = flipped.view({8: torch.int64, 4: torch.int32, 2: torch.int16}[tensor.element_size()])
    bits[place] ^= 1 << data.draw(st.integers(0, 8 * tensor.element_size() - 2))
    assert fingerprint(flipped) != fingerprint(tensor)
    assert fingerprint(tensor.clone()) == fingerprint(tensor)


@given(values, dtypes, st.data())
def test_swapping_or_dropping_changes_the_fingerprint(
    numbers: list[float], dtype: torch.dtype, data: st.DataObject
) -> None:
    tensor = torch.tensor(numbers).to(dtype)
    i, j = (data.draw(st.integers(0, len(numbers) - 1)) for _ in range(2))
    swapped = tensor.clone()
    swapped[i], swapped[j] = tensor[j].clone(), tensor[i].clone()
    same = torch.equal(swapped.view(torch.uint8), tensor.view(torch.uint8))  # 0 and -0 are equal numbers
    assert (fingerprint(swapped) == fingerprint(tensor)) == same
    dropped = torch.cat([tensor[:i], tensor[i + 1 :]])
    assert fingerprint(dropped) != fingerprint(tensor)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64, torch.bool, torch.float32])
def test_lengths_of_equal_values_differ(dtype: torch.dtype) -> None:
    """All-ones bit patterns are the ones that a plain sum would lose."""
    prints = {fingerprint(torch.full((n,), value).to(dtype)) for n in range(1, 40) for value in (-1, 0)}
    assert len(prints) == 39 * 2


def test_a_fingerprint_is_of_values_in_order_not_of_memory() -> None:
    matrix = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    assert fingerprint(matrix.t().contiguous().t()) == fingerprint(matrix)
    assert fingerprint(matrix.t()) != fingerprint(matrix)
    assert fingerprint(torch.nn.Parameter(matrix)) == fingerprint(matrix)
    assert isinstance(fingerprint(torch.tensor(3.0)), int)


@pytest.mark.parametrize("size", [40_000, 2_500_003])  # one level of sums, and two
def test_in_large_tensors_every_kind_of_change_is_noticed(size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(size, generator=generator)
    seen = {fingerprint(tensor)}
    for change in range(60):
        i, j = (int(x) for x in torch.randint(size, (2,), generator=generator))
        other = tensor.clone()
        if change % 4 == 0:
            other.view(torch.int32)[i] ^= 1 << change % 32
        elif change % 4 == 1:
            other[[i, j]] = tensor[[j, i]]
        elif change % 4 == 2:  # the signs of two values: sums modulo a power of two would lose such a pair
            other[[i, j]] = -tensor[[i, j]]
        else:
            other[min(i, j) :] = 0
        seen.add(fingerprint(other))
    seen |= {fingerprint(-tensor), fingerprint(tensor.roll(1)), fingerprint(tensor.roll(512)), fingerprint(tensor[1:])}
    assert len(seen) == 65


def test_a_fingerprint_is_what_its_definition_says() -> None:
    """Held against plain Python integers: other processors and GPUs must come to the same number."""
    tensor = torch.randn(20_000, generator=torch.Generator().manual_seed(1))
    noise = hashlib.shake_128(b"weights").digest(2048 * 16)
    multipliers = np.array([((x & 62) + 1) * (-1 if x >= 128 else 1) for x in noise], dtype=np.int64).reshape(2048, 16)
    data = np.frombuffer(tensor.numpy().tobytes(), dtype=np.int8)
    whole = len(data) // 2048 * 2048
    sums = data[:whole].reshape(-1, 2048).astype(np.int64) @ multipliers
    digest = hashlib.blake2b((20_000).to_bytes(8, "little") + data[whole:].tobytes(), digest_size=8)
    digest.update(sums.astype("<i4").tobytes())
    assert len(data) > 1 << 16 and fingerprint(tensor) == int.from_bytes(digest.digest(), "little")


def test_a_part_of_a_tensor_has_the_fingerprint_of_its_copy() -> None:
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        tensor = torch.randn(70_001, generator=torch.Generator().manual_seed(2)).to(dtype)
        assert fingerprint(tensor[3:]) == fingerprint(tensor[3:].clone())


def consumed() -> tuple[WeightStream, dict[str, int], dict[str, Tensor]]:
    stream = stream_of(packed_model())
    received: dict[str, int] = {}
    tensors = dict(receive(stream, received))
    return stream, received, tensors


def test_a_stream_holds_every_weight_under_every_name() -> None:
    model = packed_model()
    assert model.config.tie_word_embeddings
    stream, received, tensors = consumed()
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= stream.names
    assert stream.names == weight_names(model) == tensors.keys() == stream.published.keys() == received.keys()
    assert {n for n, _ in model.named_parameters()} <= stream.names
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensors[name], tensor) and not tensors[name].requires_grad


def test_a_complete_receipt_is_accepted() -> None:
    stream, received, tensors = consumed()
    verify(stream, Receipt(4, received, sum(t.nbytes for t in tensors.values())), 4)


def test_another_version_is_named() -> None:
    stream, received, _ = consumed()
    with pytest.raises(WeightSyncError, match="the engine reports version 3, published was 4"):
        verify(stream, Receipt(3, received, 0), 4)


def test_a_missing_tensor_is_named() -> None:
    stream, received, _ = consumed()
    del received["lm_head.weight"]
    with pytest.raises(WeightSyncError, match=r"1 tensors never arrived: lm_head\.weight"):
        verify(stream, Receipt(4, received, 0), 4)


def test_a_changed_tensor_is_named() -> None:
    stream, received, tensors = consumed()
    name = "model.layers.1.mlp.up_proj.weight"
    spoilt = tensors[name].clone()
    spoilt[3, 4] += 1e-3
    received[name] = fingerprint(spoilt)
    with pytest.raises(WeightSyncError, match=r"1 tensors arrived with other values: model\.layers\.1\.mlp\.up_proj"):
        verify(stream, Receipt(4, received, 0), 4)


def test_a_stream_that_was_not_consumed_is_no_success() -> None:
    stream = stream_of(packed_model())
    with pytest.raises(WeightSyncError, match="never arrived"):
        verify(stream, Receipt(1, {}, 0), 1)


def test_all_problems_are_told_together() -> None:
    stream, received, _ = consumed()
    del received["model.norm.weight"]
    received["lm_head.weight"] += 1
    with pytest.raises(WeightSyncError, match=r"version 1.*model\.norm\.weight.*lm_head\.weight"):
        verify(stream, Receipt(1, received, 0), 2)


def test_of_several_processes_those_are_named_that_have_something_else() -> None:
    stream, received, _ = consumed()
    lacking = {n: v for n, v in received.items() if n != "model.norm.weight"}
    receipts = [Receipt(2, received, 0), Receipt(2, lacking, 0), Receipt(1, received, 0), Receipt(1, lacking, 0)]
    verify(stream, receipts[:1], 2)
    with pytest.raises(WeightSyncError) as error:
        verify(stream, receipts, 2)
    assert str(error.value) == (
        "weights in the generation engine are not the trainer's: "
        "process 1, 3 of 4 (counted from 0): 1 tensors never arrived: model.norm.weight; "
        "process 2, 3 of 4 (counted from 0): the engine reports version 1, published was 2"
    )


def test_what_nobody_sent_is_no_success_either() -> None:
    stream, received, _ = consumed()
    with pytest.raises(WeightSyncError, match=r"1 tensors arrived and were not published: model\.layers\.9\.bias"):
        verify(stream, Receipt(1, received | {"model.layers.9.bias": 5}, 0), 1)
    del stream.published["model.norm.weight"]
    with pytest.raises(WeightSyncError, match=r"1 tensors arrived, and what left is unknown: model\.norm\.weight"):
        verify(stream, Receipt(1, received, 0), 1)
