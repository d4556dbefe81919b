"""Weights reach replicas in other processes, both ways; and what goes wrong on the way is told in words."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hybridflow.errors import UserError
from hybridflow.protocols.weights import Receipt, WeightStream
from hybridflow.weights.carriers import Kind
from hybridflow.weights.stream import WeightSyncError, receive, stream_of, verify
from hybridflow.weights.transport import Receiver, Sender, open_receiver, open_sender, pick_transport

from on_ranks import weights
from ranks import server_of_forks, shared_ranks
from tiny import packed_model

KINDS: list[Kind] = ["shared_memory", "broadcast", "files"]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def process(function: Callable[..., None], *args: Any) -> multiprocessing.process.BaseProcess:
    started = server_of_forks().Process(target=function, args=args, daemon=True)
    started.start()
    return started


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("bucket_bytes", "delta"), [(1024, False), (1 << 20, False), (1 << 20, True)])
def test_a_sharded_model_reaches_replicas_in_another_pool(
    kind: Kind, bucket_bytes: int, delta: bool, tmp_path: Path
) -> None:
    """Two ranks gather, one sends, two replicas receive, twice: buckets smaller than a tensor, larger than all."""
    port = free_port()
    with ThreadPoolExecutor(1) as pool:
        how = {"bucket_bytes": bucket_bytes, "folder": str(tmp_path), "delta": delta}
        sent = pool.submit(shared_ranks(2).run, weights.send, kind, port, 2, 2, **how)
        arrived = shared_ranks(2, "rollout").run(weights.receive_into_replica, f"127.0.0.1:{port}", 2)
    (rank0, rank1), model = sent.result(), packed_model("qwen3")
    whole = sum(p.nbytes for p in model.parameters())
    for update in range(2):
        num_bytes, published = rank0[update]
        assert published.keys() == model.state_dict().keys() and rank1[update] == (0, {})
        assert num_bytes >= whole or (delta and update)
        for replica in arrived:
            receipt, told = replica[update]
            assert receipt.received == published == told and receipt.version == update + 1
            # The controller, which saw no tensor, can hold the receipt against what was published, too.
            verify(WeightStream(iter(()), frozenset(published), published), receipt, update + 1)
            with pytest.raises(WeightSyncError, match="published was 9"):
                verify(WeightStream(iter(()), frozenset(published), published), receipt, 9)
    assert rank0[0][1]["model.norm.weight"] != rank0[1][1]["model.norm.weight"]
    assert no_shared_files() and not [*tmp_path.iterdir()]


def no_shared_files() -> bool:
    shared = Path("/dev/shm")
    return not shared.is_dir() or not [f for f in shared.iterdir() if "hybridflow" in f.name]


def pair(kind: Kind, folder: Path | None = None, timeout: float = 10, **how: Any) -> tuple[Sender, Receiver]:
    sender = open_sender(kind, 1, timeout=timeout, folder=str(folder), **how)
    return sender, open_receiver(sender.address, 0, timeout=timeout)


def received(receiver: Receiver) -> tuple[WeightStream, dict[str, int]]:
    stream, found = receiver.receive(), dict[str, int]()
    for _ in receive(stream, found):
        pass
    return stream, found


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_left_of_a_failed_stream_does_not_end_a_later_one(kind: Kind, tmp_path: Path) -> None:
    """A traceback keeps the first stream's generator, and it is collected in the middle of the second."""
    sender, receiver = pair(kind, tmp_path, bucket_bytes=1024)
    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(sender.send, stream_of(packed_model()))
        left = receiver.receive()
        next(iter(left.tensors))
        receiver.refuse("model.norm.weight is twice as long")
        with pytest.raises(WeightSyncError, match=r"receiver 0 of 1 .* failed: model\.norm\.weight is twice as long"):
            sent.result()
        stream = stream_of(packed_model())
        sent = pool.submit(sender.send, stream)
        arriving, found = receiver.receive(), dict[str, int]()
        for _ in receive(arriving, found):
            left.tensors.close()  # type: ignore[attr-defined]
        sent.result()
    assert found == stream.published and found.keys() == stream.names
    receiver.close()
    sender.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_dropped_tensor_is_named_where_it_is_missed(kind: Kind, tmp_path: Path) -> None:
    sender, receiver = pair(kind, tmp_path, bucket_bytes=4096)
    stream = stream_of(packed_model())
    tensors = stream.tensors
    stream.tensors = (pair for pair in tensors if pair[0] != "model.norm.weight")
    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(sender.send, stream)
        with pytest.raises(WeightSyncError, match=r"ended without 1 of its tensors: model\.norm\.weight"):
            received(receiver)
        sent.result()
    whole_stream_passes(sender, receiver)
    receiver.close()
    sender.close()


def test_adapters_alone_arrive_as_such() -> None:
    sender, receiver = pair("shared_memory")
    model = weights.with_adapters(packed_model())
    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(sender.send, stream_of(model, lora="adapters"))
        stream, found = received(receiver)
    assert stream.adapter == "default" and found == stream.published and all("lora_" in name for name in found)
    assert sent.result() == sum(p.nbytes for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_that_raises_is_told_to_its_receivers(kind: Kind, tmp_path: Path) -> None:
    sender, receiver = pair(kind, tmp_path, bucket_bytes=1024)
    stream = stream_of(packed_model())

    def raising(tensors: Any) -> Any:
        yield next(tensors)
        raise ValueError("no more")

    stream.tensors = raising(stream.tensors)
    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(sender.send, stream)
        with pytest.raises(WeightSyncError, match="stopped: no more"):
            received(receiver)
    with pytest.raises(ValueError, match="no more"):
        sent.result()
    whole_stream_passes(sender, receiver)


def whole_stream_passes(sender: Sender, receiver: Receiver) -> None:
    """The ends are good for a stream, whatever became of the last one."""
    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(sender.send, stream_of(packed_model(seed=1)))
        arrived, found = received(receiver)
        sent.result()
    verify(arrived, Receipt(1, found, 0), 1)
    assert found == consumed_prints(packed_model(seed=1))


def consumed_prints(model: Any) -> dict[str, int]:
    stream = stream_of(model)
    for _ in stream.tensors:
        pass
    return stream.published


@pytest.mark.parametrize("kind", KINDS)
def test_a_sender_that_is_killed_is_noticed_at_once_and_leaves_nothing(kind: Kind, tmp_path: Path) -> None:
    port = free_port()
    sender = process(weights.send_and_die, kind, port, 9, str(tmp_path))
    receiver = open_receiver(f"127.0.0.1:{port}", 0, timeout=60)
    begin = time.monotonic()
    with pytest.raises(WeightSyncError, match="the sender of weights went away in the middle"):
        received(receiver)
    sender.join(30)
    assert sender.exitcode == -9 and time.monotonic() - begin < 30, "the timeout of 60 s was waited for"
    assert no_shared_files()
    if kind == "files":
        assert [*tmp_path.iterdir()]  # nobody was there to remove them: the next sender does, and no other's
        (tmp_path / "mine.txt").write_text("")
        one, other = (open_sender("files", 1, folder=str(tmp_path)) for _ in range(2))
        assert len([*tmp_path.iterdir()]) == 3
        one.close(), other.close()
        assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("kind", KINDS[:2])
def test_a_receiver_that_is_killed_is_named_and_another_takes_its_place(kind: Kind, tmp_path: Path) -> None:
    sender = open_sender(kind, 1, bucket_bytes=2048, timeout=2, folder=str(tmp_path))
    receiver = process(weights.receive_and_die, sender.address, 9)
    host, _, port = sender.address.rpartition(":")
    dist.TCPStore(host, int(port), is_master=False).wait(["the process is up"], timedelta(seconds=60))
    begin = time.monotonic()
    with pytest.raises(WeightSyncError, match=r"weights did not reach receiver 0 of 1.*went away, or took nothing"):
        sender.send(stream_of(packed_model()))
    receiver.join(30)
    assert receiver.exitcode == -9 and time.monotonic() - begin < 20
    whole_stream_passes(sender, open_receiver(sender.address, 0, timeout=10))


@pytest.mark.parametrize("kind", KINDS)
def test_a_receiver_that_refuses_is_told_at_once(kind: Kind, tmp_path: Path) -> None:
    sender, receiver = pair(kind, tmp_path, timeout=60, bucket_bytes=2048)
    begin = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(sender.send, stream_of(packed_model()))
        stream = receiver.receive()
        next(stream.tensors)
        receiver.refuse("no memory is left")
        with pytest.raises(WeightSyncError, match=r"receiver 0 of 1 \(counted from 0\) failed: no memory is left"):
            sent.result()
        del stream
    whole_stream_passes(sender, receiver)
    assert time.monotonic() - begin < 30


def test_a_receiver_that_was_started_again_in_the_middle_ends_that_stream_and_takes_the_next() -> None:
    sender, receiver = pair("shared_memory", timeout=60, bucket_bytes=2048)
    begin = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        sent = pool.submit(sender.send, stream_of(packed_model()))
        stream = receiver.receive()
        next(stream.tensors)
        again = open_receiver(sender.address, 0, timeout=60)
        arriving = pool.submit(received, again)
        with pytest.raises(WeightSyncError, match=r"receiver 0 of 1 .* restarted in the middle of a stream"):
            sent.result()
        with pytest.raises(WeightSyncError, match="the sender of weights stopped"):
            arriving.result()
    whole_stream_passes(sender, again)
    assert time.monotonic() - begin < 30


def test_nobody_there_is_told() -> None:
    port = free_port()
    with pytest.raises(WeightSyncError, match=f"no sender of weights answers at 127.0.0.1:{port}"):
        open_receiver(f"127.0.0.1:{port}", 0, timeout=0.3)
    sender = open_sender("shared_memory", 2, timeout=0.2, bucket_bytes=2048)
    with pytest.raises(WeightSyncError, match="did not reach receiver 0, 1 of 2"):
        sender.send(stream_of(packed_model()))


def test_memory_that_is_out_of_reach_is_told_with_the_way_round() -> None:
    sender = open_sender("shared_memory", 1, timeout=5, bucket_bytes=2048)
    os.close(sender._carrier.fd)
    other = os.open("/dev/zero", os.O_RDWR)  # the number now stands for another file, as it would on another host
    with pytest.raises(UserError, match="cannot be reached from here") as error:
        open_receiver(sender.address, 0, timeout=5)
    assert error.value.fix == "set placement.transport=broadcast, or files"
    assert other == sender._carrier.fd


def test_folders_that_will_not_do_are_told(tmp_path: Path) -> None:
    for folder, says in [
        (None, "placement.folder is not set"),
        ("/nowhere", "there is no folder /nowhere"),
        ("/proc", "weights cannot be written to /proc"),
    ]:
        with pytest.raises(UserError, match=says) as error:
            open_sender("files", 1, folder=folder)
        assert error.value.fix.startswith("set placement.folder")
    sender = open_sender("files", 1, folder=str(tmp_path), timeout=5)
    elsewhere = tmp_path.rename(tmp_path.with_name("elsewhere"))  # as another host has another folder under that path
    tmp_path.mkdir()
    with pytest.raises(UserError, match=f"the folder {tmp_path} is not the one that weights are sent through"):
        open_receiver(sender.address, 0, timeout=5)
    assert len([*elsewhere.iterdir()]) == 1


def test_handles_of_gpu_memory_need_a_gpu() -> None:
    with pytest.raises(UserError, match="cuda_ipc, and the weights are in cpu memory"):
        open_sender("cuda_ipc", 1)
    with pytest.raises(UserError, match="the processes are on several hosts"):
        pick_transport("cuda_ipc", one_host=False)


def test_the_way_is_chosen_by_where_processes_are() -> None:
    assert pick_transport("auto", one_host=True) == "shared_memory" == pick_transport("shared_memory", one_host=True)
    assert pick_transport("auto", one_host=False) == "broadcast" == pick_transport("broadcast", one_host=True)
    assert pick_transport("files", one_host=False) == "files" == pick_transport("files", one_host=True)
    with pytest.raises(UserError, match="the processes are on several hosts"):
        pick_transport("shared_memory", one_host=False)


def test_the_memory_of_two_buckets_is_all_that_is_shared() -> None:
    """However large the stream: here 60 buckets' worth."""
    sender, receiver = pair("shared_memory", bucket_bytes=1024)
    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(sender.send, stream_of(packed_model()))
        _, found = received(receiver)
    assert sent.result() > 60 * 1024 and len(found) == len(packed_model().state_dict())
    assert os.fstat(sender._carrier.fd).st_size == 4096 + 2 * 1024
    assert torch.equal(sender._carrier._buckets[0], receiver._carrier._buckets[0])
