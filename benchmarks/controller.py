"""The cost of the controller: sending a step's call to 1 to 1,024 workers and joining the results, and starting.

    OMP_NUM_THREADS=1 python benchmarks/controller.py --out benchmarks/results/controller.json

- "calls": CPU seconds of a call that every worker replies to, by how many workers there are. The workers are
  simulated: a back end of this file's own replies at once from the decoded message, so what is counted is splitting,
  encoding, decoding, joining and book-keeping, on one thread, without the kernel's copies.
- "transfer": 8,192 sequences of log-normal lengths (mean 1,000 tokens) with the columns of a policy update go to two
  processes that sleep instead of training, and their log-probabilities come back: wall seconds beside the sleep, and
  CPU seconds of both ends. The share of a step is from the latter, one after the other, since the machine is shared.
- "launch": wall seconds from nothing to the first reply of two processes, in a program of its own, and the CPU seconds
  of that program (not of the processes, which import torch once for both).
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybridflow.batch import Batch
from hybridflow.config.sections.placement import PlacementSection
from hybridflow.controller.cluster import Cluster
from hybridflow.controller.dispatch import over, remote
from hybridflow.controller.messages import Lost, Place, WorkerCall, WorkerReply
from hybridflow.controller.open import open_cluster
from hybridflow.controller.worker import WorkerContext
from hybridflow.protocols.training import Loss

from measuring import record

SIZES = (1, 4, 16, 64, 256, 1024)
SEQUENCES, MEAN_TOKENS, LONGEST = 8192, 1000, 8192
STEP_SECONDS = 60.0  # of a training step that transfer is compared with: 8.2 M tokens at 137 thousand per second
SLEEP_SECONDS = 2.0
ENGINE_PROCESSES = 2
HERE = Path(__file__).resolve()


class Sleeper:
    """Stands for an engine: takes its part, sleeps, and returns a column of it."""

    def __init__(self, context: WorkerContext) -> None:
        self.context = context

    @remote(over("dp"))
    def update(self, part: Batch, loss: Loss, seconds: float) -> tuple[dict[str, Tensor], float]:
        """Sleeps for one step; returns a column, and the CPU seconds that this process has had."""
        time.sleep(seconds)
        return {"logp_T": part["old_logp_T"]}, time.process_time()


class Simulated:
    """A back end that replies to each message at once, through the same encoding as a real one."""

    passes_exceptions = False

    def __init__(self) -> None:
        self._answers: list[tuple[Place, WorkerReply | Lost]] = []

    def check(self, places: Sequence[Place]) -> Iterable[str]:
        """Returns no warning."""
        return []

    def start(self, places: Sequence[Place]) -> None:
        """Does nothing."""

    def send(self, place: Place, request: WorkerCall) -> None:
        """Replies with the first argument's log-probabilities."""
        asked = WorkerCall.read(request.frames)
        value = ({"logp_T": asked.call[0][0]["old_logp_T"]}, 0.0) if asked.kind == "call" else None
        self._answers.append((place, WorkerReply.read(WorkerReply(asked.id, "done", value).frames)))

    def receive(self, timeout: float) -> Sequence[tuple[Place, WorkerReply | Lost]]:
        """Returns all replies."""
        answers, self._answers = self._answers, []
        return answers

    def box(self, place: Place) -> Mapping[str, Any]:
        """Returns nothing."""
        return {}

    def kill(self) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


def step_batch(sequences: int, mean: int, longest: int) -> Batch:
    """Makes what a policy update needs, for sequences of log-normal lengths."""
    torch.manual_seed(0)
    drawn = torch.empty(sequences).log_normal_(0.0, 1.0)
    lengths = (drawn / drawn.mean() * mean).clamp(1, longest).long()
    total = int(lengths.sum())
    floats = ("old_logp_T", "rollout_logp_T", "advantage_T", "policy_weight_T", "entropy_weight_T")
    columns: dict[str, Any] = {name: torch.randn(total) for name in floats}
    columns |= {"input_ids_T": torch.randint(50_000, (total,)), "loss_mask_T": torch.ones(total, dtype=torch.bool)}
    columns["group_B"] = torch.arange(sequences) // 8
    return Batch(columns, lengths={"T": lengths})


def calls(rounds: int) -> dict[str, Any]:
    """Measures CPU milliseconds of a call by the number of workers, each with one short sequence."""
    found = {}
    for size in SIZES:
        cluster = Cluster(PlacementSection(pools={"all": size}), Simulated(), lambda kind, text: None)
        group = cluster.group("engine", Sleeper, "all")
        parts = step_batch(size, 64, 64).split([1] * size)
        times = []
        for _ in range(rounds + 1):
            began = time.process_time()
            group.update(parts, Loss("ppo_clip"), 0.0)
            times.append(1000 * (time.process_time() - began))
        cluster.close()
        median = statistics.median(times[1:])
        found[str(size)] = {"cpu_ms": round(median, 3), "cpu_ms_per_worker": round(median / size, 4)}
    return found


def transfer(rounds: int) -> dict[str, Any]:
    """Measures the wall seconds that a step's columns take there and back, beside the workers' sleep."""
    batch = step_batch(SEQUENCES, MEAN_TOKENS, LONGEST)
    halves = torch.arange(SEQUENCES).chunk(ENGINE_PROCESSES)
    parts = [batch.take(half) for half in halves]
    placement = PlacementSection(pools={"all": ENGINE_PROCESSES}, backend="processes")
    wall, cpu, workers = [], [], []
    with open_cluster(placement, device="cpu", events=lambda kind, text: None) as cluster:
        group = cluster.group("engine", Sleeper, "all")
        for _ in range(rounds + 1):
            cluster.bytes.clear()
            began, began_cpu = time.perf_counter(), time.process_time()
            results = group.update(parts, Loss("ppo_clip"), SLEEP_SECONDS)
            workers.append(max(used for _, used in results))
            wall.append(time.perf_counter() - began - SLEEP_SECONDS)
            cpu.append(time.process_time() - began_cpu)
        moved = dict(cluster.bytes)
    controller = statistics.median(cpu[1:])
    worker = statistics.median(b - a for a, b in itertools.pairwise(workers))
    return {
        "tokens": batch.total(),
        "megabytes": {kind: round(size / 1e6, 1) for kind, size in moved.items()},
        "wall_s_beside_the_sleep": [round(w, 3) for w in wall[1:]],
        "controller_cpu_s": round(controller, 3),
        "slowest_worker_cpu_s": round(worker, 3),
        "share_of_a_step": {"step_s": STEP_SECONDS, "share": round((controller + worker) / STEP_SECONDS, 4)},
    }


def launch(rounds: int) -> dict[str, Any]:
    """Measures a program that starts two processes and has the first reply; its import of torch is in the seconds."""
    found = []
    for _ in range(rounds):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        began = time.perf_counter()
        done = subprocess.run([sys.executable, str(HERE), "--first-answer"], capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        own = float(done.stdout)
        found.append({"program_wall_s": time.perf_counter() - began, "cluster_wall_s": own, "cpu_s": used})
    return {name: round(statistics.median(f[name] for f in found), 2) for name in found[0]}


def first_answer() -> None:
    """Prints the seconds from opening a cluster of two processes to their first reply."""
    began = time.perf_counter()
    placement = PlacementSection(pools={"all": ENGINE_PROCESSES})
    with open_cluster(placement, device="cpu", events=lambda kind, text: None) as cluster:
        group = cluster.group("engine", Sleeper, "all")
        group.update(step_batch(2, 4, 4).split([1, 1]), Loss("ppo_clip"), 0.0)
        print(time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--first-answer", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.first_answer:
        first_answer()
        return
    results = {"calls": calls(given.rounds), "transfer": transfer(given.rounds), "launch": launch(given.rounds)}
    workload = {"sequences": SEQUENCES, "mean_tokens": MEAN_TOKENS, "sleep_s": SLEEP_SECONDS, "rounds": given.rounds}
    text = json.dumps(record("python benchmarks/controller.py", workload, results), indent=1)
    if given.out is not None:
        given.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
