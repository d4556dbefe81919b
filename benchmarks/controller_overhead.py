"""The cost of the controller: fine-tuning steps of a model cut over two processes, and the same loop written by hand.

    OMP_NUM_THREADS=1 python benchmarks/controller_overhead.py --out benchmarks/results/controller_overhead.json

By hand: two processes, `fully_shard` on the layers and the root of the same module, cross-entropy, clipping, AdamW;
each process has its sequences at hand. With the controller: one more process, which sends every step's sequences to two
workers and gets metrics back. "one process" is the same batch with one worker that holds the whole model.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from hybridflow.algorithms.aggregation import token_weights
from hybridflow.balance import balanced_ranks, sequence_costs
from hybridflow.batch import Batch
from hybridflow.config.sections.engine import Fsdp2Section, LocalSection
from hybridflow.config.sections.model import ModelSection
from hybridflow.config.sections.optim import OptimSection
from hybridflow.config.sections.placement import PlacementSection
from hybridflow.controller.open import open_cluster
from hybridflow.engines.scoring import TokenScorer
from hybridflow.models.load import load_model
from hybridflow.placing.group_engine import GroupEngine
from hybridflow.placing.role import Role
from hybridflow.placing.train_worker import EngineWorker
from hybridflow.protocols.training import Loss

from measuring import record, run_alone

SIZES = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
SEQUENCES, MEAN = 16, 96  # of a step: about a second for two processes of one thread each
OPTIM = OptimSection(lr=1e-4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=["hand", "controller", "one process"])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.side:
        result = measure(arguments.side, arguments.steps)
    else:
        command = [sys.executable, __file__, "--steps", str(arguments.steps), "--side"]
        sides = ("hand", "controller", "one process")
        rounds = [{side: run_alone([*command, side]) for side in sides} for _ in range(arguments.rounds)]
        overhead = [r["controller"]["seconds"] / r["hand"]["seconds"] - 1 for r in rounds]
        faster = [r["one process"]["seconds"] / r["controller"]["seconds"] for r in rounds]
        result = record(
            shlex.join(["python", *sys.argv]),
            {"model": SIZES, "sequences": SEQUENCES, "mean_length": MEAN, "steps": arguments.steps},
            {
                "rounds": rounds,
                "controller_overhead": statistics.median(overhead),
                "two_processes_are_faster_than_one_by": statistics.median(faster),
            },
        )
        print(f"a step by hand: {statistics.median(r['hand']['seconds'] for r in rounds):.3f} s")
        print(f"overhead of the controller: {100 * statistics.median(overhead):.1f} %  {overhead}")
        print(f"two processes of one thread instead of one: {statistics.median(faster):.2f} times as fast  {faster}")
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def measure(side: str, steps: int) -> dict[str, Any]:
    """Measures the median wall seconds of a step, without the first two."""
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        seconds = by_hand(folder, steps) if side == "hand" else controlled(folder, steps, 2 if side[0] == "c" else 1)
    return {"seconds": statistics.median(seconds[2:]), "all": seconds}


def make_model(folder: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(**SIZES)).save_pretrained(folder)
    words = Tokenizer(WordLevel({"<eos>": 0, "<unk>": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="<unk>").save_pretrained(folder)


def batch_of(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    lengths = torch.randint(MEAN // 2, MEAN * 3 // 2, (SEQUENCES,), generator=generator).tolist()
    ids = [torch.randint(2, SIZES["vocab_size"], (n,), generator=generator) for n in lengths]
    masks = [torch.arange(n) > 0 for n in lengths]
    batch = Batch.from_rows({"input_ids_T": ids, "loss_mask_T": masks, "trajectory_B": list(range(SEQUENCES))})
    batch["policy_weight_T"] = token_weights(batch, "token-mean", norm=1)
    return batch


def controlled(folder: str, steps: int, processes: int) -> list[float]:
    engine = Fsdp2Section(strategy="fsdp2") if processes > 1 else LocalSection()
    role = Role(
        name="actor",
        model=ModelSection(path=folder),
        engine=engine,
        optim=OPTIM,
        total_steps=steps,
        tokens_per_microbatch=8192,
        longest=1024,
        seed=0,
    )
    placement = PlacementSection(backend="processes", pools={"all": processes})
    seconds = []
    with open_cluster(placement, device="cpu") as cluster:
        group = cluster.group("actor", EngineWorker, "all", role, mesh={"dp": processes, "sp": 1})
        actor = GroupEngine(group)
        for step in range(steps):
            began = time.perf_counter()
            actor.update(batch_of(step), Loss("cross_entropy"))
            seconds.append(time.perf_counter() - began)
    return seconds


def by_hand(folder: str, steps: int) -> list[float]:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    out = Path(folder) / "seconds.json"
    torch.multiprocessing.spawn(_rank, (2, store.port, folder, steps, str(out)), nprocs=2)
    return json.loads(out.read_text())


def _rank(rank: int, size: int, port: int, folder: str, steps: int, out: str) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    model, _ = load_model(folder)
    root = TokenScorer(model.train())
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(root, reshard_after_forward=False)
    for module in [*model.model.layers, root]:
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    optimizer = torch.optim.AdamW(root.parameters(), lr=OPTIM.lr, betas=OPTIM.betas, weight_decay=0.0, fused=True)
    seconds = []
    for step in range(steps):
        began = time.perf_counter()
        batch = batch_of(step)
        part = batch.take(balanced_ranks(sequence_costs(batch.lengths().tolist()), size)[rank])
        index_M, scores = root(part, ("logp",), 1.0)
        loss = -(scores["logp"] * part["policy_weight_T"][index_M]).sum()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(root.parameters(), OPTIM.clip_grad_norm)
        assert isinstance(norm, DTensor)
        float(norm.full_tensor())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        total = loss.detach().clone()
        dist.all_reduce(total)
        seconds.append(time.perf_counter() - began)
    if rank == 0:
        Path(out).write_text(json.dumps(seconds))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
