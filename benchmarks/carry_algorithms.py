"""Does every preset learn the main job? Held-out accuracy before and after 30 steps, from one warm-up.

    python benchmarks/carry_algorithms.py --warm-up runs/carry-sft/model

Each preset trains the same model on the same problems with the learning rate of the GRPO recipe, none tuned: 16
problems with 8 responses a step and two updates on them, so that ratios to the old policy differ from 1. The critics of
PPO and VAPO, the teacher of distillation (what GRPO made of the model) and the components of GDPO are added. One seed:
it shows that a preset works, not which one is better.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

from hybridflow.config.kinds.rl import RlConfig
from hybridflow.config.load import validate
from hybridflow.config.pieces.presets import PRESETS
from hybridflow.errors import UserError
from hybridflow.tracking.jsonl import read_metrics
from hybridflow.trainers.rl.loop import train

from measuring import record

HERE = Path(__file__).resolve().parent
TASK = HERE.parent / "recipes/carry/task.py"
STEPS = 30
CRITIC = {"critic": {"optim": {"lr": 1e-3, "betas": [0.9, 0.99]}, "epochs_per_step": 2, "warmup_steps": 3}}


def parts(response: str, ground_truth: str) -> dict[str, float]:
    """Returns the recipe's reward, and the share of right digits as a second component."""
    given = response.rpartition("#")[2].strip()
    digits = sum(a == b for a, b in zip(given, ground_truth)) / len(ground_truth)
    return {"score": float(given == ground_truth), "right": float(given == ground_truth), "digits": digits}


def configuration(preset: str, folder: Path, model: Path, teacher: Path) -> RlConfig:
    """Makes the configuration of a preset's run."""
    values: dict[str, Any] = {
        "run": {"folder": str(folder), "seed": 0, "threads": 1},
        "model": {"path": str(model)},
        "data": {"train": f"{TASK}:problems", "eval": f"{TASK}:held_out_problems", "max_prompt_tokens": 16},
        "reward": {"function": f"{TASK}:score"},
        "rollout": {"max_response_tokens": 32},
        "algorithm": {"preset": preset},
        "train": {"steps": STEPS, "prompts_per_step": 16, "samples_per_prompt": 8, "sequences_per_update": 64},
        "optim": {"lr": 1e-4, "betas": [0.9, 0.99], "warmup_steps": 10},
        "eval": {"every": 10},
        "track": {"console": False, "rollouts_every": 0},
    }
    if PRESETS[preset]["advantage"] in ("gae", "vapo_gae"):
        values |= CRITIC
    if preset == "distillation":
        values["model"]["reference"] = str(teacher)
    if preset == "gdpo":
        values["reward"]["function"] = f"{Path(__file__).resolve()}:parts"
    return validate(RlConfig, values)


def learned(preset: str, work: Path, model: Path) -> dict[str, Any]:
    """Returns the accuracies and CPU seconds of a preset's run."""
    began = time.process_time()
    folder = work / preset
    shutil.rmtree(folder, ignore_errors=True)
    try:
        train(configuration(preset, folder, model, work / "grpo/model"))
    except UserError as error:
        return {"error": error.what}
    lines = read_metrics(folder / "metrics.jsonl")
    curve = {m["step"]: m["val-core/carry/reward/mean@1"] for m in lines if "val-core/carry/reward/mean@1" in m}
    return {
        "before": curve[0],
        "after": curve[STEPS],
        "curve": curve,
        "cpu_seconds": time.process_time() - began,
        "clipped": max((m.get("actor/pg_clipfrac", 0.0) for m in lines), default=0.0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--warm-up", type=Path, required=True, help="model of the recipe's supervised warm-up")
    parser.add_argument("--work", type=Path, default=Path("runs/carry_algorithms"), help="where the runs are")
    parser.add_argument("--only", nargs="*", help="these presets")
    parser.add_argument("--out", type=Path, default=HERE / "results/carry_algorithms.json")
    given = parser.parse_args()
    results: dict[str, Any] = {}
    for preset in given.only or PRESETS:
        results[preset] = found = learned(preset, given.work, given.warm_up)
        told = found.get("error") or f"{found['before']:.1%} -> {found['after']:.1%}, {found['cpu_seconds']:.0f} CPU s"
        print(f"{preset:30} {told}", flush=True)
        workload = {"steps": STEPS, "answers_per_step": 128, "updates_per_step": 2}
        report = record(f"python benchmarks/carry_algorithms.py --warm-up {given.warm_up}", workload, results)
        given.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
