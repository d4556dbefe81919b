"""Calls on groups of workers, in this process and in others."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hybridflow.batch import Batch
from hybridflow.config.sections.placement import PlacementSection
from hybridflow.controller.cluster import Cluster
from hybridflow.controller.group import WorkerGroup
from hybridflow.controller.open import open_cluster
from hybridflow.errors import UserError

from children import children, left_of
from on_ranks.toy_workers import Toy
from tiny import ragged_batch


def split_pools() -> PlacementSection:
    return PlacementSection(pools={"train": 2, "generate": 1}, roles={"rollout": "generate"}, timeout=60)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two pools; a module's tests share them."""
    with open_cluster(split_pools(), device="cpu", events=lambda kind, text: None) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def actor(cluster: Cluster) -> WorkerGroup:
    return cluster.group("actor", Toy, "train", 3)


@pytest.fixture(scope="module")
def rollout(cluster: Cluster) -> WorkerGroup:
    return cluster.group("rollout", Toy, "generate")


# --- dispatch ---


def test_each_dispatch_reaches_its_workers(actor: WorkerGroup, rollout: WorkerGroup) -> None:
    about = actor.about()
    assert [who[:4] for who in about] == [("actor", "train", 0, 2), ("actor", "train", 1, 2)]
    assert len({who[4] for who in [*about, *rollout.about()]} | {os.getpid()}) == 4  # processes of their own
    assert actor.add([10, 20], y=[1, 2]) == [14, 25]  # all to all, with the 3 that they began with
    assert actor.first() == 0
    assert actor.sent_backwards([1, 2]) == 2 + 10  # the last to the first, and a sum: a user's own pair
    assert actor.world_size == 2


def test_uneven_and_empty_parts_need_no_padding(actor: WorkerGroup) -> None:
    batch = ragged_batch()
    for sizes in ([5, 1], [6, 0], [0, 6]):
        results = actor.rows(batch.split(sizes))
        assert torch.equal(torch.cat([r["twice_T"] for r in results]), 2 * batch["input_ids_T"])
        assert torch.cat([r["rank_B"] for r in results]).tolist() == [0] * sizes[0] + [1] * sizes[1]


def test_ranks_at_the_same_place_of_a_dimension_get_the_same_part(cluster: Cluster) -> None:
    group = cluster.group("peers", Toy, "train", mesh={"dp": 1, "sp": 2})
    batch = ragged_batch()
    (result,) = group.rows([batch])  # one part, that both work on; the first one's answer is taken
    assert torch.equal(result["twice_T"], 2 * batch["input_ids_T"]) and set(result["rank_B"].tolist()) == {0}


def test_a_wrong_number_of_parts_is_told_before_anything_is_sent(actor: WorkerGroup) -> None:
    with pytest.raises(ValueError, match="3 parts for the 2 places of dimension 'dp'"):
        actor.rows([1, 2, 3])
    with pytest.raises(ValueError, match="an argument has 1 entries for 2 workers"):
        actor.add([1])
    assert actor.first() == 0


def test_what_cannot_be_sent_is_told_and_the_group_goes_on(actor: WorkerGroup) -> None:
    with pytest.raises((AttributeError, TypeError), match="pickle"):
        actor.echo(lambda: 1)
    with pytest.raises(AssertionError, match="hidden_TH of shape"):
        actor.echo({"hidden_TH": torch.zeros(2**12, 128)})
    assert actor.echo("still here") == ["still here"] * 2


def test_an_unmarked_method_is_an_attribute_error_that_says_so(actor: WorkerGroup) -> None:
    with pytest.raises(AttributeError, match=r"'actor' cannot call Toy.unmarked: it is not marked with @remote"):
        actor.unmarked()
    with pytest.raises(AttributeError, match=r"Toy.updat: did you mean 'update'"):
        actor.updat()


# --- several groups and pools ---


def test_calls_on_two_pools_run_at_the_same_time(actor: WorkerGroup, rollout: WorkerGroup) -> None:
    long, short = actor.work.later(0.6), rollout.work.later(0.3)
    assert not long.done()
    spans = [*short.result(), *long.result()]
    assert long.done() and short.done()
    assert max(began for began, _ in spans) < min(ended for _, ended in spans)  # all were at work at one time
    assert long.result() == spans[1:]  # a second time, the same


def test_calls_on_one_process_run_in_order(actor: WorkerGroup) -> None:
    first, second = actor.work.later(0.1), actor.work.later(0.0)
    assert [b for b, _ in second.result()] >= [e for _, e in first.result()]


def test_large_messages_both_ways_do_not_block_each_other(actor: WorkerGroup) -> None:
    column = torch.zeros(4 * 10**6)
    futures = [actor.echo.later({"logp_T": column + i}) for i in range(4)]
    assert [float(f.result()[1]["logp_T"][0]) for f in futures] == [0, 1, 2, 3]


def test_every_pool_has_a_process_group_of_its_own(actor: WorkerGroup, rollout: WorkerGroup) -> None:
    assert actor.sum_of_pool(10.0) == [21.0, 21.0]
    assert rollout.sum_of_pool(10.0) == [10.0]


def test_groups_of_one_pool_share_its_processes(cluster: Cluster, actor: WorkerGroup) -> None:
    critic = cluster.group("critic", Toy, "train", 5)
    assert [who[4] for who in critic.about()] == [who[4] for who in actor.about()]
    assert critic.sibling_start("actor") == [3, 3]
    assert actor.sibling_start("critic") == [5, 5]


def test_bytes_that_pass_through_are_counted(cluster: Cluster, actor: WorkerGroup) -> None:
    cluster.bytes.clear()
    batch = Batch.from_rows({"input_ids_T": [[1, 2], [3]], "reward_B": torch.zeros(2)})
    actor.rows(batch.split([1, 1]))
    # there: 3 tokens and 2 rewards; back: 3 tokens and 2 ranks
    assert cluster.bytes == {"token": 24 + 24, "scalar": 8 + 16, "other": 0}


def test_two_clusters_at_once_do_not_meet(actor: WorkerGroup) -> None:
    with open_cluster(PlacementSection(pools={"all": 2}), device="cpu", events=lambda kind, text: None) as other:
        assert other.group("actor", Toy, "all").sum_of_pool(1.0) == [3.0, 3.0]
        assert actor.sum_of_pool(10.0) == [21.0, 21.0]


# --- in this process ---


def test_without_pools_everything_is_in_this_process() -> None:
    with open_cluster(PlacementSection(), device="cpu") as cluster:
        actor = cluster.group("actor", Toy, "all", 3)
        critic = cluster.group("critic", Toy, "all", 4)
        assert actor.about() == [("actor", "all", 0, 1, os.getpid())]
        batch = ragged_batch()
        assert actor.rows([batch])[0]["rank_B"].tolist() == [0] * 6
        assert critic.sibling_start("actor") == [3]
        assert actor.sum_of_pool(2.0) == [2.0]
        future = actor.work.later(0.0)
        assert future.done() and len(future.result()) == 1
        assert actor.echo(batch)[0] is batch  # nothing is copied
    assert not torch.distributed.is_initialized()


def test_in_this_process_exceptions_and_breakpoints_are_where_they_arise(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = []
    monkeypatch.setattr("sys.breakpointhook", lambda: stopped.append(True))
    with open_cluster(PlacementSection(), device="cpu") as cluster:
        actor = cluster.group("actor", Toy, "all")
        actor.stop_in_debugger()
        with pytest.raises(ValueError, match="boom") as raised:
            actor.raise_on([0])
        assert raised.traceback[-1].name == "raise_on"
        assert actor.first() == 0  # the group goes on
    assert stopped == [True]


# --- mistakes, before and at the start ---


def test_a_mesh_of_another_size_and_a_pool_that_is_not_there(cluster: Cluster) -> None:
    with pytest.raises(UserError, match=r"'a' wants 2 dp x 2 sp = 4 workers, and pool 'train' has 2 processes"):
        cluster.group("a", Toy, "train", mesh={"dp": 2, "sp": 2})
    with pytest.raises(UserError, match=r"'b' is to live in pool 'trian', which does not exist\n  fix: did you mean"):
        cluster.group("b", Toy, "trian")


def test_more_processes_than_cores_is_a_warning() -> None:
    told: list[tuple[str, str]] = []
    pools = {"train": 1, "generate": os.cpu_count() or 1}
    placement = PlacementSection(pools=pools, roles={"rollout": "generate"}, backend="processes")
    with open_cluster(placement, device="cpu", events=lambda kind, text: told.append((kind, text))):
        assert [kind for kind, _ in told] == ["warning"]
        assert f"{1 + pools['generate']} processes (train 1, generate {pools['generate']}) share" in told[0][1]


def test_a_port_that_is_taken_is_told_before_anything_starts() -> None:
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    before = children()
    placement = PlacementSection(pools={"all": 2}, port=store.port)
    with pytest.raises(UserError, match=rf"placement.port {store.port} is taken on this host\n  why: .*another run"):
        open_cluster(placement, device="cpu")
    assert children() == before


def test_nothing_is_left_after_the_end() -> None:
    with open_cluster(PlacementSection(pools={"all": 2}), device="cpu", events=lambda kind, text: None) as cluster:
        actor = cluster.group("actor", Toy, "all")
        running = {who[4] for who in actor.about()}
        assert running <= children()
        began = time.monotonic()
    assert not left_of(running, 0)
    assert time.monotonic() - began < 5
    with pytest.raises(UserError, match="the cluster is closed"):
        actor.first()


@pytest.mark.slow
def test_the_worker_of_the_documentation_prints_what_it_says(tmp_path: Path) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/extending.md").read_text()
    section = page[page.index("## A worker of your own") :]
    (tmp_path / "counting.py").write_text(section.split("```python\n")[1].split("```")[0])
    done = subprocess.run([sys.executable, "counting.py"], cwd=tmp_path, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and f"It prints `{lines[0]}` and `{lines[1]}`." in section
