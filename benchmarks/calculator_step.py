"""The cost of a GRPO step of the calculator recipe on one thread, here and in TRL with the same tool.

    python benchmarks/calculator_step.py --peer TRL_PYTHON          # both sides in turn, with ratios

As `grpo_step.py`: every measurement is a process of its own, one at a time, in CPU seconds. The environment of the peer
imports this file too, so nothing at the top here needs more than the standard library.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from grpo_step import Meter, ratios, summary, time_steps
from measuring import record, run_alone

HERE = Path(__file__).resolve().parent
RECIPE = HERE.parent / "recipes/calculator"
PROMPTS_PER_STEP, SAMPLES, MAX_RESPONSE_TOKENS = 8, 8, 48
BETAS, LR = (0.9, 0.99), 1e-6  # so low that responses stay what the checkpoint makes them
WORKLOADS = {"warm-up": "sft/model", "trained": "grpo/model"}  # checkpoints of the recipe: few call, and all call


def describe(workload: str) -> dict[str, Any]:
    """Describes the workload for the record."""
    return {
        "name": workload,
        "prompts_per_step": PROMPTS_PER_STEP,
        "samples_per_prompt": SAMPLES,
        "max_response_tokens": MAX_RESPONSE_TOKENS,
        "temperature": 1.0,
        "updates_per_step": 1,
        "aggregation": "token-mean",
        "lr": LR,
        "betas": BETAS,
        "precision": "float32",
    }


def measure(model: Path, *, seed: int, warmup: int, steps: int, skip: bool) -> dict[str, Any]:
    """Measures a few training steps of the recipe; groups of equal rewards are trained on too, unless `skip`."""
    from hybridflow.config.kinds.rl import RlConfig
    from hybridflow.config.load import load_config
    from hybridflow.config.locate import load_function

    meter, function = Meter(), load_function(f"{RECIPE / 'task.py'}:score")

    def score(final: str, ground_truth: str) -> float:
        began = time.process_time()
        value = float(function(final, ground_truth))
        meter.reward_cpu += time.process_time() - began
        return value

    with tempfile.TemporaryDirectory() as folder:
        changes = [f"run.folder={folder}", f"run.seed={seed}", "run.device=cpu", f"model.path={model}"]
        changes += [f"train.steps={warmup + steps}", f"train.skip_zero_advantage={str(skip).lower()}"]
        changes += [f"optim.lr={LR}", "eval.every=0", "data.eval=null", "data.order=sequential", "checkpoint.every=0"]
        config = load_config(
            RECIPE / "grpo.yaml", [*changes, "track.console=false", "track.rollouts_every=0"], kind=RlConfig
        )
        time_steps(config, score, meter)
    return meter.results(warmup)


def make_models(folder: Path) -> None:
    """Runs the recipe once, for the checkpoints that both sides start from."""
    if not (folder / WORKLOADS["trained"] / "config.json").is_file():
        import runpy

        print(f"making the checkpoints in {folder}", flush=True)
        runpy.run_path(str(RECIPE / "demo.py"))["run_calculator"](folder, 0, live=False)


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Runs all measurements, rounds outside and sides inside; returns them and the ratios within each round."""
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {name: {} for name in WORKLOADS}
    versions: dict[str, str] = {}
    for turn in range(args.rounds):
        for name, place in WORKLOADS.items():
            common = [name, "--model", str(args.work / place), "--seed", str(turn)]
            common += ["--steps", str(args.steps), "--warmup", str(args.warmup)]
            sides = {
                "ours": [sys.executable, __file__, "--only", *common, "--train-all"],
                "ours, equal groups skipped": [sys.executable, __file__, "--only", *common],
                "trl": [args.peer, str(HERE / "peer_trl_tools.py"), *common],
            }
            for side, command in sides.items():
                found = run_alone(command)
                versions |= found["versions"]
                result = found["results"] | {"load_average": found["machine"]["load_average"][0]}
                runs[name].setdefault(side, []).append(result)
                print(f"round {turn + 1}  {name:9}  {summary(side, result)}", flush=True)
    results = {
        name: {"trl_over_ours": {s: ratios(found[s], found["trl"]) for s in found if s != "trl"}, "runs": found}
        for name, found in runs.items()
    }
    return {"versions": versions, "results": results}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--peer", help="Python of an environment with TRL")
    parser.add_argument("--rounds", type=int, default=3, help="how often each side is measured")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of a measurement")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--work", type=Path, default=Path("runs/calculator_step"), help="where checkpoints are made")
    parser.add_argument("--out", type=Path, default=HERE / "results/calculator_step.json")
    parser.add_argument("--only", choices=WORKLOADS, help="measure this library once, in this process")
    parser.add_argument("--model", type=Path, help="with --only: the checkpoint")
    parser.add_argument("--seed", type=int, default=0, help="with --only: of the run")
    parser.add_argument("--train-all", action="store_true", help="with --only: train on groups of equal reward too")
    args = parser.parse_args()
    if args.only:
        results = measure(args.model, seed=args.seed, warmup=args.warmup, steps=args.steps, skip=not args.train_all)
        written = record(f"python benchmarks/calculator_step.py --only {args.only}", describe(args.only), results)
        print(summary("ours", results))
    else:
        if not args.peer:
            parser.error("give --peer, the Python of an environment with TRL")
        make_models(args.work)
        found = compare(args)
        command = "python benchmarks/calculator_step.py --peer TRL_PYTHON"
        command += f" --rounds {args.rounds} --steps {args.steps} --warmup {args.warmup}"
        written = record(command, [describe(name) for name in WORKLOADS], found["results"])
        written["versions"] |= found["versions"]
        for name, result in found["results"].items():
            for side, ratio in result["trl_over_ours"].items():
                print(f"TRL / {side}, {name}: " + ", ".join(f"{m} {x['median']:.2f}" for m, x in ratio.items()))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
