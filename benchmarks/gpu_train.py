"""Training on one GPU: tokens a second, model-FLOPs utilisation and peak memory, for Qwen3 shapes with random weights.

    python benchmarks/gpu_train.py                              # 0.6B full and 4B LoRA, 16k and 64k tokens a step
    python benchmarks/gpu_train.py --shapes 4b --modes full --tokens 16384
    python benchmarks/gpu_train.py --shapes tiny --device cpu   # tries the script itself, without a GPU

Definition of the utilisation: (6 N + attention) FLOPs a token over the time of a whole optimizer step, against
989 TFLOP/s (dense bfloat16 of an H100 or H200). N counts the parameters that are multiplied with: all of them, a tied
embedding once. Attention, causal, over sequences of L tokens: 6 x layers x heads x head size x L for each token
(forward 2 x L, half of 4 x L, and twice that backward). LoRA is held to the same FLOPs, though it needs no gradient of
the frozen weights (about 4 N): `mfu_4n` says what it really computes.

Every reading is a process of its own. Running out of memory is a reading too: it is stored with its sizes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from measuring import record, run_alone

HERE = Path(__file__).resolve().parent
PEAK_FLOPS = 989e12
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True,
    },
    "0.6b": {
        "vocab_size": 151_936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
    },
    "4b": {
        "vocab_size": 151_936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
    },
}  # fmt: skip
READINGS = [("0.6b", "full"), ("4b", "lora")]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Takes one reading, in this process."""
    import torch

    from hybridflow.errors import UserError

    try:
        return train_steps(args)
    except (torch.OutOfMemoryError, UserError) as error:  # the second where a forward pass did not fit
        return {
            "out_of_memory": str(error).split(". ")[0],
            "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
            "what_to_change": "--checkpointing, fewer --microbatch tokens, LoRA, or a smaller shape",
        }


def train_steps(args: argparse.Namespace) -> dict[str, Any]:
    """Takes optimizer steps on random tokens in sequences of equal length; the first ones are not timed."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from hybridflow.algorithms.aggregation import token_weights
    from hybridflow.batch import Batch
    from hybridflow.config.sections.model import LoraSection
    from hybridflow.config.sections.optim import OptimSection
    from hybridflow.engines.local import LocalEngine
    from hybridflow.models.attention import ATTENTION
    from hybridflow.models.checkpointing import checkpoint_activations
    from hybridflow.models.load import load_model  # noqa: F401  (registers the attention)
    from hybridflow.models.lora import add_lora
    from hybridflow.protocols.training import Loss

    on_gpu, shape = args.device == "cuda", SHAPES[args.only]
    with torch.device(args.device):
        model = Qwen3ForCausalLM(Qwen3Config(**shape, max_position_embeddings=max(40_960, args.length)))
    model.set_attn_implementation(ATTENTION)
    if args.checkpointing:
        checkpoint_activations(model)
    parameters = sum(p.numel() for p in model.parameters())
    if args.mode == "lora":
        model = add_lora(model, LoraSection(rank=32, alpha=64), seed=0)
    engine = LocalEngine(
        model, OptimSection(lr=1e-5), total_steps=100, tokens_per_microbatch=args.microbatch, device=args.device
    )
    count = args.tokens // args.length
    ids = torch.randint(shape["vocab_size"], (count, args.length))
    batch = Batch.from_rows(
        {
            "input_ids_T": list(ids),
            "loss_mask_T": [torch.arange(args.length) > 0 for _ in range(count)],
            "trajectory_B": list(range(count)),
        }
    )
    batch["policy_weight_T"] = token_weights(batch, "token-mean", norm=1)
    seconds, losses = [], []
    for _ in range(args.warmup + args.steps):
        began = time.perf_counter()
        update = engine.update(batch, Loss("cross_entropy"))
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
        losses.append(update.metrics["actor/loss"])
    step = statistics.median(seconds[args.warmup :])
    width = shape["num_attention_heads"] * shape["head_dim"]
    attention = 6 * shape["num_hidden_layers"] * width * args.length
    rate = args.tokens / step
    return {
        "parameters": parameters,
        "step_s": step,
        "tokens_per_s": rate,
        "mfu": rate * (6 * parameters + attention) / PEAK_FLOPS,
        "mfu_4n": rate * (4 * parameters + attention) / PEAK_FLOPS if args.mode == "lora" else None,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None,
        "losses": losses,
        "seconds": seconds,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "cuda": torch.version.cuda,
    }


def in_words(result: dict[str, Any]) -> str:
    """Describes a reading in one line."""
    if "out_of_memory" in result:
        return f"{result['out_of_memory']} (peak {result['peak_gb']:.1f} GB); {result['what_to_change']}"
    peak = "" if result["peak_gb"] is None else f", peak {result['peak_gb']:.1f} GB"
    return f"{result['tokens_per_s']:,.0f} tokens/s, MFU {result['mfu']:.1%}{peak}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="default: 0.6b full and 4b LoRA")
    parser.add_argument("--modes", nargs="+", choices=["full", "lora"], default=["full", "lora"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[16_384, 65_536], help="tokens of an optimizer step")
    parser.add_argument("--length", type=int, default=2_048, help="tokens of a sequence")
    parser.add_argument("--microbatch", type=int, default=16_384, help="tokens of a forward pass")
    parser.add_argument("--checkpointing", action="store_true", help="activation checkpointing")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--only", choices=SHAPES, help="one reading in this process")
    parser.add_argument("--mode", choices=["full", "lora"], default="full", help="with --only")
    parser.add_argument("--out", type=Path, default=HERE / "results/gpu_train.json")
    args = parser.parse_args()
    extra = ["--checkpointing"] if args.checkpointing else []
    sizes = ["--length", args.length, "--microbatch", args.microbatch, "--steps", args.steps, "--warmup", args.warmup]
    common = [*map(str, sizes), "--device", args.device, *extra]
    if args.only:
        args.tokens = args.tokens[0]
        written = record(
            f"python benchmarks/gpu_train.py --only {args.only}", vars(args) | {"out": None}, measure(args)
        )
    else:
        pairs = [(s, m) for s in args.shapes for m in args.modes] if args.shapes else READINGS
        readings = []
        for shape, mode in pairs:
            for tokens in args.tokens:
                command = [sys.executable, __file__, "--only", shape, "--mode", mode, "--tokens", str(tokens), *common]
                found = run_alone(command)
                result = {"shape": shape, "mode": mode, "tokens": tokens} | found["results"]
                readings.append(result)
                print(f"{shape} {mode} {tokens} tokens: {in_words(result)}", flush=True)
        shown = " ".join(["--length", str(args.length), "--microbatch", str(args.microbatch), *extra])
        written = record(f"python benchmarks/gpu_train.py {shown}", {"peak_flops": PEAK_FLOPS}, readings)
    args.out.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
