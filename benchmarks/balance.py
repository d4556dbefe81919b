"""How evenly long-tailed batches are dealt to 8 ranks, and what dealing costs on one CPU thread.

    OMP_NUM_THREADS=1 python benchmarks/balance.py benchmarks/results/balance.json

Lengths are log-normal with a median of 400 tokens, at most 8,192. The largest load is compared with what no cut can go
below: the mean load, or the most expensive sequence where that is more. For responses to shared prompts of 100 to 1,000
tokens, what every rank really computes is counted: a prompt once for all of its responses there.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from hybridflow.balance import balanced_ranks, beginning_costs, sequence_costs

from measuring import record

RANKS, ANSWERS, SEEDS = 8, 8, 5
COUNTS = (64, 128, 256, 1_024, 8_192)


def lengths_of(count: int, rng: random.Random) -> list[int]:
    return [min(8_192, 1 + int(rng.lognormvariate(6, 1))) for _ in range(count)]


def load(part: Sequence[int], costs: Sequence[int], groups: Sequence[int], shared: Sequence[int]) -> int:
    """Computes the load of a rank: the prompt of every group once."""
    prompts = {groups[i]: shared[i] for i in part}
    return sum(costs[i] - shared[i] for i in part) + sum(prompts.values())


def measure(count: int, grouped: bool, seed: int) -> dict[str, float]:
    """Measures one batch: by how much the largest load is over the bound, as it comes and dealt."""
    rng = random.Random(seed)
    answers = lengths_of(count, rng)
    groups = [i // ANSWERS for i in range(count)] if grouped else list(range(count))
    prompts = [rng.randint(100, 1_000) if grouped else 0 for _ in range(count)]
    prompts = [prompts[group] for group in groups]
    costs = sequence_costs([p + a for p, a in zip(prompts, answers, strict=True)])
    shared = beginning_costs(prompts)
    seconds = []
    for _ in range(7):
        began = time.process_time()
        parts = balanced_ranks(costs, RANKS, groups, shared) if grouped else balanced_ranks(costs, RANKS)
        seconds.append(time.process_time() - began)
    whole = load(range(count), costs, groups, shared)
    bound = max(whole / RANKS, max(costs))
    plain = [range(count * r // RANKS, count * (r + 1) // RANKS) for r in range(RANKS)]
    loads = [load(part, costs, groups, shared) for part in parts]
    return {
        "as_it_comes": max(load(part, costs, groups, shared) for part in plain) / bound - 1,
        "dealt": max(loads) / bound - 1,
        "work_for_prompts_computed_again": sum(loads) / whole - 1,
        "milliseconds": 1_000 * sorted(seconds)[len(seconds) // 2],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="?", type=Path)
    args = parser.parse_args()
    results = []
    for count in COUNTS:
        for grouped in (False, True):
            found = [measure(count, grouped, seed) for seed in range(SEEDS)]
            worst = {name: max(f[name] for f in found) for name in found[0]}
            results.append({"sequences": count, "groups_of": ANSWERS if grouped else 1, "worst": worst, "seeds": found})
            print(
                f"{count} sequences in groups of {ANSWERS if grouped else 1}: over the bound by "
                f"{worst['as_it_comes']:.1%} as they come, {worst['dealt']:.2%} dealt "
                f"(+{worst['work_for_prompts_computed_again']:.1%} prompts), {worst['milliseconds']:.1f} ms",
                flush=True,
            )
    if args.target:
        command = " ".join(["OMP_NUM_THREADS=1 python benchmarks/balance.py", *sys.argv[1:]])
        workload = {"ranks": RANKS, "seeds": SEEDS, "lengths": "log-normal, median 400, at most 8,192"}
        args.target.write_text(json.dumps(record(command, workload, results), indent=1) + "\n")


if __name__ == "__main__":
    main()
