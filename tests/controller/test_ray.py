"""Worker groups on a real Ray: calls, first causes, what is lacking, and that nothing is left."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from hybridflow.batch import Batch
from hybridflow.config.sections.placement import PlacementSection
from hybridflow.controller.backends import ray as ray_backend
from hybridflow.controller.cluster import Cluster
from hybridflow.controller.failure import WorkerFailure
from hybridflow.controller.open import open_cluster
from hybridflow.errors import UserError

from children import left_of
from on_ranks.ray_workers import Surroundings
from on_ranks.toy_workers import Toy
from tiny import ragged_batch

ray = ray_backend.ray
TESTS = Path(__file__).resolve().parents[1]
MIB = 2**20


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """One instance for the tests of this file: a run in a process that is in a cluster takes that one."""
    ray.init(address="local", num_cpus=4, include_dashboard=False, object_store_memory=500 * MIB, **ray_backend.QUIET)
    yield
    ray.shutdown()


def opened(pools: dict[str, int], *, timeout: float = 20, **more: object) -> Cluster:
    section = PlacementSection.model_validate({"backend": "ray", "pools": pools, "timeout": timeout, **more})
    return open_cluster(section, device="cpu", threads=1)


def placed(*pools: str) -> dict[str, str]:
    """Roles so that no pool is empty."""
    return dict(zip(("actor", "critic", "reference", "rollout"), [*pools, *[pools[0]] * 4]))


def test_calls_reach_the_workers_of_a_pool_and_one_that_is_killed_is_named_with_what_it_had_in_hand(
    local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYBRIDFLOW_FAULT", "kill:toys.1@step2:update")
    with opened({"train": 2, "generate": 1}, roles=placed("train", "generate")) as cluster:
        toys, other = cluster.group("toys", Toy, "train", 10), cluster.group("other", Toy, "generate", 5)
        again = cluster.group("again", Toy, "train", 20)
        assert toys.add([1, 2], y=[3, 4]) == [14, 16]
        assert toys.first() == 0
        assert toys.sent_backwards([1, 2]) == 12
        batch = ragged_batch((3, 5, 2))
        parts: list[Batch] = [batch.take([0, 1, 2]), batch.take([])]  # uneven: a rank may have nothing to do
        first, second = toys.rows(parts)
        assert torch.equal(first["twice_T"], 2 * batch["input_ids_T"]) and first["rank_B"].tolist() == [0, 0, 0]
        assert len(second["rank_B"]) == 0
        assert toys.sum_of_pool(1.0) == [3.0, 3.0] and other.sum_of_pool(1.0) == [1.0]  # a process group per pool
        assert again.sibling_start("toys") == [10, 10]
        assert {pid for *_, pid in again.about()} == {pid for *_, pid in toys.about()}
        large = torch.zeros(MIB // 4)  # 1 MiB goes through the object store, where both ranks see the same bytes
        around = cluster.group("around", Surroundings, "train")
        assert around.sum_after_adding_one(large) == [MIB / 4] * 2 and float(large.sum()) == 0
        assert torch.equal(toys.echo(large)[1], large)
        slow, quick = toys.work.later(0.5), other.work.later(0.5)  # two pools work at the same time
        assert max(began for began, _ in slow.result() + quick.result()) < min(
            end for _, end in slow.result() + quick.result()
        )

        pids = [pid for group in (toys, other) for *_, pid in group.about()]
        cluster.step, began = 2, time.monotonic()
        with pytest.raises(WorkerFailure) as failure:
            toys.update([batch.take([0]), batch.take([1, 2])])
    report = str(failure.value)
    assert report.startswith("worker toys.1 failed in update of step 2: its process was killed")
    assert "rows in hand: 2 sequences of 7 tokens, the longest 5" in report
    assert re.search(rf"process {pids[1]}\b", report) and re.search(r"memory then: \d+ MiB", report)
    assert "tokens_per_microbatch" in report  # what to do about memory
    assert time.monotonic() - began < 60
    assert left_of(pids) == set()


@pytest.mark.slow
def test_workers_have_the_folder_the_modules_and_the_variables_of_the_controller(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "reward.py").write_text("here")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYBRIDFLOW_COLOUR", "blue")  # set after Ray was started
    with opened({"all": 1}) as cluster:
        around = cluster.group("around", Surroundings, "all")
        assert around.read("reward.py") == ["here"]
        assert around.variable("HYBRIDFLOW_COLOUR") == ["blue"]
        assert around.threads() == [1]


@pytest.mark.slow
def test_the_first_cause_is_told_when_a_worker_raises(local_ray: None) -> None:
    told: list[tuple[str, str]] = []
    section = PlacementSection(backend="ray", pools={"all": 2}, timeout=20)
    cluster = open_cluster(section, device="cpu", threads=1, events=lambda kind, text: told.append((kind, text)))
    with cluster:
        cluster.step = 3
        toys = cluster.group("toys", Toy, "all")
        with pytest.raises(WorkerFailure) as failure:
            toys.raise_on([1])  # rank 0 waits for it in a collective
    report = str(failure.value)
    assert report.startswith("worker toys.1 failed in raise_on of step 3: ValueError: boom")
    assert 'in raise_on: raise ValueError("boom")' in report
    assert told == [("failure", report)]


@pytest.mark.slow
def test_a_mistake_of_the_users_arrives_as_it_is(local_ray: None) -> None:
    with opened({"all": 2}) as cluster, pytest.raises(UserError, match="toys start at 0") as error:
        cluster.group("toys", Toy, "all", wrong=True)
    assert (error.value.why, error.value.fix) == ("they are toys", "set start=0")
    assert not isinstance(error.value, WorkerFailure)


@pytest.mark.slow
def test_a_worker_that_does_not_come_to_a_collective_is_found(local_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYBRIDFLOW_FAULT", "sleep:toys.0@step0:update")
    batch = ragged_batch((3, 5, 2))
    with opened({"all": 2}, timeout=3) as cluster:
        toys = cluster.group("toys", Toy, "all")
        pids = [pid for *_, pid in toys.about()]
        with pytest.raises(WorkerFailure, match=r"worker toys\.0 failed in update of step 0: hangs"):
            toys.update([batch.take([0]), batch.take([1, 2])])
    assert left_of(pids) == set()


@pytest.mark.slow
def test_a_pool_that_finds_no_room_is_named_before_anything_starts(
    local_ray: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="pool 'generate' lacks CPUs: it needs 3") as error:
        opened({"train": 2, "generate": 3}, timeout=2, roles=placed("train", "generate"))
    assert error.value.why == "the Ray cluster has 4 (CPU), of which 2 are free, on 1 hosts"
    assert "warning: pool 'generate' waits for 3 CPUs" in capsys.readouterr().err
    assert comes_true(lambda: ray.available_resources()["CPU"] == 4)  # what was reserved is free again


def test_an_address_where_nobody_answers_is_told_within_seconds(
    local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    began = time.monotonic()
    with pytest.raises(UserError, match=f"no Ray cluster answers at placement.address {address}") as error:
        opened({"all": 1}, address=address)
    assert time.monotonic() - began < 5
    assert "refused" in error.value.why and "ray start --head" in error.value.fix
    with pytest.raises(UserError, match="is of Ray's client"):
        opened({"all": 1}, address="ray://127.0.0.1:10001")
    monkeypatch.setattr(ray_backend, "PROBE_SECONDS", 1.5)
    with socket.create_server(("127.0.0.1", 0)) as server:  # something else listens there
        threading.Thread(target=accept_all, args=(server,), daemon=True).start()
        with pytest.raises(UserError, match="no Ray cluster answers") as error:
            opened({"all": 1}, address=f"127.0.0.1:{server.getsockname()[1]}")
    assert error.value.why == "the port is open, but nothing joined within 1.5 seconds"


def accept_all(server: socket.socket) -> None:
    held = []
    while True:
        try:
            held.append(server.accept())
        except OSError:
            return


# --- whole programs, each with a Ray of its own ---

PROGRAM = """
import os, signal, sys, time
import torch
from hybridflow.config.sections.placement import PlacementSection
from hybridflow.controller.open import open_cluster
from hybridflow.errors import UserError
from on_ranks.toy_workers import Toy

%s
try:
    section = PlacementSection.model_validate({"backend": "ray", "pools": {"all": 2}, "timeout": 30, **%s})
    with open_cluster(section, device="cpu", threads=1) as cluster:
        toys = cluster.group("toys", Toy, "all")
        print("pids", *(pid for *_, pid in toys.about()), flush=True)
%s
except UserError as error:
    print(error, flush=True)
    sys.exit(1)
"""


def program(
    body: str, variables: dict[str, str] | None = None, first: str = "", **section: object
) -> subprocess.Popen[str]:
    text = PROGRAM % (first, section, textwrap.indent(body, " " * 8))
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent / "src")])
    return subprocess.Popen(
        [sys.executable, "-c", text], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": paths, **(variables or {})}, start_new_session=True,
    )  # fmt: skip


def members_of(session: int) -> list[str]:
    """Command lines of the processes that are still in the session of a program (Ray makes none of its own)."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                found.append((folder / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found


def comes_true(what: Callable[[], bool], seconds: float = 10) -> bool:
    """Ray counts what is free a moment later."""
    until = time.monotonic() + seconds
    while not (true := what()) and time.monotonic() < until:
        time.sleep(0.1)
    return true


def gone(session: int, seconds: float) -> list[str]:
    """What is left of a session after at most so many seconds."""
    until = time.monotonic() + seconds
    while (left := members_of(session)) and time.monotonic() < until:
        time.sleep(0.5)
    return left


@pytest.mark.slow
def test_two_runs_at_once_have_a_ray_each_and_leave_nothing() -> None:
    runs = [program(f"print(toys.sum_of_pool({value}.0))") for value in (1, 5)]
    said = [run.communicate(timeout=200) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    assert [out.splitlines()[-1] for out, _ in said] == ["[3.0, 3.0]", "[11.0, 11.0]"]
    assert [gone(run.pid, 10) for run in runs] == [[], []]


@pytest.mark.slow
def test_a_failure_leaves_nothing_and_prints_nothing_but_the_report() -> None:
    run = program("toys.raise_on([0, 1])")
    out, err = run.communicate(timeout=200)
    assert run.returncode == 1 and err == "", err
    assert out.splitlines()[1].startswith("worker toys.") and "boom" in out.splitlines()[1]
    assert gone(run.pid, 10) == []


@pytest.mark.slow
def test_nothing_is_left_when_the_controller_itself_is_killed() -> None:
    run = program("toys.work.later(1000.0)\ntime.sleep(1)\nos.kill(os.getpid(), signal.SIGKILL)")
    out, _ = run.communicate(timeout=200)
    pids = [int(pid) for pid in out.split()[1:3]]
    assert run.returncode == -signal.SIGKILL and len(pids) == 2
    assert left_of(pids) == set()
    assert gone(run.pid, 150) == []  # Ray's own agents wait a minute for its server to come back


@pytest.mark.slow
def test_a_full_object_store_is_told() -> None:
    full = {"RAY_local_fs_capacity_threshold": "0.0001"}  # Ray takes every disk for a full one, and cannot spill
    first = "import ray; ray.init(address='local', num_cpus=2, object_store_memory=80 * 2**20, log_to_driver=False)"
    run = program("toys.echo(torch.zeros(200 * 2**20, dtype=torch.int8))", full, first)
    out, err = run.communicate(timeout=250)
    assert run.returncode == 1, err
    assert "Ray's object store has no room left" in out and "--object-store-memory" in out
    assert gone(run.pid, 10) == []


@pytest.mark.slow
def test_a_running_cluster_is_joined_by_its_address_and_left_as_it_was(local_ray: None) -> None:
    run = program("print(toys.sum_of_pool(1.0))", address=ray.get_runtime_context().gcs_address)
    out, err = run.communicate(timeout=200)
    assert run.returncode == 0 and out.splitlines()[-1] == "[3.0, 3.0]", err
    assert gone(run.pid, 10) == []
    assert comes_true(lambda: ray.available_resources()["CPU"] == 4)
