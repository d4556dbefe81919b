"""Patches restore every bit, whatever has changed; and streams of them are never laid over another base."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hybridflow.protocols.weights import Receipt, WeightStream
from hybridflow.weights import delta
from hybridflow.weights.delta import apply_patch, patch_of
from hybridflow.weights.stream import fingerprint, receive, stream_of, verify
from hybridflow.weights.transport import Receiver, Sender, open_receiver, open_sender

from tiny import packed_model

DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn]


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


@pytest.mark.parametrize("piece", [7, 64, 1 << 18])
@given(
    st.sampled_from(DTYPES),
    st.integers(1, 700),
    st.sampled_from([0.0, 0.003, 0.05, 0.3, 0.9, 1.0]),
    st.integers(0, 2**16),
)
def test_a_patch_makes_one_tensor_of_another_bit_for_bit(
    piece: int, dtype: torch.dtype, size: int, share: float, seed: int
) -> None:
    """Any share of bytes, of any word size, in few pieces and in many; what is no smaller is refused."""
    rng = torch.Generator().manual_seed(seed)
    width = dtype.itemsize
    high = 2 if dtype == torch.bool else 256
    old = torch.randint(high, (size * width,), generator=rng, dtype=torch.uint8)
    changed = torch.rand(size * width, generator=rng) < share
    new = torch.where(changed, torch.randint(high, old.shape, generator=rng, dtype=torch.uint8), old)
    sender, receiver, tensor = (x.clone().view(dtype) for x in (old, old, new))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(delta, "PIECE", piece)
        patch = patch_of(tensor, sender)
        if patch is None:
            return
        assert patch.nbytes < tensor.nbytes
        for _ in range(2):  # a second time changes nothing
            apply_patch(patch, receiver)
            assert torch.equal(bits(receiver), bits(tensor)) and torch.equal(bits(sender), bits(tensor))


@pytest.mark.parametrize(
    ("dtype", "rate", "most"),
    [(torch.bfloat16, 1e-6, 0.05), (torch.bfloat16, 1e-5, 0.25), (torch.float32, 1e-6, 0.6), (torch.float32, 1.0, 1.0)],
)
def test_a_step_of_a_small_learning_rate_is_a_small_patch(dtype: torch.dtype, rate: float, most: float) -> None:
    """Adam moves every weight by about its learning rate, whatever its size."""
    rng = torch.Generator().manual_seed(0)
    weights = 0.02 * torch.randn(500, 300, generator=rng)
    step = rate * torch.randn(weights.shape, generator=rng).sign()
    old, new = weights.to(dtype), (weights + step).to(dtype)
    held = old.clone()
    patch = patch_of(new, held)
    assert (patch is None) == (most == 1.0)
    if patch is not None:
        assert 0 < patch.nbytes < most * new.nbytes
        apply_patch(patch, old)
        assert torch.equal(old, new)


def publish(sender: Sender, receivers: list[Receiver], stream: WeightStream) -> tuple[int, list[dict[str, Tensor]]]:
    """Sends a stream; the bytes that travelled, and what every receiver got, held against what left."""

    def take(receiver: Receiver) -> dict[str, Tensor]:
        arrived, found = receiver.receive(), dict[str, int]()
        tensors = {name: tensor.clone() for name, tensor in receive(arrived, found)}
        verify(arrived, Receipt(1, found, 0), 1)
        return tensors

    with ThreadPoolExecutor(len(receivers)) as pool:
        taking = [pool.submit(take, receiver) for receiver in receivers]
        num_bytes = sender.send(stream)
        taken = [future.result() for future in taking]
    return num_bytes, taken


def test_a_stream_of_patches_is_small_and_exact_and_a_new_receiver_gets_all() -> None:
    sender = open_sender("shared_memory", 2, timeout=20, bucket_bytes=8192, delta=True)
    receivers = [open_receiver(sender.address, i, timeout=20) for i in range(2)]
    model = packed_model()
    whole = sum(p.nbytes for p in model.parameters())

    def nudged(number: int) -> WeightStream:
        """A few weights of every tensor change a little."""
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.view(-1)[number::97] *= 1.001
        return stream_of(model)

    def check(taken: list[dict[str, Tensor]]) -> None:
        for tensors in taken:
            assert all(torch.equal(tensors[name], value) for name, value in model.state_dict().items())
            assert tensors.keys() == model.state_dict().keys()

    sizes = []
    for number in range(3):
        num_bytes, taken = publish(sender, receivers, nudged(number))
        check(taken)
        sizes.append(num_bytes)
    assert sizes[0] == whole and max(sizes[1:]) < 0.15 * whole

    receivers[1] = open_receiver(sender.address, 1, timeout=20)  # its process was started again: it holds nothing
    num_bytes, taken = publish(sender, receivers, nudged(3))
    check(taken)
    assert num_bytes == whole
    num_bytes, taken = publish(sender, receivers, nudged(4))
    check(taken)
    assert num_bytes < 0.15 * whole


def test_after_a_stream_that_failed_nothing_is_patched() -> None:
    """The receiver has half of it: neither the old base nor the new one."""
    sender = open_sender("shared_memory", 1, timeout=20, bucket_bytes=8192, delta=True)
    receivers = [open_receiver(sender.address, 0, timeout=20)]
    model = packed_model()
    whole = sum(p.nbytes for p in model.parameters())
    publish(sender, receivers, stream_of(model))

    def give_up() -> None:
        stream = receivers[0].receive()
        for name, _ in stream.tensors:
            if name == "model.layers.0.mlp.up_proj.weight":
                break
        receivers[0].refuse("no more")

    changed = packed_model(seed=1)
    with ThreadPoolExecutor(1) as pool:
        taking = pool.submit(give_up)
        with pytest.raises(RuntimeError, match=r"receiver 0 of 1 \(counted from 0\) failed: no more"):
            sender.send(stream_of(changed))
        taking.result()
    num_bytes, (tensors,) = publish(sender, receivers, stream_of(changed))
    assert num_bytes == whole
    assert all(torch.equal(tensors[name], value) for name, value in changed.state_dict().items())


def test_tensors_of_another_shape_or_type_and_streams_of_other_names_travel_whole() -> None:
    sender = open_sender("shared_memory", 1, timeout=20, delta=True, bucket_bytes=8192)
    receivers = [open_receiver(sender.address, 0, timeout=20)]
    big = torch.arange(1000.0)
    streams = [
        {"a": big, "b": big + 1},
        {"a": big.view(10, 100), "b": (big + 1).double()},
        {"c": big},
        {"a": big.view(10, 100) + 0, "b": (big + 1).double(), "c": big + 0},
    ]
    sizes = []
    for tensors in streams:
        prints = {name: fingerprint(tensor) for name, tensor in tensors.items()}
        stream = WeightStream(iter(tensors.items()), frozenset(tensors), prints)
        num_bytes, (taken,) = publish(sender, receivers, stream)
        assert all(
            torch.equal(taken[name], tensors[name]) and taken[name].dtype == tensors[name].dtype for name in taken
        )
        sizes.append(num_bytes)
    assert sizes[:3] == [8000, 12000, 4000] and sizes[3] < 200
