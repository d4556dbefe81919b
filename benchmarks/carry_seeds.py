"""The main job on fresh seeds: does reinforcement raise held-out accuracy, every time?

    python benchmarks/carry_seeds.py 1000 1010 benchmarks/results/carry_seeds.json

Each seed has its own random weights, demonstrations, problems, data order and noise. The held-out problems are the
fixed set of the recipe, which no training data contains. Two seeds run at a time, each on one thread.
"""

from __future__ import annotations

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

JOBS = 2


def one_seed(seed: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        try:
            result = run_carry(Path(folder), seed, live=False)
        except UserError as error:  # the gate: counts as a seed that gained nothing
            result = {"seed": seed, "before": 0.0, "after": 0.0, "error": error.what}
    gain = result["after"] - result["before"]
    print(f"seed {seed}: {result['before']:.1%} -> {result['after']:.1%}  ({gain:+.1%})", flush=True)
    return result


def main() -> None:
    first, last, target = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    with ProcessPoolExecutor(JOBS, mp_context=multiprocessing.get_context("spawn")) as pool:
        results = list(pool.map(one_seed, range(first, last)))
    gains = [r["after"] - r["before"] for r in results]
    record = {
        "command": f"python benchmarks/carry_seeds.py {first} {last} {target}",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "threads": 1, "seeds_at_a_time": JOBS},
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
