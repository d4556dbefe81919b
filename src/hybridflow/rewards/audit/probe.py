"""Measures what only the process of a reward shows: threads, memory, time, changes to a row.

`probe` starts a process of its own (this file, run as a module), which calls the reward directly.
"""

from __future__ import annotations

import copy
import os
import pickle
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hybridflow.protocols.rewards import Answers, Score
from hybridflow.rewards.graders.function import FunctionSpec, RewardFunction, load_reward

CALLS = 2000  # to measure cost and growth of memory
WARM_UP = 200  # calls before memory is read the first time
SLOW, USUAL = (
    1.0,
    20_000,
)  # seconds, characters: the cost of slower calls or longer responses is not measured
MEGABYTE = 2**20


@dataclass
class Probed:
    """The measurements of the process.

    Args:
        scores: of every response, in order.
        again: of the same, scored once more directly afterwards.
        in_thread: of the same, in a thread that is not the main one.
        seconds: wall-clock time of the first call of each.
        changed: index of the first response whose row, prompt or ground truth the reward changed.
        calls: of the part that measures cost.
        cpu_seconds: that they took, children's included.
        growth_mb: of the process's memory over them, after a warm-up.
    """

    scores: list[Score]
    again: list[Score]
    in_thread: list[Score]
    seconds: list[float]
    changed: int | None = None
    calls: int = 0
    cpu_seconds: float = 0.0
    growth_mb: float = 0.0


def probe(function: FunctionSpec, answers: Sequence[Answers], *, seconds: float, calls: int = CALLS) -> Probed | str:
    """Runs the reward in a process of its own.

    Args:
        function: the reward.
        answers: with one response each; all have been scored before.
        seconds: that the process may take for everything.
        calls: how many calls measure cost; fewer where they would take more than a quarter of the time.

    Returns:
        The measurements, or how the process ended if it failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        asked, told = Path(folder) / "asked", Path(folder) / "told"
        asked.write_bytes(pickle.dumps((function, list(answers), seconds, calls, sys.path)))
        command = [sys.executable, "-m", "hybridflow.rewards.audit.probe", str(asked), str(told)]
        try:
            done = subprocess.run(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=seconds,
                env=os.environ | {"PYTHONHASHSEED": "random"},  # dependence on the order of a set must show
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"did not end within {seconds:.0f} s"
        if not told.is_file():
            last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
            return f"ended with status {done.returncode}{': ' * bool(last)}{last[:200]}"
        probed = pickle.loads(told.read_bytes())
        assert isinstance(probed, Probed)
        return probed


def measure(reward: RewardFunction, asked: Sequence[Answers], *, seconds: float, calls: int) -> Probed:
    """Takes all measurements, in this process.

    The first responses take at most a fifth of the time; those that were not reached by then are not measured.
    """
    found = Probed([], [], [], [])
    answers = copy.deepcopy(list(asked))  # each its own row: a change by the reward must not reach another response
    end = time.perf_counter() + seconds / 5
    for index, one in enumerate(answers):
        begun = time.perf_counter()
        if begun > end:
            break
        given = copy.deepcopy((one.row, one.prompt, one.ground_truth))
        found.scores += reward.scores(one)
        found.seconds.append(time.perf_counter() - begun)
        if found.changed is None and (one.row, one.prompt, one.ground_truth) != given:
            found.changed = index
        row, prompt, truth = given
        answers[index] = replace(one, row=row, prompt=prompt, ground_truth=truth)
        found.again += reward.scores(answers[index])
    done = answers[: len(found.scores)]
    thread = threading.Thread(target=lambda: found.in_thread.extend(s for one in done for s in reward.scores(one)))
    thread.start()
    thread.join()
    usual = [one for one, took in zip(done, found.seconds) if took < SLOW and len(one.responses[0]) < USUAL]
    _measure_cost(found, reward, usual, seconds / 5, calls)
    return found


def _measure_cost(
    found: Probed, reward: RewardFunction, answers: Sequence[Answers], seconds: float, calls: int
) -> None:
    cpu, end = _cpu_seconds(), time.perf_counter() + seconds
    memory = None
    while answers and found.calls < calls and time.perf_counter() < end:
        reward.scores(answers[found.calls % len(answers)])
        found.calls += 1
        if found.calls == WARM_UP:
            memory = _memory_mb()
    found.cpu_seconds = _cpu_seconds() - cpu
    found.growth_mb = 0.0 if memory is None else _memory_mb() - memory


def _cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _memory_mb() -> float:
    """Returns the resident memory now; where the system does not report it, the peak so far."""
    pages = Path("/proc/self/statm")
    if pages.is_file():
        return int(pages.read_text().split()[1]) * resource.getpagesize() / MEGABYTE
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(asked: str, told: str) -> None:
    """Runs the process: reads the task from one file, writes `Probed` into another."""
    with open(asked, "rb") as file:
        function, answers, seconds, calls, path = pickle.load(file)
    sys.path[:] = path
    reward = load_reward(function.reference, function.kwargs)
    found = measure(reward, answers, seconds=seconds, calls=calls)
    partial = Path(told + ".partial")
    partial.write_bytes(pickle.dumps(found))
    partial.rename(told)


if __name__ == "__main__":
    from hybridflow.rewards.audit.probe import main as run  # so that pickled objects belong to the module by its name

    run(*sys.argv[1:])
