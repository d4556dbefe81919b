"""The recipes in which a model acts, on fresh seeds: do they learn, every time?

    python benchmarks/agent_recipes.py calculator 100 103 benchmarks/results/calculator.json
    python benchmarks/agent_recipes.py grid 100 103 benchmarks/results/grid.json

Each seed has its own random weights, demonstrations, tasks, order and noise. The held-out tasks are the same for every
seed. A seed has one thread. Changes of the configuration of reinforcement learning may follow, such as
`rollout.engine=vllm`.
"""

from __future__ import annotations

import argparse
import json
import math
import runpy
import statistics
import tempfile
from pathlib import Path
from typing import Any

from measuring import record

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
HELD_OUT = {"calculator": 256, "grid": 117}
STUDENT_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # 97.5 %


def one_seed(recipe: str, seed: int, changes: list[str]) -> dict[str, Any]:
    """Runs a recipe with one seed; returns its results by algorithm."""
    with tempfile.TemporaryDirectory() as folder:
        if recipe == "calculator":
            run = runpy.run_path(str(RECIPES / "calculator/demo.py"))["run_calculator"]
            return {"seed": seed, "grpo": run(Path(folder), seed, changes=changes, live=False)}
        run = runpy.run_path(str(RECIPES / "grid/grid.py"))["run_grid"]
        found: dict[str, Any] = run(Path(folder), seed, changes=changes, live=False)
        return found


def gains(seeds: list[dict[str, Any]], algorithm: str) -> dict[str, Any]:
    """Returns the mean gain of an algorithm over the seeds, its 95 % interval (Student's t), and the smallest gain."""
    found = [seed[algorithm]["after"] - seed[algorithm]["before"] for seed in seeds]
    mean = statistics.fmean(found)
    half = STUDENT_T[len(found)] * statistics.stdev(found) / math.sqrt(len(found))
    return {"mean": mean, "low": mean - half, "high": mean + half, "smallest": min(found)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("recipe", choices=HELD_OUT)
    parser.add_argument("first", type=int, help="first seed")
    parser.add_argument("last", type=int, help="seed after the last")
    parser.add_argument("target", type=Path, help="JSON file to write")
    parser.add_argument("changes", nargs="*", help="of the configuration, as key=value")
    given = parser.parse_args()
    seeds = []
    for seed in range(given.first, given.last):
        seeds.append(one_seed(given.recipe, seed, given.changes))
        print(seeds[-1], flush=True)
    results = {a: gains(seeds, a) for a in ("gigpo", "grpo") if a in seeds[0]}
    words = [given.recipe, str(given.first), str(given.last), str(given.target), *given.changes]
    workload = {"recipe": given.recipe, "held_out_tasks": HELD_OUT[given.recipe], "changes": given.changes}
    command = " ".join(["python benchmarks/agent_recipes.py", *words])
    found = record(command, workload, {"gains": results, "seeds": seeds})
    given.target.write_text(json.dumps(found, indent=1) + "\n")
    for algorithm, gain in results.items():
        print(
            f"{algorithm}: {gain['mean']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}], least {gain['smallest']:+.3f}"
        )


if __name__ == "__main__":
    main()
