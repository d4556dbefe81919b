"""The devices of this host: NVIDIA (cuda), AMD (rocm), Ascend (npu), or the CPU. Code that depends on the kind is here.

torch calls AMD's devices "cuda" too, so kinds are told apart by how torch was built. The rest goes through
`torch.accelerator`, which is the same for all of them.
"""

from __future__ import annotations

import importlib.util
import os
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from hybridflow.errors import UserError


@dataclass(frozen=True)
class DeviceKind:
    """A kind of device.

    Args:
        name: cuda, rocm, npu or cpu.
        torch_type: torch's name of such a device.
        backend: of process groups: gloo for tensors in host memory, the maker's library for those on devices.
        visible: the environment variable that says which devices a process sees; empty for the CPU.
    """

    name: str
    torch_type: str
    backend: str
    visible: str


CUDA = DeviceKind("cuda", "cuda", "cpu:gloo,cuda:nccl", "CUDA_VISIBLE_DEVICES")
ROCM = DeviceKind("rocm", "cuda", "cpu:gloo,cuda:nccl", "HIP_VISIBLE_DEVICES")  # RCCL is registered under the name nccl
NPU = DeviceKind("npu", "npu", "cpu:gloo,npu:hccl", "ASCEND_RT_VISIBLE_DEVICES")
CPU = DeviceKind("cpu", "cpu", "gloo", "")
CGROUP = Path("/sys/fs/cgroup")  # where Linux keeps the limits of a container (version 2)


def kind_of(wanted: str = "auto") -> DeviceKind:
    """Returns the kind of device that ``run.device`` means on this host; auto: an accelerator if there is one.

    Raises:
        UserError: this host has no such device, or this torch cannot use it.
    """
    found = _accelerator()
    if wanted == "auto":
        return found or CPU
    if wanted == "cpu":
        return CPU
    if found is None or found.torch_type != wanted:
        more = "torch_npu" if wanted == "npu" else "a CUDA torch"
        raise UserError(
            f"run.device is {wanted}, but torch finds no {'NPU' if wanted == 'npu' else 'GPU'}",
            fix=f"set run.device=cpu or install {more}; `hybridflow doctor` lists what this host has",
        )
    return found


def _accelerator() -> DeviceKind | None:
    if importlib.util.find_spec("torch_npu") is not None:
        importlib.import_module("torch_npu")  # makes torch know the type "npu"
    if not torch.accelerator.is_available():
        return None
    here = torch.accelerator.current_accelerator()
    assert here is not None
    if here.type == "cuda":
        return CUDA if torch.version.hip is None else ROCM
    return NPU if here.type == "npu" else None  # others, such as mps, are not tried: the CPU computes


def pick_device(wanted: str = "auto", local_rank: int | None = None) -> torch.device:
    """Returns the device of a process.

    Args:
        wanted: ``run.device``.
        local_rank: the process among those of this host, which take devices in turn; None: torch's current one.

    Raises:
        UserError: this host has no such device.
    """
    kind = kind_of(wanted)
    if kind is CPU or local_rank is None:
        return torch.device(kind.torch_type)
    return torch.device(kind.torch_type, local_rank % torch.accelerator.device_count())


def count_devices(kind: DeviceKind) -> int:
    """Counts the devices of this kind that this process sees; of the CPU, the cores that it may use."""
    if kind is not CPU:
        return torch.accelerator.device_count()
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_of(device: torch.device) -> tuple[int, int]:
    """Returns free and total bytes of a device; of the CPU, those of the host, within the limit of a container."""
    if device.type != "cpu":
        free, total = torch.accelerator.get_memory_info(device)
        return int(free), int(total)
    page = os.sysconf("SC_PAGE_SIZE")
    total = page * os.sysconf("SC_PHYS_PAGES")
    if not Path("/proc/meminfo").exists():
        return total, total  # macOS does not report what is free
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
    free = 1024 * int(lines["MemAvailable"].split()[0])
    limit = CGROUP / "memory.max"
    if limit.exists() and (most := limit.read_text(encoding="ascii").strip()) != "max":
        used = int((CGROUP / "memory.current").read_text(encoding="ascii"))
        stat = (CGROUP / "memory.stat").read_text(encoding="ascii")
        cached = int(dict(line.split() for line in stat.splitlines())["inactive_file"])  # freed when needed
        total = min(total, int(most))
        free = min(free, total - used + cached)
    return free, total


def name_of(device: torch.device) -> str:
    """Returns the maker's name of a device; of the CPU, cpu."""
    if device.type == "cpu":
        return "cpu"
    return str(torch.get_device_module(device).get_device_name(device))


def synchronize(device: torch.device) -> None:
    """Waits until a device has done all its work; a CPU always has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def memory_metrics() -> dict[str, float]:
    """Returns the peak memory of this process, in GB (2^30 bytes), under verl's names."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    metrics = {"perf/cpu_memory_used_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}
    if kind_of() is not CPU:
        metrics["perf/max_memory_allocated_gb"] = torch.accelerator.max_memory_allocated() / 2**30
        metrics["perf/max_memory_reserved_gb"] = torch.accelerator.max_memory_reserved() / 2**30
    return metrics
