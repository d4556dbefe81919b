"""The cost of bringing 200 MB of weights from two training processes to replicas, by each way.

    OMP_NUM_THREADS=1 python benchmarks/weight_sync.py benchmarks/results/weight_sync.json

Two processes hold the model in halves (FSDP2 on gloo), gather it tensor by tensor, and one of them sends. A replica
copies each tensor into its own memory. "one process" is the same without processes: a whole model, copied tensor by
tensor; "plain copy" copies the same bytes and does nothing else. Fingerprints are taken on both sides, as in a run.
Between rounds every weight moves by 1e-6, as AdamW moves it at that learning rate; "delta" sends what changed of that.
The first update is not counted: it connects the processes, and is whole. CPU seconds are of the busiest process of each
kind, the least of the rounds; wall seconds stand beside them, and depend on whether each process has a core. Memory is
what a process had at most above what it had after the first round: beside its two buckets, and the copy that a delta
keeps.

"patches" are of consecutive weights of the carry model under AdamW, published in two types: bytes of patches over bytes
of tensors.
"""

from __future__ import annotations

import json
import os
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

from hybridflow.algorithms.aggregation import token_weights
from hybridflow.config.sections.data import SftDataSection
from hybridflow.config.sections.optim import OptimSection
from hybridflow.data.sft import load_sft
from hybridflow.engines.local import LocalEngine
from hybridflow.models.load import load_model
from hybridflow.protocols.training import Loss
from hybridflow.weights.delta import patch_of
from hybridflow.weights.stream import copy_weights, fingerprint, stream_of
from hybridflow.weights.transport import drain, open_receiver, open_sender

from measuring import record

LAYERS, SIZE, ROUNDS, BUCKET_MB = 50, 1024, 4, 16
WORDS = LAYERS * SIZE * SIZE
CARRY = Path(__file__).resolve().parents[1] / "recipes/carry/task.py"
CASES = {  # kind, replicas, published as, delta
    "shared_memory, 1 replica": ("shared_memory", 1, "float32", False),
    "shared_memory, 2 replicas": ("shared_memory", 2, "float32", False),
    "broadcast, 1 replica": ("broadcast", 1, "float32", False),
    "broadcast, 2 replicas": ("broadcast", 2, "float32", False),
    "files, 1 replica": ("files", 1, "float32", False),
    "shared_memory, 1 replica, bfloat16": ("shared_memory", 1, "bfloat16", False),
    "shared_memory, 1 replica, delta": ("shared_memory", 1, "float32", True),
    "shared_memory, 1 replica, bfloat16, delta": ("shared_memory", 1, "bfloat16", True),
}


def memory(field: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def model() -> Any:
    return nn.Sequential(*[nn.Linear(SIZE, SIZE, bias=False) for _ in range(LAYERS)])


def timed(action: Callable[[], Any]) -> dict[str, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    action()
    return {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}


def train(rank: int, folder: str, case: str, port: int) -> list[dict[str, Any]]:
    kind, receivers, dtype, delta = CASES[case]
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/train", 2), rank=rank, world_size=2)
    actor, mesh = model(), init_device_mesh("cpu", (2,))
    for layer in actor:
        fully_shard(layer, mesh=mesh)
    how: Any = {"port": port, "bucket_bytes": BUCKET_MB << 20, "timeout": 120, "folder": folder, "delta": delta}
    sender = open_sender(kind, receivers, **how) if rank == 0 else None  # type: ignore[arg-type]

    def publish() -> int:
        stream = stream_of(actor, fingerprints=rank == 0, dtype=getattr(torch, dtype))
        return sender.send(stream) if sender else drain(stream) or 0

    def step() -> None:
        with torch.no_grad():
            for parameter in actor.parameters():
                own = parameter.to_local()  # type: ignore[attr-defined]
                own += 1e-6 * torch.randn(own.shape).sign()

    return measured(publish, step)


def generate(index: int, case: str, port: int) -> list[dict[str, Any]]:
    receiver = open_receiver(f"127.0.0.1:{port}", index, timeout=120)
    own = model().to(getattr(torch, CASES[case][2])).state_dict()
    return measured(lambda: copy_weights(receiver.receive(), own)[1], lambda: None)


def measured(action: Callable[[], int], step: Callable[[], None]) -> list[dict[str, Any]]:
    """Measures rounds of an action that returns its bytes, each after a step; memory is what all but the first took."""
    rounds: list[dict[str, Any]] = []
    before = 0
    for i in range(ROUNDS):
        step()
        if i == 1:
            before = memory("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")
        said: list[int] = []
        rounds.append(timed(lambda: said.append(action())) | {"bytes": said[0]})  # noqa: B023
    rounds[-1]["peak_mb"] = (memory("VmHWM") - before) / 2**20
    return rounds


def worker(place: int, folder: str, case: str, port: int) -> None:
    torch.set_num_threads(1)
    rounds = train(place, folder, case, port) if place < 2 else generate(place - 2, case, port)
    Path(folder, f"{place}.json").write_text(json.dumps(rounds))
    if place < 2:
        dist.barrier()


def between_processes(case: str) -> dict[str, float]:
    receivers = CASES[case][1]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = int(s.getsockname()[1])
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(worker, (folder, case, port), nprocs=2 + receivers)
        found = [json.loads(Path(folder, f"{place}.json").read_text())[1:] for place in range(2 + receivers)]
    walls = [r["wall_s"] for r in found[0]]
    send, take = (min(max(r["cpu_s"] for r in rows) for rows in zip(*part)) for part in (found[:2], found[2:]))
    size = WORDS * getattr(torch, CASES[case][2]).itemsize
    peaks = {"sender_peak_mb": found[0][-1]["peak_mb"], "replica_peak_mb": max(f[-1]["peak_mb"] for f in found[2:])}
    return summary(min(walls), size, train_cpu_s=send, replica_cpu_s=take, sent_MB=found[0][-1]["bytes"] / 1e6, **peaks)


def summary(wall: float, size: int, **more: float) -> dict[str, float]:
    return {"wall_s": round(wall, 3), "GB_per_s": round(size / wall / 1e9, 3)} | {
        k: round(v, 3) for k, v in more.items()
    }


def patches() -> dict[str, dict[str, float]]:
    """Measures patches of the carry model under AdamW, whose steps are as in a run, on demonstrations."""
    found: dict[str, dict[str, float]] = {}
    for lr in (1e-6, 1e-5, 1e-4):
        carry, tokenizer = load_model(f"{CARRY}:tiny_qwen3", seed=0)
        data = load_sft(SftDataSection(train=f"{CARRY}:demonstrations", max_tokens=64), tokenizer, seed=0)
        engine = LocalEngine(carry, OptimSection(lr=lr), total_steps=9, tokens_per_microbatch=4096)
        before = {n: t.clone() for n, t in carry.state_dict().items()}
        for step in range(8):
            batch = data.batch(list(range(32 * step, 32 * (step + 1))))
            batch["policy_weight_T"] = token_weights(batch, "token-mean", norm=1)
            if step == 7:
                before = {n: t.clone() for n, t in carry.state_dict().items()}
            engine.update(batch, Loss("cross_entropy"))
        for dtype in (torch.bfloat16, torch.float32):
            sizes = []
            for name, tensor in carry.state_dict().items():
                patch = patch_of(tensor.to(dtype), before[name].to(dtype, copy=True))
                sizes.append(tensor.to(dtype).nbytes if patch is None else patch.nbytes)
            whole = sum(t.numel() * dtype.itemsize for t in before.values())
            found.setdefault(str(dtype).removeprefix("torch."), {})[f"lr {lr:g}"] = round(sum(sizes) / whole, 4)
    return found


def least(action: Callable[[], Any], size: int = 4 * WORDS) -> dict[str, float]:
    rounds = [timed(action) for _ in range(ROUNDS)][1:]
    return summary(min(r["wall_s"] for r in rounds), size, cpu_s=min(r["cpu_s"] for r in rounds))


def in_one_process() -> dict[str, dict[str, float]]:
    trained, own = model(), model().state_dict()
    weights = trained.state_dict()

    def plain_copy() -> None:
        for name, tensor in weights.items():
            own[name].copy_(tensor)

    return {
        "plain copy": least(plain_copy),
        "fingerprint alone": least(lambda: [fingerprint(tensor) for tensor in weights.values()]),
        "one process": least(lambda: copy_weights(stream_of(trained), own)),
    }


def main() -> None:
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 16)  # freed memory goes back to the system, and is not counted
    torch.set_num_threads(1)
    results: dict[str, Any] = in_one_process() | {case: between_processes(case) for case in CASES}
    results["patches"] = patches()
    workload = {
        "words": WORDS,
        "tensors": LAYERS,
        "largest_tensor_mb": 4 * SIZE * SIZE / 2**20,
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
