"""Learning from preferences on fresh seeds: does the true preference rise, which no model was shown?

    python benchmarks/rlhf.py 1000 1003 benchmarks/results/rlhf.json

Each seed has its own random weights, corpus, preferences, data order and noise, and one thread. The true preference is
measured on the recipe's held-out animals, before and after PPO.
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

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes/rlhf"))
from rlhf import run_rlhf


def one_seed(seed: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        result = run_rlhf(Path(folder), seed, live=False)
    print(f"seed {seed}: {result['before']:.2f} -> {result['after']:.2f}", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("first", type=int, help="first seed")
    parser.add_argument("last", type=int, help="seed after the last")
    parser.add_argument("target", type=Path, help="JSON file to write")
    parser.add_argument("--jobs", type=int, default=2, help="seeds at a time")
    given = parser.parse_args()
    with ProcessPoolExecutor(given.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        results = list(pool.map(one_seed, range(given.first, given.last)))
    record = {
        "command": " ".join(["python", "benchmarks/rlhf.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "threads": 1},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "least_gain": min(r["after"] - r["before"] for r in results),
        "seeds": results,
    }
    given.target.parent.mkdir(parents=True, exist_ok=True)
    given.target.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
