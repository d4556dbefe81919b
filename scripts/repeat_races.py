"""Runs the tests in which processes race again and again on a loaded machine, and counts what fails.

    python scripts/repeat_races.py races.json --sglang .venv-sglang/bin/python

A race is lost once in many times, and more often when processes wait for a processor: so the script keeps every core
busy twice over while it repeats. Files that share the persistent ranks run in one process, in another order each time.
Ends with 1 if anything failed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FAST = "not slow and not vllm and not sglang and not gpu"
# Groups of arguments for one process of pytest.
SHARED_RANKS = [
    "tests/engines/test_fsdp.py",
    "tests/engines/test_sharded_files.py",
    "tests/models/test_ulysses.py",
    "tests/weights/test_gathered.py",
    "tests/weights/test_transport.py",
    "tests/weights/test_channel.py",
    "tests/test_ranks.py",
]
SERVERS = ["tests/rollout/test_sglang.py", "-k", "damaged or killed or abort or update"]
OTHERS = [
    ["tests/runs/test_interrupt.py"],
    ["tests/runs/test_kill.py"],
    ["tests/runs/test_first_cause.py"],
    ["tests/placing/test_placement.py"],
    ["tests/publishing/test_publishing.py"],
    ["tests/controller"],
    ["tests/rollout/test_asynchronous.py"],
    ["tests/rewards/test_pool.py", "tests/rewards/test_killable.py", "tests/rewards/test_limits.py"],
    ["tests/rewards/test_remote.py", "tests/rewards/test_judge.py"],
    ["tests/rewards/sandbox"],
    ["tests/checkpoint"],
    ["tests/weights/test_drill.py", "tests/algorithms/test_partition_invariance.py"],
]


def busy() -> None:
    while True:
        sum(range(10_000))


def tested(python: str, arguments: list[str], marker: str, failures: Counter[str]) -> bool:
    """Returns whether one process of pytest passed; counts the names of tests that failed."""
    command = [python, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short", "-m", marker, *arguments]
    single = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=os.environ | single, capture_output=True, text=True)
    if done.returncode in (0, 5):  # 5: the marker selects none of it
        return True
    failures.update(re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE) or [" ".join(arguments)])
    print(done.stdout[-6000:] + done.stderr[-2000:], flush=True)
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("target", type=Path, help="JSON file to write the counts to")
    parser.add_argument("--races", type=int, default=30, help="times for the files that share ranks, and for servers")
    parser.add_argument("--others", type=int, default=5, help="times for other tests with processes or signals")
    parser.add_argument("--suite", type=int, default=2, help="times for all fast tests, in two processes, without load")
    parser.add_argument("--sglang", help="the interpreter of an environment with SGLang, to repeat its races too")
    given = parser.parse_args()
    failures: Counter[str] = Counter()
    runs: dict[str, Any] = {}

    def repeat(name: str, times: int, python: str, arguments: list[str], marker: str, mix: bool = False) -> None:
        begun, good = time.monotonic(), 0
        for number in range(times):
            order = random.Random(number).sample(arguments, len(arguments)) if mix else arguments
            good += tested(python, order, marker, failures)
            print(f"{name}: {good} of {number + 1} good, {time.monotonic() - begun:.0f} s", flush=True)
        runs[name] = {"good": good, "of": times, "seconds": round(time.monotonic() - begun)}
        given.target.write_text(json.dumps({"runs": runs, "failures": failures}, indent=1) + "\n")

    load = [multiprocessing.Process(target=busy, daemon=True) for _ in range(2 * (os.cpu_count() or 1))]
    for process in load:
        process.start()
    repeat("shared ranks", given.races, sys.executable, SHARED_RANKS, FAST, mix=True)
    if given.sglang:
        repeat("SGLang", given.races, given.sglang, SERVERS, "sglang")
    for arguments in OTHERS:
        repeat(" ".join(arguments), given.others, sys.executable, arguments, FAST)
    for process in load:
        process.terminate()
    repeat("all fast tests", given.suite, sys.executable, ["-n", "2", "--dist", "worksteal"], FAST)
    print(json.dumps(failures, indent=1))
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
