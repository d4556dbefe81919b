"""Peak memory of a rank against its share of parameters, gradients and AdamW's moments.

    OMP_NUM_THREADS=1 python benchmarks/fsdp_memory.py benchmarks/results/fsdp_memory.json

A Qwen3 of 98 million parameters is cut over 1 and 2 processes with FSDP2 on gloo, in float32 on CPUs. Rank 0 reads
the weights, the others get their parts. Two updates of two micro-batches of one short sequence, so that activations
are small; "share" is the bytes of parameters, gradients and moments over the number of processes. What is above a
share: one gathered layer, the gathered embeddings, and, where gradients are summed once for an update, all of them.
Memory is the process's own (resident set), above what it was before the model was made.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import Qwen3Config, Qwen3ForCausalLM

from hybridflow.batch import Batch
from hybridflow.config.sections.engine import Fsdp2Section
from hybridflow.config.sections.optim import OptimSection
from hybridflow.engines.fsdp.engine import ShardedEngine
from hybridflow.models.attention import ATTENTION
from hybridflow.protocols.training import Loss

from measuring import record

CONFIG: dict[str, Any] = {
    "vocab_size": 16_384,
    "hidden_size": 768,
    "intermediate_size": 2304,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 6,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
MB = 2**20


def memory(field: str) -> int:
    """Reads a line of the process's own status, in bytes: VmRSS, what it has now; VmHWM, the most since
    `forget_peak`.
    """
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure(rank: int, size: int, section: dict[str, Any], folder: str, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", size), rank=rank, world_size=size)
    warm = torch.ones(1)
    dist.all_reduce(warm)
    start = memory("VmRSS")
    forget_peak()
    with torch.device("cpu" if rank == 0 else "meta"):
        model = Qwen3ForCausalLM(Qwen3Config(**CONFIG))
    model.set_attn_implementation(ATTENTION)
    number = sum(p.numel() for p in model.parameters())
    engine = ShardedEngine(
        model,
        OptimSection(),
        section=Fsdp2Section(strategy="fsdp2", **section),
        total_steps=9,
        tokens_per_microbatch=64,
    )
    made = {"peak_while_made_mb": (memory("VmHWM") - start) / MB, "made_mb": (memory("VmRSS") - start) / MB}
    ids = torch.randint(CONFIG["vocab_size"], (2, 64), generator=torch.Generator().manual_seed(rank))
    batch = Batch.from_rows({"input_ids_T": list(ids), "loss_mask_T": [torch.arange(64) > 0] * 2})
    batch["policy_weight_T"] = torch.full((batch.total(),), 1 / (126 * size))
    engine.update(batch, Loss("cross_entropy"))
    forget_peak()
    engine.update(batch, Loss("cross_entropy"))
    peak, kept = memory("VmHWM") - start, memory("VmRSS") - start
    results.put((rank, number, made | {"peak_of_update_mb": peak / MB, "after_update_mb": kept / MB}))
    dist.barrier()
    dist.destroy_process_group()


def run(size: int, section: dict[str, Any]) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=measure, args=(r, size, section, folder, results)) for r in range(size)]
        for process in processes:
            process.start()
        found = sorted(results.get() for _ in processes)
        for process in processes:
            process.join()
    number = found[0][1]
    share = 16 * number / size / MB  # parameter, gradient, two moments: four bytes each
    ranks = [{key: round(value, 1) for key, value in values.items()} for _, _, values in found]
    above = max(values["peak_of_update_mb"] for values in ranks) - share
    return {
        "processes": size,
        "engine": section,
        "parameters": number,
        "share_mb": round(share, 1),
        "peak_over_share": round(1 + above / share, 3),
        "ranks": ranks,
    }


if __name__ == "__main__":
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 22)  # freed memory goes back to the system, and is not counted
    cases = [run(size, {"sync_every_microbatch": each}) for size in (1, 2) for each in (True, False)]
    for case in cases:
        print(case)
    command = f"OMP_NUM_THREADS=1 python {' '.join(sys.argv)}"
    Path(sys.argv[1]).write_text(json.dumps(record(command, {"model": CONFIG}, cases), indent=2) + "\n")
