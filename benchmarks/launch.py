"""From the command to the first trained step: a tiny model, its processes started in each possible way.

    OMP_NUM_THREADS=1 python benchmarks/launch.py --out benchmarks/results/launch.json

The clock starts when the command is given and stops when the first step's metrics are in the file; checks, imports and
the model's construction are in between. `train` generates a step too.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measuring import record

ROOT = Path(__file__).parents[1]
FSDP2 = ["engine.strategy=fsdp2"]
WAYS = {
    "one process": ([], []),
    "processes, 2": ([], ["placement.pools={all: 2}", *FSDP2]),
    "torchrun, 2": (["-m", "torch.distributed.run", "--nproc-per-node", "2"], FSDP2),
    "ray, 2": ([], ["placement.pools={all: 2}", "placement.backend=ray", *FSDP2]),
}
SMALL = {
    "sft": ["model.path=recipes/carry/task.py:tiny_qwen3", "train.steps=2"],
    "train": [
        "model.path=recipes/carry/task.py:tiny_qwen3", "train.steps=2", "train.prompts_per_step=4",
        "rollout.max_response_tokens=8", "eval.before_training=false", "eval.max_rows=4",
    ],
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = []
    for command, small in SMALL.items():
        for way, (launcher, overrides) in WAYS.items():
            seconds = [first_step(command, launcher, [*small, *overrides]) for _ in range(arguments.rounds)]
            rows.append({"command": command, "way": way, "seconds": statistics.median(seconds), "all": seconds})
            print(json.dumps(rows[-1]), flush=True)
    if arguments.out:
        result = record(shlex.join(["python", *sys.argv]), {"model": "recipes/carry/task.py:tiny_qwen3"}, rows)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def first_step(command: str, launcher: list[str], overrides: list[str]) -> float:
    recipe = {"sft": "sft", "train": "grpo"}[command]
    with tempfile.TemporaryDirectory() as folder:
        line = [sys.executable, *launcher, "-m", "hybridflow", command, f"recipes/carry/{recipe}.yaml"]
        line += [f"run.folder={folder}/run", "track.console=false", *overrides]
        began = time.perf_counter()
        process = subprocess.Popen(
            line, cwd=ROOT, env=os.environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        metrics = Path(folder) / "run/metrics.jsonl"
        while not (metrics.is_file() and '"step": 1,' in metrics.read_text()):
            if process.poll() is not None:
                sys.exit(f"{shlex.join(line)} failed:\n{process.communicate()[1][-4000:]}")
            time.sleep(0.02)
        seconds = time.perf_counter() - began
        process.communicate()
    return seconds


if __name__ == "__main__":
    main()
