"""Model-FLOPs utilisation of training on a CPU: a 41 M model against this machine's own matrix products.

    python benchmarks/train_mfu.py

The model is a Qwen3 of 41.6 M parameters (hidden 512, 8 layers, tied vocabulary of 32,000), a step takes 1,024 tokens
of 2 sequences, float32, forward and backward and AdamW. FLOPs are 6 N for each token, N being all parameters once (the
tied embedding is the output layer's product); attention is left out, as is usual where it is below 5 %. The peak is a
2,048-cube product of matrices in the same process, measured around every reading: the clock of a shared machine moves.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

import hybridflow.models.load  # noqa: F401  (registers the ragged attention)
from hybridflow.algorithms.aggregation import token_weights
from hybridflow.batch import Batch
from hybridflow.config.sections.optim import OptimSection
from hybridflow.engines.local import LocalEngine
from hybridflow.models.attention import ATTENTION
from hybridflow.protocols.training import Loss

from measuring import record

HERE = Path(__file__).resolve().parent
SHAPE = {
    "vocab_size": 32_000, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "tie_word_embeddings": True,
}  # fmt: skip
LENGTHS = (512, 512)


def matmul_flops(seconds: float = 1.0, size: int = 2048) -> float:
    """Measures FLOPs per CPU second of a float32 matrix product."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    a @ b
    began, count = time.process_time(), 0
    while time.process_time() - began < seconds:
        a @ b
        count += 1
    return 2 * size**3 * count / (time.process_time() - began)


def make_model(attention: str) -> Qwen3ForCausalLM:
    """Makes the model, with random weights."""
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**SHAPE, max_position_embeddings=1024))
    model.set_attn_implementation(attention)
    return model


def ours() -> Callable[[], None]:
    """Makes a training step of the local engine."""
    engine = LocalEngine(make_model(ATTENTION), OptimSection(lr=1e-4), total_steps=100, tokens_per_microbatch=4096)
    batch = Batch.from_rows(
        {
            "input_ids_T": [torch.randint(SHAPE["vocab_size"], (n,)).tolist() for n in LENGTHS],
            "loss_mask_T": [[False] + [True] * (n - 1) for n in LENGTHS],
            "trajectory_B": list(range(len(LENGTHS))),
        }
    )
    batch["policy_weight_T"] = token_weights(batch, "token-mean", norm=1)

    def step() -> None:
        assert engine.update(batch, Loss("cross_entropy")).applied

    return step


def plain() -> Callable[[], None]:
    """Makes the same step written with transformers alone: padded (here without padding), full logits."""
    model = make_model("sdpa").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(SHAPE["vocab_size"], (len(LENGTHS), LENGTHS[0]))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="steps of a reading")
    parser.add_argument("--out", type=Path, default=HERE / "results/train_mfu.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    parameters = sum(p.numel() for p in make_model("sdpa").parameters())
    flops = 6 * parameters * sum(LENGTHS)
    sides = {"ours": ours(), "transformers": plain()}
    for step in sides.values():
        step()
    found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for _ in range(args.rounds):
        for side, step in sides.items():
            before, began = matmul_flops(), time.process_time()
            for _ in range(args.steps):
                step()
            rate = flops * args.steps / (time.process_time() - began)
            peak = (before + matmul_flops()) / 2
            found[side].append({"gflop_per_cpu_s": rate / 1e9, "peak_gflop_per_cpu_s": peak / 1e9, "mfu": rate / peak})
    results: dict[str, Any] = {"parameters": parameters, "readings": found}
    for side, readings in found.items():
        results[side] = {key: statistics.median(r[key] for r in readings) for key in readings[0]}
        results[side]["tokens_per_cpu_s"] = results[side]["gflop_per_cpu_s"] * 1e9 / (6 * parameters)
        print(side, {key: round(value, 3) for key, value in results[side].items()})
    command = f"python benchmarks/train_mfu.py --rounds {args.rounds} --steps {args.steps}"
    args.out.write_text(json.dumps(record(command, {"model": SHAPE, "lengths": LENGTHS}, results), indent=1) + "\n")


if __name__ == "__main__":
    main()
