"""The cost of the walls around a program: programs per CPU second, beside a bare subprocess.

    python benchmarks/sandbox.py benchmarks/results/sandbox.json

Every side runs `print(int(input()) ** 2)` a fixed number of times, one after the other, and reads what it prints; sides
take turns. CPU seconds are those of this process and its children. The kernel removes namespaces later, on no process's
account: that is not counted.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from hybridflow.rewards.sandbox.local import LocalSandbox
from hybridflow.rewards.sandbox.outcome import Limits
from hybridflow.rewards.sandbox.view import interpreter
from hybridflow.rewards.verifiable.code import score

from measuring import record

PROGRAM = "print(int(input()) ** 2)"
ROUNDS, PROGRAMS = 5, 60


def bare(*options: str) -> Callable[[], str]:
    def run() -> str:
        command = [interpreter(), *options, "-c", PROGRAM]
        return subprocess.run(command, input="3", capture_output=True, text=True, check=True).stdout

    return run


def walled(walls: str) -> Callable[[], str]:
    sandbox = LocalSandbox(walls, Limits(30, 512, 64), 1)  # type: ignore[arg-type]
    return lambda: sandbox.run(PROGRAM, "3").stdout


def scored(truth: object, program: str) -> Callable[[], str]:
    settings = {"backend": "local", "seconds": 30, "parallel": 1}

    def run() -> str:
        assert score(program, truth, sandbox=settings)["score"] == 1
        return "9\n"

    return run


def cpu() -> float:
    return sum(os.times()[:4])


def main() -> None:
    function = "def f(x): return x * x"
    sides = {
        "python -c": bare(),
        "python -I -S -c": bare("-I", "-S"),
        "unsafe": walled("none"),
        "local": walled("local"),
        "reward, one call": scored({"inputs": [[3]], "outputs": [9], "fn_name": "f"}, function),
        "reward, one assert": scored(["assert f(3) == 9"], function),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for run in sides.values():
        assert run() == "9\n"
    for _ in range(ROUNDS):
        for name, run in sides.items():
            before = cpu()
            for _ in range(PROGRAMS):
                run()
            seconds[name].append(cpu() - before)
    results = {}
    for name, taken in seconds.items():
        own = statistics.median(taken)
        results[name] = {
            "programs_per_cpu_second": round(PROGRAMS / own, 1),
            "ms_cpu_per_program": round(1000 * own / PROGRAMS, 2),
            "times_python_-c": round(statistics.median(b / t for b, t in zip(seconds["python -c"], taken)), 2),
        }
    command = f"python benchmarks/sandbox.py {' '.join(sys.argv[1:])}".strip()
    text = json.dumps(record(command, {"program": PROGRAM, "rounds": ROUNDS, "programs": PROGRAMS}, results), indent=2)
    if sys.argv[1:]:
        Path(sys.argv[1]).write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
