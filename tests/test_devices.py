"""One module knows the devices: what it says of this host is what the host's own tools say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hybridflow import devices
from hybridflow.devices import CPU, count_devices, kind_of, memory_of, name_of, pick_device, synchronize
from hybridflow.errors import UserError

no_accelerator = pytest.mark.skipif(torch.accelerator.is_available(), reason="this host has an accelerator")


@no_accelerator
@pytest.mark.parametrize(("wanted", "lacks"), [("cuda", "no GPU"), ("npu", "no NPU")])
def test_a_device_that_is_not_there_is_refused_with_what_to_do(wanted: str, lacks: str) -> None:
    with pytest.raises(UserError, match=f"run.device is {wanted}, but torch finds {lacks}\n  fix: set run.device=cpu"):
        pick_device(wanted)


@no_accelerator
def test_without_an_accelerator_every_process_computes_on_the_cpu() -> None:
    assert kind_of() is CPU
    assert [pick_device(local_rank=rank) for rank in range(3)] == [torch.device("cpu")] * 3


def test_the_cpu_can_always_be_asked_for() -> None:
    device = pick_device("cpu", local_rank=1)
    assert device == torch.device("cpu") and name_of(device) == "cpu"
    synchronize(device)


def test_cores_are_those_that_this_process_may_use() -> None:
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    code += "from hybridflow.devices import CPU, count_devices; print(count_devices(CPU))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "1\n"
    assert count_devices(CPU) == len(os.sched_getaffinity(0))


def test_memory_is_that_of_the_host() -> None:
    free, total = memory_of(torch.device("cpu"))
    said = subprocess.run(["free", "--bytes"], capture_output=True, text=True, check=True).stdout.splitlines()[1]
    assert 0 < free <= total <= int(said.split()[1])


def test_the_limit_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.max").write_text(f"{2**30}\n")
    (tmp_path / "memory.current").write_text(f"{600 * 2**20}\n")
    (tmp_path / "memory.stat").write_text(f"anon {500 * 2**20}\ninactive_file {100 * 2**20}\nactive_file 0\n")
    monkeypatch.setattr(devices, "CGROUP", tmp_path)
    assert memory_of(torch.device("cpu")) == (524 * 2**20, 2**30)
