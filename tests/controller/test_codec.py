"""Messages between processes."""

from __future__ import annotations

import threading
from multiprocessing import Pipe
from typing import Any

import pytest
import torch

from hybridflow.batch import Batch
from hybridflow.controller.codec import MessagePipe, count_bytes, decode, encode
from hybridflow.protocols.training import Loss, Update

from tiny import ragged_batch


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bool(torch.equal(a, b))
    return bool(a == b)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(5000),
        torch.randn(5000).bfloat16(),
        torch.arange(12).view(3, 4).T,
        torch.zeros(0, 3, dtype=torch.int32),
        torch.tensor(2.5),
        torch.tensor([True, False]),
        torch.randn(100, 100, requires_grad=True)[::2, 5:],
    ],
    ids=["long", "bfloat16", "transposed", "empty", "scalar", "bool", "a part, with gradient"],
)
def test_a_tensor_arrives_as_it_was(tensor: torch.Tensor) -> None:
    arrived = decode(encode({"x": tensor}))["x"]
    assert same(tensor, arrived)
    assert not arrived.requires_grad
    arrived.zero_()  # it can be written to


def test_a_batch_and_its_objects_arrive_as_they_were() -> None:
    batch = ragged_batch()
    batch["row"] = [{"question": str(i)} for i in range(len(batch))]
    arrived, loss = decode(encode((batch, Loss("ppo_clip", {"low": 0.2}))))
    assert loss == Loss("ppo_clip", {"low": 0.2})
    assert all(same(batch.columns[n], arrived.columns[n]) for n in batch)
    assert same(batch.offsets["T"], arrived.offsets["T"]) and list(arrived.columns) == list(batch.columns)


def test_a_long_column_is_not_copied_into_the_pickle() -> None:
    column = torch.arange(10**6)
    frames = encode([column, column])
    assert [memoryview(f).nbytes for f in frames[1:]] == [8 * 10**6]  # once, though it is there twice
    assert memoryview(frames[0]).nbytes < 1000
    column[0] = 77
    assert decode(frames)[0][0] == 77  # the message is the column's own memory until it is sent


def test_messages_of_any_size_go_both_ways_over_a_wire() -> None:
    ours, theirs = (MessagePipe(end) for end in Pipe())
    sent = {"x": torch.randn(3 * 10**6), "y": "text", "none": torch.zeros(0)}
    thread = threading.Thread(target=lambda: theirs.send(*encode(decode(theirs.receive()))))
    thread.start()
    ours.send(*encode(sent))
    back = decode(ours.receive())
    thread.join()
    assert all(same(sent[name], back[name]) for name in sent)
    theirs.close()
    with pytest.raises(EOFError):
        ours.receive()


def test_a_side_that_takes_nothing_is_not_waited_for_longer_than_patience() -> None:
    ends = Pipe()
    ours = MessagePipe(ends[0], patience=0.2)
    for message in (b"x" * 10**7, b"small"):
        with pytest.raises(TimeoutError, match="takes nothing"):
            ours.send(message)


def test_bytes_are_counted_by_class() -> None:
    batch = Batch.from_rows({"input_ids_T": [[1, 2, 3], [4]], "reward_B": [0.5, 1.0], "row": ["a", "b"]})
    assert count_bytes((batch, Loss("x"))) == {"scalar": 8, "token": 32, "other": 0}
    assert count_bytes({"logp_T": torch.zeros(4), "bare": torch.zeros(1)}) == {"scalar": 0, "token": 16, "other": 4}
    assert count_bytes([Update({"loss": 1.0})]) == {"scalar": 0, "token": 0, "other": 0}


@pytest.mark.parametrize(
    ("name", "shape"), [("hidden_TH", (2**13, 64)), ("pixels_TCX", (2**12, 3, 64)), ("logits_TV", (64, 2**15))]
)
def test_heavy_columns_are_refused_by_name(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(AssertionError, match=f"{name} of shape .* must not pass through the controller"):
        count_bytes([{name: torch.zeros(shape)}])
