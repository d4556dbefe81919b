"""Checks whether this host can run a job: versions, devices, memory, disk, ports, and two processes in a collective.

Each check is a function that returns its finding as text, or raises a UserError with the remedy. It runs on one host;
on a cluster, run it on each.
"""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import os
import platform
import resource
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist
from packaging.requirements import Requirement

from hybridflow.devices import CPU, DeviceKind, count_devices, kind_of, memory_of, name_of, pick_device, synchronize
from hybridflow.errors import UserError
from hybridflow.sockets import try_socket

GIB = 2**30
NEEDED = {"memory": GIB, "disk": 2 * GIB, "shared memory": GIB // 2, "open files": 1024}  # bytes; files
TIME_LIMIT = 60.0  # seconds that two processes have to start, meet and sum
OPTIONAL = {  # package: our extra, if any
    "peft": "lora", "ray": "ray", "aiohttp": "server", "vllm": "", "sglang": "", "liger-kernel": "", "triton": "",
}  # fmt: skip
NVIDIA = Path("/dev/nvidiactl")  # exists where a driver serves this host or container


@dataclass(frozen=True)
class Diagnosis:
    """What one check found; `mistake` is None where all is well."""

    name: str
    text: str
    mistake: UserError | None = None

    def values(self) -> dict[str, str | bool]:
        """Returns the finding as JSON holds it."""
        found: dict[str, str | bool] = {"check": self.name, "ok": self.mistake is None}
        if self.mistake is None:
            return found | {"found": self.text}
        return found | {"what": self.mistake.what, "why": self.mistake.why, "fix": self.mistake.fix}

    def line(self) -> str:
        """Returns the finding as a line for a reader; a mistake has its reason and its remedy below."""
        return f"{self.name:<14} {self.text if self.mistake is None else f'PROBLEM: {self.mistake}'}"


def examine(*, time_limit: float = TIME_LIMIT) -> Iterator[Diagnosis]:
    """Runs all checks, and yields the finding of each as soon as it is known.

    Args:
        time_limit: seconds for the collective of two processes.
    """
    checks: dict[str, Callable[[], str]] = {
        "python": lambda: f"{platform.python_version()} on {platform.platform()}",
        **{name: partial(_version, name) for name in ("torch", "transformers", *OPTIONAL)},
        "devices": _devices,
        "cores": lambda: f"{count_devices(CPU)} that this process may use",
        "memory": lambda: _room("memory", *memory_of(torch.device("cpu")), "close other programs"),
        "disk": _disk,
        "shared memory": _shared_memory,
        "open files": _open_files,
        "sockets": lambda: f"temporary files are in {tempfile.gettempdir()}, sockets in {try_socket()}",
        "free port": _free_port,
        "collective": lambda: _collective(time_limit),
    }
    for name, check in checks.items():
        try:
            yield Diagnosis(name, check())
        except UserError as mistake:
            yield Diagnosis(name, "", mistake)


def _version(package: str) -> str:
    """Returns the version of a package, compared with what hybridflow requires."""
    extra = OPTIONAL.get(package, "")
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed" + f": pip install 'hybridflow[{extra}]'" * bool(extra)
    for text in importlib.metadata.requires("hybridflow") or []:
        wanted = Requirement(text)
        mine = wanted.marker is None or wanted.marker.evaluate({"extra": extra})
        if wanted.name == package and mine and not wanted.specifier.contains(found, prereleases=True):
            raise UserError(
                f"{package} {found} is installed, and hybridflow needs {wanted.specifier}",
                fix=f"pip install '{package}{wanted.specifier}'",
            )
    if package == "torch":
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
        return f"{found}, built for {built if torch.version.cuda or torch.version.hip else 'the CPU'}"
    return found


def _devices() -> str:
    kind = kind_of()
    if kind is CPU:
        if NVIDIA.exists():
            raise UserError(
                "this host has an NVIDIA driver, but torch finds no GPU",
                why=_why_no_gpu(),
                fix="install a CUDA build of torch that the driver supports, and look at CUDA_VISIBLE_DEVICES",
            )
        return "no accelerator: the CPU computes"
    devices = [pick_device(local_rank=rank) for rank in range(count_devices(kind))]
    return f"{len(devices)} x {kind.name}: " + "; ".join(_try_device(device, kind) for device in devices)


def _why_no_gpu() -> str:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    try:
        torch.cuda.init()
    except Exception as error:  # torch's message is the reason that we pass on
        return f"{type(error).__name__}: {error}"
    return f"CUDA_VISIBLE_DEVICES is {os.environ.get('CUDA_VISIBLE_DEVICES')!r}"


def _try_device(device: torch.device, kind: DeviceKind) -> str:
    """Returns name and memory of a device, after it multiplied two matrices."""
    try:
        ones = torch.ones(64, 64, device=device)
        assert float((ones @ ones).sum()) == 64**3
        synchronize(device)
    except RuntimeError as error:
        raise UserError(
            f"{device} cannot multiply two matrices",
            why=f"{type(error).__name__}: {str(error).splitlines()[0]}",
            fix=f"install a build of torch for this device, or leave it out with {kind.visible}",
        ) from error
    free, total = memory_of(device)
    return f"{device} {name_of(device)}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"


def _room(what: str, free: int, total: int, fix: str, why: str = "") -> str:
    if free < NEEDED[what]:
        raise UserError(f"{free / GIB:.2f} GiB of {what} is free, of {total / GIB:.1f} GiB", why=why, fix=fix)
    return f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"


def _disk() -> str:
    here = shutil.disk_usage(".")
    return _room("disk", here.free, here.total, f"make room on the disk of {Path.cwd()}") + " in this folder"


def _shared_memory() -> str:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return "this system has no /dev/shm"
    room = shutil.disk_usage(folder)
    return _room(
        "shared memory", room.free, room.total, "in Docker, start the container with --shm-size=8g or --ipc=host",
        "weights between processes, and Ray's objects, are in /dev/shm",
    )  # fmt: skip


def _open_files() -> str:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < NEEDED["open files"]:
        raise UserError(
            f"a process may have only {soft} files open",
            why="every connection between processes is one",
            fix="ulimit -n 65536, in the shell that starts the job",
        )
    return f"a process may have {soft} open (ulimit -n), at most {hard}"


def _free_port() -> str:
    try:
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            return f"{server.getsockname()[1]} on 127.0.0.1; this host is {socket.gethostname()}"
    except OSError as error:
        raise UserError(
            "no port can be opened on 127.0.0.1",
            why=str(error),
            fix="allow local TCP connections; processes meet there",
        ) from error


def _collective(time_limit: float) -> str:
    """Runs a sum over two processes: over gloo, and between two devices where there are two."""
    kind = kind_of()
    two = kind is not CPU and count_devices(kind) >= 2
    seconds = _two_processes("cpu", time_limit)
    said = f"gloo: 2 processes started, met and summed 16 MiB in {seconds:.1f} s"
    if two:
        seconds = _two_processes(kind.torch_type, time_limit)
        said += f"; {kind.backend.split(':')[-1]}: 2 devices in {seconds:.1f} s"
    return said


def _two_processes(wanted: str, time_limit: float) -> float:
    """Returns the seconds until both processes have the sum."""
    began = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ours, theirs = context.Pipe(duplex=False)
    processes = [context.Process(target=_sum_with_other, args=(rank, port, wanted, theirs)) for rank in range(2)]
    try:
        for process in processes:
            process.start()
        theirs.close()
        for _ in processes:
            _expect_done(ours, began + time_limit - time.monotonic(), wanted, time_limit)
    finally:
        for process in processes:
            process.kill()
            process.join()
    return time.monotonic() - began


def _expect_done(answers: Connection, seconds: float, wanted: str, time_limit: float) -> None:
    backend = kind_of(wanted).backend.split(":")[-1]
    try:
        error = answers.recv() if answers.poll(max(0.0, seconds)) else f"they did not end within {time_limit:g} seconds"
    except EOFError:
        error = "both processes died"
    if error is not None:
        raise UserError(
            f"two processes on this host cannot sum a tensor over {backend}",
            why=error,
            fix="see that a firewall lets 127.0.0.1 pass and the host's own name resolves, or name the interface: "
            "GLOO_SOCKET_IFNAME=lo" + (", NCCL_SOCKET_IFNAME=lo, NCCL_DEBUG=INFO" if backend == "nccl" else ""),
        )


def _sum_with_other(rank: int, port: int, wanted: str, answers: Connection) -> None:
    """Runs in each of the two processes; returns None, or the error as text."""
    try:
        device = pick_device(wanted, local_rank=rank)
        dist.init_process_group(
            kind_of(wanted).backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2,
            timeout=timedelta(seconds=TIME_LIMIT),
        )  # fmt: skip
        ones = torch.ones(4 * 2**20, device=device)
        dist.all_reduce(ones)
        assert bool((ones == 2).all()), "the sum is wrong"
        dist.destroy_process_group()
        answers.send(None)
    except Exception as error:  # passed on to the user, as the reason
        answers.send(f"{type(error).__name__}: {error}")
