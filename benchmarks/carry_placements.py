"""The PPO recipe with its models in different places: it learns the same in each.

    OMP_NUM_THREADS=1 python benchmarks/carry_placements.py --out benchmarks/results/carry_placements.json

Needs the recipe's warm-up (`hybridflow sft recipes/carry/sft.yaml`). Every process has one thread. "Change apart" is
||dW - dW'|| / ||dW'|| of the trained weights after the first three updates of the actor, against the run in one
process; "same tokens" counts the responses of the first step.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from safetensors.torch import load_file

from hybridflow.config.load import load_config
from hybridflow.tracking.jsonl import read_metrics
from hybridflow.trainers.rl.loop import train

from measuring import record

RECIPE = Path(__file__).parents[1] / "recipes/carry/ppo.yaml"
FSDP2 = ["engine.strategy=fsdp2"]
PLACEMENTS = {
    "one process": [],
    "in one worker": ["placement.pools={all: 1}"],
    "colocated, FSDP2": ["placement.pools={all: 2}", *FSDP2],
    "colocated, FSDP1": ["placement.pools={all: 2}", "engine.strategy=fsdp1"],
    "colocated, HSDP 2 x 2": ["placement.pools={all: 4}", "engine.shard_size=2", *FSDP2],
    "colocated, Ulysses 2": ["placement.pools={all: 2}", "engine.sequence_parallel=2", *FSDP2],
    "colocated, FSDP2 x Ulysses 2": ["placement.pools={all: 4}", "engine.sequence_parallel=2", *FSDP2],
    "split: actor and rollout / critic": [
        "placement.pools={actor: 2, critic: 2}", "placement.roles={critic: critic}", *FSDP2,
    ],
    "standalone": ["placement.pools={actor: 1, critic: 1, rollout: 1}",
                   "placement.roles={critic: critic, rollout: rollout}"],
    "replicas elsewhere": ["placement.pools={train: 2, generate: 2}", "placement.roles={rollout: generate}", *FSDP2],
    "colocated, FSDP2, on Ray": ["placement.pools={all: 2}", "placement.backend=ray", *FSDP2],
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/carry-sft/model", help="the warm-up's model")
    parser.add_argument("--only", nargs="*", help="names of placements")
    parser.add_argument("--whole", nargs="*", default=list(PLACEMENTS), help="those that also run to the end")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    model = str(Path(arguments.model).resolve())
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        first = Path(folder) / "0"
        for number, (name, overrides) in enumerate(PLACEMENTS.items()):
            if arguments.only and number and name not in arguments.only:
                continue
            early = name not in arguments.whole
            rows.append(one(Path(folder) / str(number), name, overrides, model, early=early, first=first))
            print(json.dumps(rows[-1]), flush=True)
    if arguments.out:
        result = record(shlex.join(["python", *sys.argv]), {"recipe": "recipes/carry/ppo.yaml"}, rows)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def one(folder: Path, name: str, overrides: list[str], model: str, *, early: bool, first: Path) -> dict[str, Any]:
    # The first 5 steps train the critic alone: step 8 is the actor's third update.
    short = run(folder / "early", [*overrides, "train.steps=8", "eval.every=0", "eval.before_training=false"], model)
    row: dict[str, Any] = {"placement": name, "change_apart": change_apart(folder / "early", first / "early", model)}
    answers = [
        pq.read_table(f / "early/rollouts/step-000001.parquet")["token_ids"].to_pylist() for f in (folder, first)
    ]
    row["same_tokens"] = sum(a == b for a, b in zip(*answers, strict=True)) / len(answers[0])
    row["seconds_of_early_steps"] = round(short, 1)
    if not early:
        row["seconds"] = round(run(folder / "whole", overrides, model), 1)
        metrics = read_metrics(folder / "whole/metrics.jsonl")
        scores = [m["val-core/carry/reward/mean@1"] for m in metrics if "val-core/carry/reward/mean@1" in m]
        row |= {"before": scores[0], "after": scores[-1]}
    return row


def run(folder: Path, overrides: list[str], model: str) -> float:
    config = load_config(RECIPE, [f"run.folder={folder}", f"model.path={model}", "track.console=false", *overrides])
    began = time.perf_counter()
    train(config)
    return time.perf_counter() - began


def change_apart(folder: Path, first: Path, model: str) -> float:
    start, one, other = (load_file(f"{f}/model.safetensors") for f in (model, folder / "model", first / "model"))
    apart = sum(float((one[n] - other[n]).square().sum()) for n in other)
    changed = sum(float((other[n] - start[n]).square().sum()) for n in other)
    return (apart / changed) ** 0.5


if __name__ == "__main__":
    main()
