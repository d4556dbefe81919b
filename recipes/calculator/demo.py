"""`make demo-agent` teaches a small model to call a calculator, and prints a table, an example and a report."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hybridflow.config.kinds.sft import SftConfig
from hybridflow.config.load import load_config
from hybridflow.errors import UserError
from hybridflow.tracking.rollouts import read_rollouts
from hybridflow.trainers.rl.loop import train
from hybridflow.trainers.sft import train_sft
from hybridflow.viewer.report import write_report

HERE = Path(__file__).parent


def run_calculator(
    folder: Path, seed: int, *, changes: tuple[str, ...] = (), live: bool = True, threads: int = 1
) -> dict[str, Any]:
    """Trains warm-up and reinforcement learning with one seed; returns accuracy, share of calls, and seconds.

    Args:
        folder: of both runs, ``sft`` and ``grpo``.
        seed: of both runs.
        changes: of the configuration of reinforcement learning.
        live: show progress.
        threads: torch threads.
    """
    common = [f"run.seed={seed}", f"run.threads={threads}", f"track.console={str(live).lower()}"]
    wall, cpu = time.perf_counter(), time.process_time()
    train_sft(load_config(HERE / "sft.yaml", [f"run.folder={folder / 'sft'}", *common], kind=SftConfig))
    seconds = {"sft_wall_s": time.perf_counter() - wall, "sft_cpu_s": time.process_time() - cpu}
    wall, cpu = time.perf_counter(), time.process_time()
    run = folder / "grpo"
    train(
        load_config(HERE / "grpo.yaml", [f"run.folder={run}", f"model.path={folder / 'sft/model'}", *common, *changes])
    )
    evaluations = [read_rollouts(file) for file in sorted((run / "evaluations").glob("step-*.parquet"))]
    return {
        "seed": seed,
        "before": accuracy(evaluations[0]),
        "after": accuracy(evaluations[-1]),
        "calls_before": call_rate(evaluations[0]),
        "calls_after": call_rate(evaluations[-1]),
        **seconds,
        "grpo_wall_s": time.perf_counter() - wall,
        "grpo_cpu_s": time.process_time() - cpu,
    }


def accuracy(rows: list[dict[str, Any]]) -> float:
    """Returns the share of correct responses."""
    return sum(row["reward"] for row in rows) / len(rows)


def call_rate(rows: list[dict[str, Any]]) -> float:
    """Returns the share of responses that call the tool."""
    return sum("<tool_call>" in row["response"] for row in rows) / len(rows)


def main() -> None:
    console, folder = Console(), Path("runs/demo-agent")
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else 0
    shutil.rmtree(folder, ignore_errors=True)
    console.print(
        "A language model of 0.8 M parameters learns to call a calculator. Fine-tuning shows how a call is written,\n"
        "and then mostly answers that are guessed at once. GRPO rewards only correct answers.\n"
    )
    result = run_calculator(folder, seed)
    table = Table("", "after fine-tuning", "after GRPO", title="held-out questions, greedy decoding")
    table.add_row("correct", f"{result['before']:.1%}", f"[bold green]{result['after']:.1%}[/]")
    table.add_row("call the calculator", f"{result['calls_before']:.1%}", f"{result['calls_after']:.1%}")
    table.add_row("seconds", f"{result['sft_wall_s']:.0f}", f"{result['grpo_wall_s']:.0f}")
    console.print(table)
    files = sorted((folder / "grpo/evaluations").glob("step-*.parquet"))
    for before, after in list(zip(read_rollouts(files[0]), read_rollouts(files[-1])))[:3]:
        console.print(f"{before['question']}  {before['ground_truth']}")
        for name, row in [("before", before), ("after", after)]:
            mark = "[green]right[/]" if row["reward"] else "[red]wrong[/]"
            console.print(
                f"  {name:6}  {escape(' ... '.join(row['response'].split(chr(10))))}  {mark}", highlight=False
            )
    console.print(f"\nreport: {write_report(folder / 'grpo')}   (open it in a browser)")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; `make demo-agent` begins anew, `hybridflow train` would resume")
