"""Fine-tuning tokens per CPU second on mixed lengths, here and in TRL's SFTTrainer, on one thread.

    python benchmarks/sft_tokens.py --peer TRL_PYTHON         # both sides in turn, with ratios

The model is the carry recipe's (0.8 M parameters, random weights), a step takes 32 conversations of 26 to 128 tokens
(uniform, mean 77), float32, AdamW, loss on the response. TRL pads each batch to its longest row; its packing and
padding-free modes need flash attention, which a CPU lacks. Both sides tokenise, log nothing, and save nothing.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measuring import record, run_alone

HERE = Path(__file__).resolve().parent
TASK = HERE.parent / "recipes/carry/task.py"
SEQUENCES, SHORTEST, LONGEST = 32, 26, 128
PROMPT_TOKENS, CLOSING = 11, 1  # of "347+586=" in the recipe's template, and the response's end
WORKLOAD = {"sequences_per_update": SEQUENCES, "tokens": [SHORTEST, LONGEST], "lr": 1e-3, "precision": "float32"}


def conversations(seed: int = 0, count: int = 3_200) -> list[dict[str, Any]]:
    """Makes rows of random digits whose lengths, prompt and closing token included, are uniform."""
    rng = random.Random(f"sft-tokens-{seed}")
    rows = []
    for _ in range(count):
        length = rng.randint(SHORTEST, LONGEST) - PROMPT_TOKENS - CLOSING
        answer = "".join(rng.choices("0123456789", k=length))
        question = f"{rng.randint(100, 999)}+{rng.randint(100, 999)}="
        rows.append({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
    return rows


def results_of(cpu_s: list[float], tokens: list[int], losses: list[float], warmup: int) -> dict[str, Any]:
    """Computes means over the steps after the warm-up."""
    cpu, counted = sum(cpu_s[warmup:]), sum(tokens[warmup:])
    return {
        "tokens_per_cpu_s": counted / cpu,
        "cpu_s_per_step": statistics.fmean(cpu_s[warmup:]),
        "tokens_per_step": statistics.fmean(tokens[warmup:]),
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "timed_steps": len(cpu_s) - warmup,
    }


def measure(model: Path, *, seed: int, warmup: int, steps: int) -> dict[str, Any]:
    """Runs the moves of `trainers.sft.train_sft` with a clock between them."""
    from hybridflow.config.kinds.sft import SftConfig
    from hybridflow.config.load import validate
    from hybridflow.trainers.sft import next_batch, open_sft, update
    from hybridflow.trainers.sft import record as record_step

    cpu_s, tokens, losses = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        values = {
            "run": {"folder": folder, "seed": seed, "threads": 1, "device": "cpu"},
            "model": {"path": str(model)},
            "data": {"train": f"{Path(__file__).resolve()}:conversations", "max_tokens": LONGEST},
            "train": {"steps": warmup + steps, "sequences_per_update": SEQUENCES},
            "optim": {"lr": WORKLOAD["lr"]},
            "track": {"console": False},
        }
        with open_sft(validate(SftConfig, values)) as run:
            began = time.process_time()
            for step in run.steps():
                batch = next_batch(run)
                metrics = update(run, batch, step)
                record_step(run, step, batch, metrics)
                cpu_s.append(time.process_time() - began)
                tokens.append(batch.total())
                losses.append(metrics["train/loss"])
                began = time.process_time()
    return results_of(cpu_s, tokens, losses, warmup)


def make_model(folder: Path) -> Path:
    """Makes a folder of the recipe's model with random weights."""
    from hybridflow.config.locate import load_function

    model, tokenizer = load_function(f"{TASK}:tiny_qwen3")(seed=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--peer", help="Python of an environment with TRL; without it, this library alone is measured")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30, help="timed steps of a measurement")
    parser.add_argument("--warmup", type=int, default=5, help="steps before them")
    parser.add_argument("--only", type=Path, metavar="MODEL", help="measure this library once, in this process")
    parser.add_argument("--out", type=Path, default=HERE / "results/sft_tokens.json")
    args = parser.parse_args()
    if args.only:
        results: Any = measure(args.only, seed=0, warmup=args.warmup, steps=args.steps)
        args.out.write_text(json.dumps(record("python benchmarks/sft_tokens.py --only MODEL", WORKLOAD, results)))
        return
    runs: dict[str, list[dict[str, Any]]] = {}
    versions: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder) / "model")
        common = ["--steps", str(args.steps), "--warmup", str(args.warmup)]
        sides = {"ours": [sys.executable, __file__, "--only", str(model), *common]}
        if args.peer:
            sides["trl"] = [args.peer, str(HERE / "peer_trl_sft.py"), str(model), *common]
        for turn in range(args.rounds):
            for side, command in sides.items():
                found = run_alone(command)
                versions |= found["versions"]
                runs.setdefault(side, []).append(found["results"] | {"load": found["machine"]["load_average"][0]})
                speed, loss = found["results"]["tokens_per_cpu_s"], found["results"]["last_loss"]
                print(f"round {turn + 1}  {side:5} {speed:7.0f} tokens/CPU-s, last loss {loss:.3f}", flush=True)
    results = {"runs": runs}
    if args.peer:
        found = [o["tokens_per_cpu_s"] / t["tokens_per_cpu_s"] for o, t in zip(runs["ours"], runs["trl"])]
        results["ours_over_trl"] = {"median": statistics.median(found), "rounds": found}
        print(f"ours / TRL: {statistics.median(found):.2f} ({', '.join(f'{x:.2f}' for x in found)})")
    command = f"python benchmarks/sft_tokens.py{' --peer TRL_PYTHON' * bool(args.peer)} --rounds {args.rounds}"
    written = record(f"{command} --steps {args.steps} --warmup {args.warmup}", WORKLOAD, results)
    written["versions"] |= versions
    args.out.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
