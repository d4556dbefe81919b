"""What keeping the answers of tools costs: the share of a step's seconds that the journal of calls takes.

    python benchmarks/call_journal.py --out benchmarks/results/call_journal.json

Steps of the calculator recipe with a model that calls (the first part of its warm-up). Every answer is on disk before
the model sees it; answers that came together are written with one sync.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hybridflow.checkpoint.calls import CallJournal
from hybridflow.config.kinds.rl import RlConfig
from hybridflow.config.kinds.sft import SftConfig
from hybridflow.config.load import load_config
from hybridflow.tracking.jsonl import read_metrics
from hybridflow.trainers.rl.loop import train
from hybridflow.trainers.sft import train_sft

from measuring import record

CALCULATOR = Path(__file__).resolve().parents[1] / "recipes/calculator"


class TimedJournal:
    """Adds up the seconds and the calls of methods of the journal, of every object of its class."""

    def __init__(self) -> None:
        self.seconds, self.counts = 0.0, {"add": 0, "sync": 0, "find": 0}

    def watch(self, name: str) -> None:
        """Times a method from now on."""
        inner: Callable[..., Any] = getattr(CallJournal, name)

        def timed(journal: CallJournal, *args: Any) -> Any:
            began = time.perf_counter()
            try:
                return inner(journal, *args)
            finally:
                self.seconds += time.perf_counter() - began
                self.counts[name] += 1

        setattr(CallJournal, name, timed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    given = parser.parse_args()
    quiet = ["track.console=false", "run.threads=1"]
    with tempfile.TemporaryDirectory() as folder:
        warm_up = [f"run.folder={folder}/sft", "train.steps=80", "checkpoint.every=0", *quiet]
        model = train_sft(load_config(CALCULATOR / "sft.yaml", warm_up, kind=SftConfig)) / "model"
        journal = TimedJournal()
        for name in journal.counts:
            journal.watch(name)
        changes = [f"run.folder={folder}/run", f"model.path={model}", f"train.steps={given.steps}", "eval.every=0",
                   "eval.before_training=false", "eval.max_rows=8", *quiet]  # fmt: skip
        train(load_config(CALCULATOR / "grpo.yaml", changes, kind=RlConfig))
        seconds = [line["timing_s/step"] for line in read_metrics(Path(folder) / "run/metrics.jsonl")][:-1]
    total = sum(seconds) * given.steps / len(seconds)
    results = {
        "steps": given.steps,
        "seconds_of_a_step": statistics.median(seconds),
        "calls_of_a_step": {name: count / given.steps for name, count in journal.counts.items()},
        "journal_ms_of_a_step": 1000 * journal.seconds / given.steps,
        "share": journal.seconds / total,
    }
    command = f"python benchmarks/call_journal.py --steps {given.steps} --out {given.out}"
    workload = "GRPO steps of 8 x 8 trajectories of recipes/calculator after 80 steps of its warm-up"
    given.out.write_text(json.dumps(record(command, workload, results), indent=1) + "\n")
    print(results)


if __name__ == "__main__":
    main()
