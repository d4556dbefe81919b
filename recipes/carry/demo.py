"""`make demo` trains the carry task from random weights to GRPO, and prints a table and a report at the end."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hybridflow.config.kinds.sft import SftConfig
from hybridflow.config.load import load_config
from hybridflow.errors import UserError
from hybridflow.tracking.jsonl import read_metrics
from hybridflow.tracking.rollouts import read_rollouts
from hybridflow.trainers.rl.loop import train
from hybridflow.trainers.sft import train_sft
from hybridflow.viewer.report import write_report

HERE = Path(__file__).parent
ACCURACY = "val-core/carry/reward/mean@1"
GATE = 0.05  # the warm-up must have converged: GRPO learns nothing from a half-trained model


def run_carry(
    folder: Path,
    seed: int,
    *,
    algorithm: str = "grpo",
    warm_up: Path | None = None,
    live: bool = True,
    threads: int = 1,
) -> dict[str, Any]:
    """Trains warm-up and reinforcement learning with one seed; returns accuracies, the curve and seconds of each phase.

    Args:
        folder: of both runs, ``sft`` and one named like the algorithm.
        seed: of both runs.
        algorithm: "grpo" or "ppo": the recipe beside this file.
        warm_up: the folder of a warm-up run with this seed that is done already; None runs it.
        live: show progress.
        threads: torch threads.
    """
    common = [f"run.seed={seed}", f"run.threads={threads}", f"track.console={str(live).lower()}"]
    wall, cpu = time.perf_counter(), time.process_time()
    sft = warm_up or folder / "sft"
    if warm_up is None:
        train_sft(load_config(HERE / "sft.yaml", [f"run.folder={sft}", *common], kind=SftConfig))
    last = read_metrics(sft / "metrics.jsonl")[-20:]
    loss = sum(m["train/loss"] for m in last) / len(last)
    seconds = {"sft_wall_s": time.perf_counter() - wall, "sft_cpu_s": time.process_time() - cpu}
    if loss > GATE:
        raise UserError(
            f"the warm-up of seed {seed} ended at a loss of {loss:.3f}, above {GATE}",
            why="reinforcement learning needs a model that has learned both strategies",
            fix="raise train.steps in recipes/carry/sft.yaml",
        )
    wall, cpu = time.perf_counter(), time.process_time()
    run = folder / algorithm
    train(load_config(HERE / f"{algorithm}.yaml", [f"run.folder={run}", f"model.path={sft / 'model'}", *common]))
    curve = {int(m["step"]): m[ACCURACY] for m in read_metrics(run / "metrics.jsonl") if ACCURACY in m}
    return {
        "seed": seed,
        "sft_loss": loss,
        "before": curve[min(curve)],
        "after": curve[max(curve)],
        "curve": curve,
        **(seconds if warm_up is None else {}),
        f"{algorithm}_wall_s": time.perf_counter() - wall,
        f"{algorithm}_cpu_s": time.process_time() - cpu,
    }


def responses(folder: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Returns held-out problems with their responses before and after; those that became correct come first."""
    files = sorted((folder / "grpo" / "evaluations").glob("step-*.parquet"))
    pairs = list(zip(read_rollouts(files[0]), read_rollouts(files[-1])))
    return sorted(pairs, key=lambda p: p[0]["reward"] - p[1]["reward"])


def main() -> None:
    console, folder = Console(), Path("runs/demo")
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else 0
    shutil.rmtree(folder, ignore_errors=True)
    console.print(
        "A language model of 0.8 M parameters learns to add three-digit numbers. Fine-tuning teaches it from worked\n"
        "solutions, most of which forget to carry. GRPO then rewards only correct results.\n"
    )
    result = run_carry(folder, seed)
    table = Table("", "after fine-tuning", "after GRPO", title="held-out problems, greedy decoding")
    table.add_row("correct", f"{result['before']:.1%}", f"[bold green]{result['after']:.1%}[/]")
    table.add_row("seconds", f"{result['sft_wall_s']:.0f}", f"{result['grpo_wall_s']:.0f}")
    console.print(table)
    for before, after in responses(folder)[:3]:
        prompt = before["prompt"].split("<|user|>")[1].split("<|end|>")[0]
        console.print(f"{prompt}{before['ground_truth']}")
        for name, response in [("before", before), ("after", after)]:
            mark = "[green]right[/]" if response["reward"] else "[red]wrong[/]"
            console.print(f"  {name:6}  {response['response']}  {mark}", highlight=False)
    console.print(f"\nreport: {write_report(folder / 'grpo')}   (open it in a browser)")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; `make demo` begins anew, `hybridflow train` would resume")
