"""What is told when a worker fails, and that nothing is left then. The assertions are on the words of the report."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hybridflow.config.sections.placement import PlacementSection
from hybridflow.controller.cluster import Cluster
from hybridflow.controller.failure import WorkerFailure
from hybridflow.controller.group import WorkerGroup
from hybridflow.controller.open import open_cluster
from hybridflow.errors import UserError

from at_once import at_once
from children import left_of
from on_ranks.toy_workers import Toy
from tiny import ragged_batch

TESTS = Path(__file__).resolve().parents[1]


def failing(run: Callable[[WorkerGroup], object], *, timeout: float = 30.0) -> UserError:
    """The report of a call in step 3 on two workers that fails; it is told once, ends all, and is raised again."""
    told: list[tuple[str, str]] = []
    placement = PlacementSection(pools={"train": 2}, timeout=timeout)
    cluster = open_cluster(placement, device="cpu", events=lambda kind, text: told.append((kind, text)))
    with cluster:
        actor = cluster.group("actor", Toy, "train")
        processes = {who[4] for who in actor.about()}
        actor.sum_of_pool(0.0)  # all are in their collective now, and not on the way to it
        cluster.step = 3
        began = time.monotonic()
        with pytest.raises(UserError) as raised:
            run(actor)
        assert time.monotonic() - began < timeout + 15
        assert not left_of(processes, 0)
        assert told == [("failure", str(raised.value))]
        with pytest.raises(UserError) as again:
            actor.first()
        assert again.value is raised.value
    return raised.value


def update(actor: WorkerGroup) -> object:
    return actor.update(ragged_batch().split([4, 2]))


# --- named faults ---


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("kill", "worker actor.1 failed in update of step 3: killed by signal 9 (SIGKILL)\n"
                 "  why: killed by signal 9 (SIGKILL); the kernel kills processes that run out of memory this way"),
        ("raise", "worker actor.1 failed in update of step 3: RuntimeError: a fault that HYBRIDFLOW_FAULT asked for"),
        ("oom", "worker actor.1 failed in update of step 3: MemoryError: a fault that HYBRIDFLOW_FAULT asked for"),
        ("sleep", "worker actor.1 failed in update of step 3: hangs\n  why: no progress for "),
    ],
)  # fmt: skip
def test_a_worker_that_is_struck_is_the_cause(fault: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYBRIDFLOW_FAULT", f"{fault}:actor.1@step3:update")
    report = str(failing(update, timeout=2.0 if fault == "sleep" else 30.0))
    assert report.startswith(words)
    assert "\n  worker: actor.1, rank 1 of 2 of pool train, process " in report
    assert "\n  phase: update of step 3\n  memory then: " in report and "unknown" not in report
    assert "\n  rows in hand: 2 sequences of 13 tokens, the longest 9\n" in report
    expected = {
        "kill": "fix: lower train.tokens_per_microbatch",
        "oom": "fix: lower train.tokens_per_microbatch",
        "raise": "fix: mend what raised it; the run resumes from its newest checkpoint",
        "sleep": "(placement.timeout is 2); 1 other waits for it in a collective; it stands at\n    src/hybridflow/fa",
    }
    assert expected[fault] in report
    if fault == "kill":
        assert "\n  after it: 1 other worker failed\n" in report  # its collective lost a peer


def test_a_fault_without_a_rank_strikes_the_first_call_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYBRIDFLOW_FAULT", "raise:actor@step3:first:2")
    with open_cluster(PlacementSection(pools={"all": 1}), device="cpu") as cluster:
        actor = cluster.group("actor", Toy, "all")
        cluster.step = 3
        assert actor.first() == 0
        with pytest.raises(RuntimeError, match="HYBRIDFLOW_FAULT"):  # in this process it is itself
            actor.first()
        assert actor.first() == 0


def test_a_dropped_row_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYBRIDFLOW_FAULT", "drop-row:actor.0@step3:count_rows")
    with open_cluster(PlacementSection(), device="cpu") as cluster:
        actor = cluster.group("actor", Toy, "all")
        assert actor.count_rows(ragged_batch()) == [6]
        cluster.step = 3
        assert actor.count_rows(ragged_batch()) == [5]


def test_a_fault_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYBRIDFLOW_FAULT", "kill:critic.0@step0:create")
    report = failing(lambda actor: at_step_0(actor._cluster).group("critic", Toy, "train"))
    assert str(report).startswith("worker critic.0 failed in create of step 0: killed by signal 9")


def at_step_0(cluster: Cluster) -> Cluster:
    cluster.step = 0
    return cluster


def test_what_is_no_fault_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYBRIDFLOW_FAULT", "explode:actor@step3:update")
    words = "HYBRIDFLOW_FAULT=explode:actor@step3:update is no fault"
    with open_cluster(PlacementSection(), device="cpu") as cluster, pytest.raises(UserError, match=words):
        cluster.group("actor", Toy, "all")


# --- first causes ---


def an_exception_is_told_with_its_own_lines() -> None:
    report = failing(lambda actor: actor.raise_on([1]))
    assert isinstance(report, WorkerFailure)
    assert str(report).startswith(
        "worker actor.1 failed in raise_on of step 3: ValueError: boom\n  why: ValueError: boom\n    "
    )
    assert "toy_workers.py:" in str(report) and 'in raise_on: raise ValueError("boom")' in str(report)
    assert "controller/worker.py" not in str(report)  # nobody's mistake is there


def of_two_that_raise_one_is_the_cause_and_the_other_is_counted() -> None:
    report = str(failing(lambda actor: actor.raise_on([0, 1])))
    assert "raise_on of step 3: ValueError: boom" in report and "\n  after it: 1 other worker failed\n" in report


def a_users_mistake_arrives_as_it_was_raised() -> None:
    error = failing(lambda actor: actor.raise_on([1], mistake=True))
    assert type(error) is UserError
    assert (error.what, error.why, error.fix) == ("a bad value", "it is bad", "give a good one")


def a_users_mistake_in_a_constructor_arrives_too() -> None:
    error = failing(lambda actor: actor._cluster.group("b", Toy, "train", wrong=True))
    assert type(error) is UserError
    assert (error.what, error.why, error.fix) == ("toys start at 0", "they are toys", "set start=0")


def a_process_that_ends_by_itself() -> None:
    report = str(failing(lambda actor: actor.end_process(0, 3)))
    assert report.startswith(
        "worker actor.0 failed in end_process of step 3: its process ended by itself with exit status 3"
    )


def a_worker_that_dies_between_two_calls_is_found_at_the_next() -> None:
    def kill_and_call(actor: WorkerGroup) -> object:
        os.kill(actor.about()[1][4], signal.SIGSEGV)
        time.sleep(0.2)
        return actor.first()

    report = str(failing(kill_and_call))
    assert report.startswith("worker actor.1 failed in after about of step 3: killed by signal 11 (SIGSEGV)")
    assert "it crashed in native code" in report


def ranks_that_make_different_collectives() -> None:
    report = str(failing(lambda actor: actor.different_collectives(), timeout=2.0))
    assert "failed in different_collectives of step 3" in report
    assert "fix: every rank must make the same collectives" in report


def what_was_asked_for_before_a_failure_was_known_is_not_done() -> None:
    def one_and_another(actor: WorkerGroup) -> object:
        actor.raise_on.later([1])  # rank 0 is then in a collective, which rank 1 never joins
        return actor.different_collectives()  # rank 1 would meet it there with another one

    report = str(failing(one_and_another))
    assert report.startswith("worker actor.1 failed in raise_on of step 3: ValueError: boom")


def a_result_that_cannot_be_sent() -> None:
    report = str(failing(lambda actor: actor.answer_with_a_function()))
    assert report.startswith("worker actor.") and "pickle" in report


def test_the_first_cause_is_told() -> None:
    at_once(
        an_exception_is_told_with_its_own_lines,
        of_two_that_raise_one_is_the_cause_and_the_other_is_counted,
        a_users_mistake_arrives_as_it_was_raised,
        a_users_mistake_in_a_constructor_arrives_too,
        a_process_that_ends_by_itself,
        a_worker_that_dies_between_two_calls_is_found_at_the_next,
        ranks_that_make_different_collectives,
        what_was_asked_for_before_a_failure_was_known_is_not_done,
        a_result_that_cannot_be_sent,
    )


@pytest.mark.slow
def test_a_process_that_is_stopped_before_a_large_message_is_found_too() -> None:
    def stop_and_send(actor: WorkerGroup) -> object:
        os.kill(actor.about()[1][4], signal.SIGSTOP)
        return actor.echo({"logp_T": torch.zeros(10**7)})

    report = str(failing(stop_and_send, timeout=3.0))
    assert report.startswith("worker actor.1 failed in after about of step 3: hangs\n  why: no progress for 3 seconds")


@pytest.mark.slow
def test_a_process_that_is_stopped_is_the_one_that_does_not_say_where_it_stands() -> None:
    report = str(failing(lambda actor: actor.stop_process(1), timeout=3.0))
    assert report.startswith("worker actor.1 failed in stop_process of step 3: hangs\n  why: no progress for 3 seconds")
    assert "does not report where it stands: its process is stopped, or in native code" in report


def test_a_long_call_that_tells_its_progress_is_not_ended() -> None:
    placement = PlacementSection(pools={"all": 2}, timeout=1.0)
    with open_cluster(placement, device="cpu", events=lambda kind, text: None) as cluster:
        spans = cluster.group("actor", Toy, "all").work(1.5, pieces=6)
    assert all(ended - began >= 1.5 for began, ended in spans)


# --- the controller ---

SCRIPT = """
import os, sys, time
sys.path.insert(0, {tests!r})
from on_ranks.toy_workers import Toy
from hybridflow.config.sections.placement import PlacementSection
from hybridflow.controller.open import open_cluster

def main():
    with open_cluster(PlacementSection(pools={{"all": 2}}), device="cpu") as cluster:
        actor = cluster.group("actor", Toy, "all")
        print(*[who[4] for who in actor.about()], flush=True)
        {then}

{guard}main()
"""


def start(folder: Path, then: str, guard: str = 'if __name__ == "__main__": ') -> subprocess.Popen[str]:
    script = folder / "script.py"
    script.write_text(SCRIPT.format(tests=str(TESTS), then=then, guard=guard))
    return subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    "then",
    [
        pytest.param("actor.work(600)", id="in a call"),
        pytest.param("time.sleep(600)", id="between calls", marks=pytest.mark.slow),
    ],
)
def test_a_controller_that_is_killed_leaves_no_worker(then: str, tmp_path: Path) -> None:
    with start(tmp_path, then) as controller:
        assert controller.stdout is not None
        workers = {int(pid) for pid in controller.stdout.readline().split()}
        assert len(workers) == 2
        controller.kill()
    assert not left_of(workers)


@pytest.mark.slow
def test_an_exception_in_the_controller_leaves_no_worker(tmp_path: Path) -> None:
    with start(tmp_path, "actor.work.later(600); 1 / 0") as controller:
        out, error = controller.communicate(timeout=60)
    assert "ZeroDivisionError" in error and controller.returncode == 1
    assert not left_of({int(pid) for pid in out.split()}, 0)


@pytest.mark.slow
def test_a_script_without_a_guard_is_told_to_have_one(tmp_path: Path) -> None:
    with start(tmp_path, "pass", guard="") as controller:
        _, error = controller.communicate(timeout=60)
    assert 'fix: put what it does under: if __name__ == "__main__":' in error
    assert controller.returncode == 1
