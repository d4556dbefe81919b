"""The main job on fresh seeds: does reinforcement raise held-out accuracy, every time?

    python benchmarks/carry_seeds.py 1000 1010 benchmarks/results/carry_seeds.json

Each seed has its own random weights, demonstrations, problems, data order and noise. The held-out problems are the
fixed set of the recipe, which no training data contains.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers

from hybridflow.errors import UserError

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes/carry"))
from demo import run_carry


def main() -> None:
    first, last, target = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    results = []
    for seed in range(first, last):
        with tempfile.TemporaryDirectory() as folder:
            try:
                results.append(run_carry(Path(folder), seed, live=False))
            except UserError as error:  # the gate: counts as a seed that gained nothing
                results.append({"seed": seed, "before": 0.0, "after": 0.0, "error": error.what})
        gain = results[-1]["after"] - results[-1]["before"]
        print(f"seed {seed}: {results[-1]['before']:.1%} -> {results[-1]['after']:.1%}  ({gain:+.1%})", flush=True)
    gains = [r["after"] - r["before"] for r in results]
    target.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "command": f"python benchmarks/carry_seeds.py {first} {last} {target}",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "threads": 1},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "seeds_gaining_50_points": sum(g >= 0.5 for g in gains),
        "seeds_ending_below_their_start": sum(g < 0 for g in gains),
        "seeds": results,
    }
    target.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{record['seeds_gaining_50_points']} of {len(results)} seeds gained 50 points or more; wrote {target}")


if __name__ == "__main__":
    main()
