"""The main job on fresh seeds: does reinforcement raise held-out accuracy, every time?

    python benchmarks/carry_seeds.py 1000 1010 benchmarks/results/carry_seeds.json
    python benchmarks/carry_seeds.py 3000 3003 benchmarks/results/carry_ppo.json --algorithm ppo

Each seed has its own random weights, demonstrations, problems, data order and noise. The held-out problems are the
fixed set of the recipe, which no training data contains. Each seed has one thread. ``--warm-ups FOLDER`` takes the
warm-up runs ``FOLDER/carry-sft-SEED`` of the recipe, done before, instead of repeating them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from hybridflow.errors import UserError

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes/carry"))
from demo import run_carry


def one_seed(seed: int, algorithm: str, warm_ups: Path | None) -> dict[str, Any]:
    warm_up = warm_ups and warm_ups / f"carry-sft-{seed}"
    with tempfile.TemporaryDirectory() as folder:
        try:
            result = run_carry(Path(folder), seed, algorithm=algorithm, warm_up=warm_up, live=False)
        except UserError as error:  # the gate: counts as a seed that gained nothing
            result = {"seed": seed, "before": 0.0, "after": 0.0, "error": error.what}
    gain = result["after"] - result["before"]
    print(f"seed {seed}: {result['before']:.1%} -> {result['after']:.1%}  ({gain:+.1%})", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("first", type=int, help="first seed")
    parser.add_argument("last", type=int, help="seed after the last")
    parser.add_argument("target", type=Path, help="JSON file to write")
    parser.add_argument("--algorithm", choices=["grpo", "ppo"], default="grpo", help="which recipe")
    parser.add_argument("--warm-ups", type=Path, help="folder with the runs carry-sft-SEED")
    parser.add_argument("--jobs", type=int, default=2, help="seeds at a time")
    given = parser.parse_args()
    target: Path = given.target
    seeds = range(given.first, given.last)
    with ProcessPoolExecutor(given.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(one_seed, seed, given.algorithm, given.warm_ups) for seed in seeds]
        results = [job.result() for job in jobs]
    gains = [r["after"] - r["before"] for r in results]
    record = {
        "command": " ".join(["python", "benchmarks/carry_seeds.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "threads": 1,
            "seeds_at_a_time": given.jobs,
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "seeds_gaining_50_points": sum(g >= 0.5 for g in gains),
        "seeds_ending_below_their_start": sum(g < 0 for g in gains),
        "seeds": results,
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{record['seeds_gaining_50_points']} of {len(results)} seeds gained 50 points or more; wrote {target}")


if __name__ == "__main__":
    main()
