"""A GRPO recipe with its responses from each engine: it learns the same through all of them.

    .venv/bin/python benchmarks/carry_engines.py --python vllm=.venv-vllm/bin/python sglang=.venv-sglang/bin/python
    ... --recipe calculator --model runs/calculator-sft/model --out benchmarks/results/calculator_engines.json

Needs the recipe's warm-up (`hybridflow sft recipes/carry/sft.yaml`). In the calculator recipe a tool is called. Each
run is a process of its own, the command `hybridflow train`, in the environment of its engine, on one thread. Engines
have their own noise, so the same seed gives the same prompts in the same order but other responses. The result holds
held-out accuracy over the steps, the gap between sampler and trainer in the worst step, and wall seconds. Runs that are
in the result already are not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from hybridflow.tracking.jsonl import read_metrics

from measuring import record

HERE = Path(__file__).resolve().parent
SEEDS = {  # of each recipe, engine and mode: how many, from 0 on
    "carry": {"inline": 3, "vllm": 3, "sglang": 1},
    "calculator": {"inline": 1, "vllm": 1, "vllm/server": 1, "sglang/server": 1},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("runs/carry-sft/model"), help="the warm-up's model")
    parser.add_argument("--python", nargs="*", default=[], help="ENGINE=PYTHON: interpreters of engines' environments")
    parser.add_argument("--recipe", choices=SEEDS, default="carry")
    parser.add_argument("--only", nargs="*", help="engines")
    parser.add_argument("--set", nargs="*", default=[], dest="overrides", help="further settings of all runs")
    parser.add_argument("--out", type=Path, default=HERE / "results/carry_engines.json")
    args = parser.parse_args()
    pythons = dict(pair.split("=", 1) for pair in args.python)
    rows: list[dict[str, Any]] = json.loads(args.out.read_text())["results"] if args.out.exists() else []
    done = {(row["engine"], row["seed"]) for row in rows}
    for engine in args.only or SEEDS[args.recipe]:
        for seed in range(SEEDS[args.recipe][engine]):
            if (engine, seed) in done:
                continue
            python = pythons.get(engine.partition("/")[0], sys.executable)
            rows.append(one(args.recipe, engine, seed, python, args.model, args.overrides))
            print(json.dumps({name: value for name, value in rows[-1].items() if name != "curve"}), flush=True)
            command = "python benchmarks/carry_engines.py --python vllm=VLLM_PYTHON sglang=SGLANG_PYTHON"
            command += f" --recipe {args.recipe}" * (args.recipe != "carry")
            args.out.parent.mkdir(parents=True, exist_ok=True)
            recipe = f"recipes/{args.recipe}/grpo.yaml"
            written = record(command, {"recipe": recipe, "settings": args.overrides}, rows)
            args.out.write_text(json.dumps(written, indent=1) + "\n")


def one(recipe: str, engine: str, seed: int, python: str, model: Path, overrides: list[str]) -> dict[str, Any]:
    """Runs one seed with one engine from its start to its end."""
    single = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory() as folder:
        run, file = Path(folder) / "run", HERE.parent / f"recipes/{recipe}/grpo.yaml"
        settings = [f"run.folder={run}", f"run.seed={seed}", f"model.path={model.resolve()}", "track.console=false"]
        name, _, mode = engine.partition("/")
        settings += [f"rollout.engine={name}", *([f"rollout.mode={mode}"] if mode else [])]
        settings += ["track.rollouts_every=0", *overrides]
        began = time.perf_counter()
        ended = subprocess.run(
            [str(Path(python).absolute().with_name("hybridflow")), "train", str(file), *settings],
            env=os.environ | single,
            capture_output=True,
            text=True,
            check=False,
        )
        seconds = time.perf_counter() - began
        if ended.returncode:
            sys.exit(f"{engine}, seed {seed} failed:\n{ended.stdout[-2000:]}\n{ended.stderr[-4000:]}")
        metrics = read_metrics(run / "metrics.jsonl")
    accuracy = f"val-core/{recipe}/reward/mean@1"
    curve = [(m["step"], m[accuracy]) for m in metrics if accuracy in m]
    steps = [m for m in metrics if "timing_s/gen" in m]
    return {
        "engine": engine,
        "seed": seed,
        "before": curve[0][1],
        "after": curve[-1][1],
        "curve": curve,
        "largest_abs_logp_diff": max(m["mismatch/abs_logp_diff/max"] for m in steps if "mismatch/k3/total" in m),
        "largest_k3": max(m["mismatch/k3/total"] for m in steps if "mismatch/k3/total" in m),
        "seconds": round(seconds, 1),
        "seconds_per_step": {
            phase: sum(m[f"timing_s/{phase}"] for m in steps) / len(steps)
            for phase in ("gen", "update_weights", "step")
        },
    }


if __name__ == "__main__":
    main()
