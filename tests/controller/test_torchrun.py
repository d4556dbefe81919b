"""Processes that torchrun starts: the first is the controller and a worker, the others serve it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from children import left_of

TESTS = Path(__file__).resolve().parents[1]
SCRIPT = """
import json, os, sys
import torch
sys.path.insert(0, {tests!r})
from on_ranks.toy_workers import Toy
from hybridflow.batch import Batch
from hybridflow.config.sections.placement import PlacementSection
from hybridflow.controller.open import open_cluster
from hybridflow.controller.backends.torchrun import serve
from hybridflow.errors import UserError

LENGTHS = (7, 3, 12, 5, 9, 4)
COLUMNS = {{"input_ids_T": [torch.arange(n) for n in LENGTHS], "loss_mask_T": [torch.arange(n) > 0 for n in LENGTHS]}}

def ragged_batch():
    return Batch.from_rows({{**COLUMNS, "trajectory_B": list(range(len(LENGTHS)))}})

def main():
    if os.environ["RANK"] != "0":
        return serve()
    print("pid", os.getpid(), flush=True)
    placement = PlacementSection({placement})
    with open_cluster(placement, device="cpu", events=lambda kind, text: print(kind, flush=True)) as cluster:
        {body}

try:
    main()
except UserError as error:
    print("REPORT", json.dumps(str(error)), flush=True)
    sys.exit(1)
"""
FAULT = """actor = cluster.group("actor", Toy, "all")
        print("pid", *[who[4] for who in actor.about()], actor.sum_of_pool(1.0), flush=True)
        cluster.step = 3
        actor.update(ragged_batch().split([4, 2]))"""


def torchrun(folder: Path, placement: str, body: str, fault: str = "") -> tuple[str, set[int]]:
    """What the processes print, and their numbers; the launcher is given a minute."""
    script = folder / "script.py"
    script.write_text(SCRIPT.format(tests=str(TESTS), placement=placement, body=body))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = os.environ | {"HYBRIDFLOW_FAULT": fault, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=False)
    numbers = [line.split("[")[0].split()[1:] for line in done.stdout.splitlines() if line.startswith("pid")]
    return done.stdout + done.stderr, {int(n) for line in numbers for n in line}


def report(printed: str) -> str:
    lines = [line for line in printed.splitlines() if line.startswith("REPORT")]
    assert len(lines) == 1, printed
    return str(json.loads(lines[0].removeprefix("REPORT ")))


def test_two_pools_of_one_process_each(tmp_path: Path) -> None:
    body = """a = cluster.group("actor", Toy, "train", 3)
        r = cluster.group("rollout", Toy, "generate", 4)
        batch = ragged_batch()
        print("SAID", a.about()[0][:4], r.about()[0][:4], a.add([1]), r.sum_of_pool(2.0), a.sum_of_pool(5.0))
        later = [g.rows.later([batch]) for g in (r, a)]
        print("SAID", [bool((f.result()[0]["twice_T"] == 2 * batch["input_ids_T"]).all()) for f in later])
        print("SAID", dict(cluster.bytes), flush=True)"""
    pools = 'pools={"train": 1, "generate": 1}, roles={"rollout": "generate"}'
    printed, pids = torchrun(tmp_path, pools, body)
    said = [line.removeprefix("SAID ") for line in printed.splitlines() if line.startswith("SAID")]
    assert said == [
        "('actor', 'train', 0, 1) ('rollout', 'generate', 0, 1) [4] [2.0] [5.0]",
        "[True, True]",
        "{'scalar': 192, 'token': 1360, 'other': 0}",  # 40 tokens and 6 answers: ids, mask, trajectory; ids, rank
    ], printed
    assert not left_of(pids)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "rank", "words"),
    [
        ("raise", 1, "RuntimeError: a fault that HYBRIDFLOW_FAULT asked for"),
        ("kill", 0, ""),
        ("kill", 1, "its process has ended, or the network is gone; torchrun reports its signal"),
        ("sleep", 0, "hangs\n  why: no progress for "),
        ("sleep", 1, "hangs\n  why: no progress for "),
    ],
)
def test_a_worker_that_is_struck_is_the_cause(fault: str, rank: int, words: str, tmp_path: Path) -> None:
    printed, pids = torchrun(tmp_path, "timeout=8", FAULT, f"{fault}:actor.{rank}@step3:update")
    assert len(pids) == 2 and not left_of(pids)
    if rank == 0 and fault == "kill":
        assert "exitcode: -9" in printed  # the controller is dead: torchrun tells it
        return
    if rank == 0 and fault == "sleep":
        said = printed  # the sleeping process is the controller: a thread tells it, and ends the process
    else:
        said = report(printed)
    assert f"worker actor.{rank} failed in update of step 3: {words}" in said
    assert printed.count("failure\n") == 1


@pytest.mark.slow
def test_pools_that_do_not_add_up_to_torchruns_processes(tmp_path: Path) -> None:
    printed, _ = torchrun(tmp_path, 'pools={"a": 2, "b": 1}, roles={"actor": "a", "critic": "b"}', "pass")
    assert report(printed) == (
        "placement.pools has 3 processes (a 2 + b 1), and torchrun has started 2\n"
        "  fix: give pools of 2 together, or start 3 (--nproc-per-node, --nnodes)"
    )
