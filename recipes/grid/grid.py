"""Runs the grid recipe with one seed: the warm-up, then GiGPO and GRPO from the same model.

python recipes/grid/grid.py runs/grid 0
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hybridflow.config.kinds.sft import SftConfig
from hybridflow.config.load import load_config
from hybridflow.tracking.jsonl import read_metrics
from hybridflow.trainers.rl.loop import train
from hybridflow.trainers.sft import train_sft

HERE = Path(__file__).parent
SUCCESS = "val-core/grid/reward/mean@1"


def run_grid(
    folder: Path,
    seed: int,
    *,
    algorithms: Sequence[str] = ("gigpo", "grpo"),
    changes: Sequence[str] = (),
    live: bool = True,
) -> dict[str, Any]:
    """Trains with one seed; returns the success on held-out walks before and after each algorithm, and CPU seconds.

    Args:
        folder: of the runs: ``sft``, and one for each algorithm.
        seed: of all runs.
        algorithms: the recipes beside this file.
        changes: of the configurations of reinforcement learning.
        live: show progress.
    """
    common = [f"run.seed={seed}", f"track.console={str(live).lower()}"]
    cpu = time.process_time()
    train_sft(load_config(HERE / "sft.yaml", [f"run.folder={folder / 'sft'}", *common], kind=SftConfig))
    found: dict[str, Any] = {"seed": seed, "sft_cpu_s": time.process_time() - cpu}
    for name in algorithms:
        cpu, run = time.process_time(), folder / name
        given = [f"run.folder={run}", f"model.path={folder / 'sft/model'}", *common, *changes]
        train(load_config(HERE / f"{name}.yaml", given))
        success = [m[SUCCESS] for m in read_metrics(run / "metrics.jsonl") if SUCCESS in m]
        found[name] = {"before": success[0], "after": success[-1], "cpu_s": time.process_time() - cpu}
    return found


if __name__ == "__main__":
    print(json.dumps(run_grid(Path(sys.argv[1]), int(sys.argv[2])), indent=1))
