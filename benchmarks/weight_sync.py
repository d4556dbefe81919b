"""What it costs to bring 200 MB of weights from two training processes to replicas, by each way.

    OMP_NUM_THREADS=1 python benchmarks/weight_sync.py benchmarks/results/weight_sync.json

Two processes hold the model in halves (FSDP2 on gloo), gather it tensor by tensor, and one of them sends. A replica
copies each tensor into its own memory. "one process" is the same without processes: a whole model, copied tensor by
tensor. Fingerprints are taken on both sides, as in a run. The first update is not counted: it connects the processes.
CPU seconds are of the busiest process of each kind, the least of the rounds; wall seconds stand beside them, and depend
on whether each process has a core.
"""

from __future__ import annotations

import json
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hybridflow.weights.stream import copy_weights, fingerprint, stream_of
from hybridflow.weights.transport import drain, open_receiver, open_sender

from measuring import record

LAYERS, SIZE, ROUNDS, BUCKET_MB = 50, 1024, 4, 32
BYTES = LAYERS * SIZE * SIZE * 4


def model() -> Any:
    return nn.Sequential(*[nn.Linear(SIZE, SIZE, bias=False) for _ in range(LAYERS)])


def timed(action: Callable[[], Any]) -> dict[str, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    action()
    return {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}


def train(rank: int, folder: str, kind: str, receivers: int, port: int) -> list[dict[str, float]]:
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/train", 2), rank=rank, world_size=2)
    actor, mesh = model(), init_device_mesh("cpu", (2,))
    for layer in actor:
        fully_shard(layer, mesh=mesh)
    sender = open_sender(kind, receivers, port=port, bucket_bytes=BUCKET_MB << 20, timeout=120) if rank == 0 else None  # type: ignore[arg-type]
    rounds = []
    for _ in range(ROUNDS):
        stream = stream_of(actor, fingerprints=rank == 0)
        rounds.append(timed(lambda: sender.send(stream) if sender else drain(stream)))  # noqa: B023
    return rounds


def generate(index: int, port: int) -> list[dict[str, float]]:
    receiver = open_receiver(f"127.0.0.1:{port}", index, timeout=120)
    own, rounds = model().state_dict(), []
    for _ in range(ROUNDS):
        rounds.append(timed(lambda: copy_weights(receiver.receive(), own)))
    return rounds


def worker(place: int, folder: str, kind: str, receivers: int, port: int) -> None:
    torch.set_num_threads(1)
    rounds = train(place, folder, kind, receivers, port) if place < 2 else generate(place - 2, port)
    Path(folder, f"{place}.json").write_text(json.dumps(rounds))
    if place < 2:
        dist.barrier()


def between_processes(kind: str, receivers: int) -> dict[str, float]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = int(s.getsockname()[1])
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(worker, (folder, kind, receivers, port), nprocs=2 + receivers)
        found = [json.loads(Path(folder, f"{place}.json").read_text())[1:] for place in range(2 + receivers)]
    walls = [r["wall_s"] for r in found[0]]
    send, take = (min(max(r["cpu_s"] for r in rows) for rows in zip(*part)) for part in (found[:2], found[2:]))
    return summary(min(walls), train_cpu_s=send, replica_cpu_s=take)


def summary(wall: float, **cpu: float) -> dict[str, float]:
    return {"wall_s": round(wall, 3), "GB_per_s": round(BYTES / wall / 1e9, 3)} | {
        k: round(v, 3) for k, v in cpu.items()
    }


def in_one_process() -> dict[str, float]:
    trained, own = model(), model().state_dict()
    rounds = [timed(lambda: copy_weights(stream_of(trained), own)) for _ in range(ROUNDS)][1:]
    return summary(min(r["wall_s"] for r in rounds), cpu_s=min(r["cpu_s"] for r in rounds))


def main() -> None:
    torch.set_num_threads(1)
    tensor = torch.randn(BYTES // 4)
    prints = [timed(lambda: fingerprint(tensor)) for _ in range(ROUNDS)]
    results: dict[str, Any] = {
        "fingerprint alone": summary(min(r["wall_s"] for r in prints), cpu_s=min(r["cpu_s"] for r in prints)),
        "one process": in_one_process(),
    }
    for kind in ("shared_memory", "broadcast"):
        for receivers in (1, 2):
            results[f"{kind}, {receivers} replica{'s' * (receivers > 1)}"] = between_processes(kind, receivers)
    workload = {
        "bytes": BYTES,
        "tensors": LAYERS,
        "training_processes": 2,
        "bucket_mb": BUCKET_MB,
        "rounds": ROUNDS - 1,
    }
    text = json.dumps(record("python benchmarks/weight_sync.py", workload, results), indent=2)
    print(text)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(text + "\n")


if __name__ == "__main__":
    main()
