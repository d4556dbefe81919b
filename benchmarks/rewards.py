"""The cost of scoring: 8,192 reference answers of GSM8K through 0, 1 and 2 processes, and beside one row that hangs.

    OMP_NUM_THREADS=1 python benchmarks/rewards.py --data FOLDER_OF_GSM8K --out benchmarks/results/rewards.json

Responses come in groups of 8, as in training. Time is from the first `submit` to the last score, without the start of
the processes, which stands beside it. CPU seconds are of this process and of those that score.
"""

from __future__ import annotations

import argparse
import json
import resource
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from hybridflow.config.sections.rewards import RewardPoolSection
from hybridflow.protocols.rewards import Answers, Grader
from hybridflow.rewards.graders.function import FunctionSpec
from hybridflow.rewards.graders.in_process import InProcessGrader
from hybridflow.rewards.pool.grader import ProcessGrader

from measuring import record

GROUPS, GROUP = 1024, 8
HANGS = """
import time
from hybridflow.rewards.verifiable.gsm8k import strict
def score(response, ground_truth):
    if response == "hang":
        time.sleep(30)
    return strict(response, ground_truth)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    groups = read(arguments.data / "train.jsonl")
    rows = []
    for processes in (0, 1, 2):
        seconds = [scored(groups, processes) for _ in range(arguments.rounds)]
        rows.append({"processes": processes, **{k: statistics.median(s[k] for s in seconds) for k in seconds[0]}})
        rows[-1]["all wall"] = [s["wall"] for s in seconds]
        print(json.dumps(rows[-1]), flush=True)
    for processes in (1, 2):
        rows.append({"processes": processes, "one row hangs for 30 s": hanging(groups, processes)})
        print(json.dumps(rows[-1]), flush=True)
    if arguments.out:
        workload = {"answers": GROUPS * GROUP, "reward": "gsm8k", "rounds": arguments.rounds}
        result = record(shlex.join(["python", *sys.argv]), workload, rows)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def read(path: Path) -> list[Answers]:
    rows = [json.loads(line) for line in path.read_text().splitlines()[:GROUPS]]
    return [
        Answers(
            [row["answer"]] * GROUP,
            row["answer"].split("#### ")[1],
            [{"role": "user", "content": row["question"]}],
            {"data_source": "openai/gsm8k", **row},
        )
        for row in rows
    ]


def scored(groups: list[Answers], processes: int) -> dict[str, float]:
    functions = {"gsm8k": FunctionSpec("gsm8k")}
    before = cpu()
    began = time.perf_counter()
    grader: Grader = (
        ProcessGrader(functions, RewardPoolSection(processes=processes)) if processes else InProcessGrader(functions)
    )
    grader.check()
    started, own = time.perf_counter(), time.process_time()
    found = all_of(grader, groups)
    ended, own = time.perf_counter(), time.process_time() - own
    grader.close()
    assert all(score.value == 1 for scores in found.values() for score in scores) and len(found) == GROUPS
    return {"start": started - began, "wall": ended - started, "cpu here": own, "cpu with start": cpu() - before}


def hanging(groups: list[Answers], processes: int) -> dict[str, float]:
    first = groups[0]
    bad = Answers([*first.responses[:-1], "hang"], first.ground_truth, first.prompt, first.row)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "hangs.py").write_text(HANGS)
        spec = FunctionSpec(f"{folder}/hangs.py:score")
        grader = ProcessGrader({"hangs": spec}, RewardPoolSection(processes=processes, timeout=60))
        grader.check()
        began = time.perf_counter()
        for key, group in enumerate([*groups[: GROUPS // 2], bad, *groups[GROUPS // 2 + 1 :]]):
            grader.submit(key, group)
        others = 0
        while others < GROUPS - 1:
            others += len(grader.wait())
        rest = time.perf_counter() - began
        grader.wait()
        wall = time.perf_counter() - began
        grader.close()
    return {"wall of the others": rest, "wall": wall}


def all_of(grader: Grader, groups: list[Answers]) -> dict[int, Any]:
    for key, group in enumerate(groups):
        grader.submit(key, group)
    found: dict[int, Any] = {}
    while done := grader.wait():
        found.update(done)
    return found


def cpu() -> float:
    return sum(
        used.ru_utime + used.ru_stime
        for used in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


if __name__ == "__main__":
    main()
