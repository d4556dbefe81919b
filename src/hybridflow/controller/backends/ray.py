"""Processes of a Ray cluster: one actor for each place, in a placement group for each pool.

Without an address a local instance is started, which ends with the run. The encoded message of a call is put into
Ray's object store once, however many places it goes to. Nothing is uploaded: workers import from the folders that the
controller imports from, and work in the same folder, so that several hosts need a file system in common.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hybridflow.config.sections.placement import PlacementSection
from hybridflow.controller.backend import check_devices
from hybridflow.controller.codec import Frame, Frames
from hybridflow.controller.meeting import meeting_point
from hybridflow.controller.messages import Lost, Meeting, Place, WorkerCall, WorkerReply
from hybridflow.controller.worker import WorkerHost, keep_beating, read_box
from hybridflow.devices import CPU, count_devices, kind_of, memory_of, pick_device
from hybridflow.errors import UserError
from hybridflow.sockets import socket_parent

try:
    import ray
    from ray.exceptions import GetTimeoutError, ObjectStoreFullError, OutOfDiskError, RayActorError, RayError
    from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy
except ModuleNotFoundError as missing:
    raise UserError(
        "placement.backend is ray, and Ray is not installed", fix="pip install 'hybridflow[ray]'"
    ) from missing

MIB = 2**20
INLINE = 100_000  # bytes of a message that is sent with the call itself, as Ray does with small arguments
STORE = (80 * MIB, 8 * 2**30)  # least and most bytes of a local instance's object store; Ray refuses less than 75 MiB
ANSWER_SECONDS = 5.0  # seconds for a port to show that it is open
PROBE_SECONDS = 20.0  # seconds for a cluster to let another process join; Ray itself would try for minutes
GATHER_SECONDS = 60.0  # seconds for a pool's devices to become free
START_SECONDS = 120.0  # seconds for actors to be there
END_SECONDS = 5.0  # seconds for actors that were asked to end, or killed
FORWARDED = re.compile(r"(OMP|MKL|HF|TOKENIZERS|TRANSFORMERS|HYBRIDFLOW|NCCL|GLOO|HCCL|TORCH|PYTORCH|VLLM|CUBLAS)_.*")
UNIT = {"cuda": "GPU", "npu": "NPU"}  # Ray's name of a device, by torch's type
PROBE = "import sys, ray; ray.init(address=sys.argv[1], log_to_driver=False, logging_level='error')"
QUIET = {"log_to_driver": False, "logging_level": "error"}


@dataclass(frozen=True)
class RayStart:
    """The arguments of an actor before its first call."""

    place: Place
    device: str
    meeting: Meeting
    box: Path
    folder: str
    imports: list[str]
    threads: int | None
    neighbours: int  # processes of this host, itself among them


class RayHost:
    """A `WorkerHost` as a Ray actor. Calls run one after the other; the groups "tell" and "life" have threads of their
    own.
    """

    def __init__(self) -> None:
        self._over = threading.Event()

    def prepare(self, start: RayStart) -> int:
        """Makes the host; returns the process.

        Raises:
            UserError: the controller's folder is not on this node.
        """
        if not Path(start.folder).is_dir():
            raise UserError(
                f"the folder {start.folder} of the controller is not on host {socket.gethostname()}",
                why="workers read models, data and code from the same folders as the controller",
                fix="put them on a file system that all hosts of the Ray cluster have in common",
            )
        os.chdir(start.folder)
        sys.path.extend(entry for entry in start.imports if entry not in sys.path)
        torch.set_num_threads(start.threads or max(1, count_devices(CPU) // start.neighbours))
        device = pick_device(start.device, 0)  # Ray shows a process only those devices that are its own
        if device.type != "cpu":
            torch.accelerator.set_device_index(device)
        start.box.parent.mkdir(exist_ok=True)
        self._host = WorkerHost(start.place, device, start.meeting, start.box)
        threading.Thread(target=keep_beating, args=(self._host,), daemon=True).start()
        return os.getpid()

    def perform(self, frames: Frames) -> list[pickle.PickleBuffer]:
        """Performs a message and returns the reply."""
        return _sendable(self._host.reply(_owned(frames)).frames)

    @ray.method(concurrency_group="tell")  # type: ignore[untyped-decorator]
    def where(self, id: int) -> list[pickle.PickleBuffer]:
        """Reports where the process stands, while a call runs."""
        return _sendable(WorkerReply(id, "where", self._host.standing()).frames)

    @ray.method(concurrency_group="life")  # type: ignore[untyped-decorator]
    def live(self) -> None:
        """Returns when the actor is closed: the call fails if the process ends before."""
        self._over.wait()

    def close(self) -> None:
        """Lets the actor finish and end."""
        self._host.close()
        self._over.set()


class RayBackend:
    """The back end of a Ray cluster.

    Args:
        placement: its address, port, and the time limit of collectives.
        device: ``run.device``.
        threads: of each process; None shares the cores of a host among its processes.
    """

    passes_exceptions = False

    def __init__(self, placement: PlacementSection, device: str, threads: int | None) -> None:
        self._address, self._port, self._timeout = placement.address, placement.port or 0, placement.timeout
        self._device, self._threads = device, threads
        self._folder = Path(tempfile.mkdtemp(prefix="hybridflow-"))
        self._connected = False  # by us
        self._groups: dict[str, Any] = {}  # a placement group for each pool
        self._bundles: dict[Place, int] = {}  # in these
        self._nodes: dict[Place, str] = {}
        self._processes: list[int] = []  # of this host
        self._actors: dict[Place, Any] = {}
        self._lives: dict[Any, Place] = {}
        self._calls: dict[Any, Place] = {}
        self._put: weakref.WeakKeyDictionary[WorkerCall, Any] = weakref.WeakKeyDictionary()

    def check(self, places: Sequence[Place]) -> Iterable[str]:
        """Connects to the cluster, and reserves what the pools need."""
        with self._leaving_on_error():
            if self._address is None and not ray.is_initialized():
                yield from check_devices(places, self._device)
                self._device = kind_of(self._device).torch_type
                self._init(address="local", include_dashboard=False, num_cpus=max(len(places), count_devices(CPU)),
                           object_store_memory=_store_bytes())  # fmt: skip
            else:
                self._join()
                if self._device == "auto":
                    has = ray.cluster_resources()
                    self._device = next((kind for kind, unit in UNIT.items() if has.get(unit)), "cpu")
            yield from self._reserve(places)
            self._store = meeting_point(ray.util.get_node_ip_address(), self._port)

    def start(self, places: Sequence[Place]) -> None:
        """Starts an actor for each place, and waits for them: a host may lack our code or our folder."""
        with self._leaving_on_error():
            meeting = Meeting(self._store.host, self._store.port, "pools", self._timeout)
            environment = {name: value for name, value in os.environ.items() if FORWARDED.fullmatch(name)}
            imports = [os.path.abspath(entry) for entry in sys.path]
            neighbours = Counter(self._nodes.values())
            actor = ray.remote(concurrency_groups={"tell": 1, "life": 1})(RayHost)
            ready = {}
            for place in places:
                self._actors[place] = actor.options(
                    **self._needs(), runtime_env={"env_vars": environment},
                    scheduling_strategy=PlacementGroupSchedulingStrategy(
                        self._groups[place.pool], self._bundles[place]
                    ),
                ).remote()  # fmt: skip
                start = RayStart(place, self._device, meeting, self._box(place), os.getcwd(), imports, self._threads,
                              neighbours[self._nodes[place]])  # fmt: skip
                ready[place] = self._actors[place].prepare.remote(start)
            for place, ref in ready.items():
                process = _wait_for_start(place, ref)
                if self._is_here(place):
                    self._processes.append(process)
                self._lives[self._actors[place].live.remote()] = place

    def send(self, place: Place, request: WorkerCall) -> None:
        """Sends a request as a call of the actor; a large message goes through the object store, where it is put
        once.
        """
        actor = self._actors[place]
        if request.kind == "where":
            ref = actor.where.remote(request.id)
        else:
            ref = actor.perform.remote(self._message(request))
        self._calls[ref] = place

    def receive(self, timeout: float) -> Sequence[tuple[Place, WorkerReply | Lost]]:
        """Returns the replies of actors, and those actors whose process has ended."""
        refs = [*self._lives, *self._calls]
        if not refs:
            time.sleep(timeout)
            return []
        ray.wait(refs, num_returns=1, timeout=timeout)
        ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        came: list[tuple[Place, WorkerReply | Lost]] = []
        for ref in ready:
            if ref in self._calls:
                place = self._calls.pop(ref)
                with contextlib.suppress(RayActorError), _room():  # `live` reports a dead actor
                    came.append((place, WorkerReply.read(_owned(ray.get(ref)))))
            else:
                place = self._lives.pop(ref)
                try:
                    ray.get(ref)
                except RayActorError as error:
                    came.append((place, _lost(str(error), self._nodes[place])))
        return came

    def box(self, place: Place) -> Mapping[str, Any]:
        """Reads the process's file on its host."""
        if self._is_here(place):
            return read_box(self._box(place))
        task = ray.remote(num_cpus=0)(read_box)
        here = NodeAffinitySchedulingStrategy(self._nodes[place], soft=False)
        with contextlib.suppress(RayError):  # the whole host is gone: nothing is known
            return dict(ray.get(task.options(scheduling_strategy=here).remote(self._box(place)), timeout=END_SECONDS))
        return {}

    def kill(self) -> None:
        """Has Ray end the actors' processes."""
        for actor in self._actors.values():
            with contextlib.suppress(RayError):  # the cluster itself may be gone
                ray.kill(actor)
        until = time.monotonic() + END_SECONDS
        while any(Path("/proc", str(process)).exists() for process in self._processes) and time.monotonic() < until:
            time.sleep(0.02)
        self._leave()

    def close(self) -> None:
        """Ends the actors, which leave their process groups first."""
        closing = [actor.close.remote() for actor in self._actors.values()]
        if closing:
            ray.wait(closing, num_returns=len(closing), timeout=END_SECONDS)
        self.kill()

    # --- joining a cluster, and leaving it ---

    def _init(self, **settings: Any) -> None:
        handler = signal.getsignal(signal.SIGTERM)
        os.environ.setdefault("RAY_TMPDIR", socket_parent())  # of a local instance: its sockets are there
        ray.init(**settings, **QUIET)
        self._connected = True
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray takes it over; a run saves a checkpoint first

    def _join(self) -> None:
        if ray.is_initialized() and self._address in (None, "auto", ray.get_runtime_context().gcs_address):
            return
        assert self._address is not None
        if "://" in self._address:
            raise UserError(
                f"placement.address {self._address} is of Ray's client",
                why="the controller is a process of the cluster",
                fix="start it on a host of the cluster, with placement.address=auto, or as a job (docs/cluster.md)",
            )  # fmt: skip
        nobody = f"no Ray cluster answers at placement.address {self._address}"
        fix = (
            "check that `ray start --head` runs there, and on this host `ray start --address=...`; or leave it out: a "
        )
        fix += "local instance is then started"
        if self._address != "auto":
            host, _, port = self._address.rpartition(":")
            try:
                socket.create_connection((host, int(port)), timeout=ANSWER_SECONDS).close()
            except (OSError, ValueError) as error:
                raise UserError(nobody, why=str(error), fix=fix) from error
        probe = [sys.executable, "-c", PROBE, self._address]
        try:
            tried = subprocess.run(probe, capture_output=True, text=True, timeout=PROBE_SECONDS)
        except subprocess.TimeoutExpired as error:
            why = f"the port is open, but nothing joined within {PROBE_SECONDS:g} seconds"
            raise UserError(nobody, why=why, fix=fix) from error
        if tried.returncode:
            raise UserError(nobody, why=(tried.stderr.strip().splitlines() or ["it ended"])[-1], fix=fix)
        self._init(address=self._address)

    @contextlib.contextmanager
    def _leaving_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.kill()
            raise

    def _leave(self) -> None:
        for group in self._groups.values():
            with contextlib.suppress(RayError):
                remove_placement_group(group)
        if self._connected:
            ray.shutdown()
        self._groups, self._actors, self._lives, self._calls, self._processes = {}, {}, {}, {}, []
        self._connected = False
        shutil.rmtree(self._folder, ignore_errors=True)

    # --- devices ---

    def _needs(self) -> dict[str, Any]:
        """Returns the resources that Ray reserves for one process."""
        if self._device == "cpu":
            return {"num_cpus": 1}
        return {"num_cpus": 1, **({"num_gpus": 1} if self._device == "cuda" else {"resources": {"NPU": 1}})}

    def _reserve(self, places: Sequence[Place]) -> Iterator[str]:
        """Reserves a placement group for each pool, on as few hosts as possible."""
        unit = UNIT.get(self._device, "CPU")
        until = time.monotonic() + min(GATHER_SECONDS, self._timeout)
        for pool, size in {place.pool: place.size for place in places}.items():
            self._groups[pool] = placement_group([{"CPU": 1} | {unit: 1}] * size, strategy="PACK")
            if self._groups[pool].wait(1):
                continue
            has, free = (int(found.get(unit, 0)) for found in (ray.cluster_resources(), ray.available_resources()))
            there = f"the Ray cluster has {has} ({unit}), of which {free} are free, on {len(ray.nodes())} hosts"
            yield f"pool {pool!r} waits for {size} {unit}s: {there}"
            if not self._groups[pool].wait(max(0.0, until - time.monotonic())):
                raise UserError(
                    f"pool {pool!r} lacks {unit}s: it needs {size}, each with a CPU, and they were not free in time",
                    why=there,
                    fix="make placement.pools smaller, put roles into one pool, or add hosts to the cluster",
                )
        for pool, group in self._groups.items():
            nodes = placement_group_table(group)["bundles_to_node_id"]
            by_node = sorted(nodes, key=lambda bundle: (nodes[bundle], bundle))  # ranks of one host stand together
            for place in places:
                if place.pool == pool:
                    self._bundles[place] = by_node[place.rank]
                    self._nodes[place] = nodes[by_node[place.rank]]

    def _is_here(self, place: Place) -> bool:
        return bool(self._nodes[place] == ray.get_runtime_context().get_node_id())

    def _box(self, place: Place) -> Path:
        return self._folder / f"{place.index}.json"

    def _message(self, request: WorkerCall) -> Any:
        frames = _sendable(request.frames)
        size = sum(memoryview(frame).nbytes for frame in request.frames)
        if size <= INLINE:
            return frames
        if request not in self._put:
            with _room(f" for a message of {size / MIB:.0f} MiB"):
                self._put[request] = ray.put(frames)
        return self._put[request]


def _wait_for_start(place: Place, ref: Any) -> int:
    try:
        return int(ray.get(ref, timeout=START_SECONDS))
    except GetTimeoutError as error:
        raise UserError(
            f"{place} did not start within {START_SECONDS:g} seconds", fix="look at Ray's logs: ray logs"
        ) from error
    except UserError as error:
        raise UserError(error.what, why=error.why, fix=error.fix) from None  # without Ray's traceback
    except RayError as error:
        raise UserError(
            f"{place} cannot start",
            why=str(error).strip().splitlines()[-1],
            fix="install the same Python, hybridflow and torch on all hosts of the cluster",
        ) from error


def _store_bytes() -> int:
    """Returns the size of a local instance's object store: a quarter of memory, and not more than shared memory
    holds.
    """
    free, _ = memory_of(torch.device("cpu"))
    if Path("/dev/shm").is_dir():
        free = min(free, 2 * shutil.disk_usage("/dev/shm").free)
    return max(STORE[0], min(STORE[1], free // 4))


def _sendable(frames: Frames) -> list[pickle.PickleBuffer]:
    return [pickle.PickleBuffer(frame) for frame in frames]  # Ray copies these into its store, and nothing else


def _owned(frames: Sequence[Any]) -> list[Frame]:
    """Copies frames out of the object store, where all processes of a host see the same bytes."""
    return [memoryview(bytearray(frame)) for frame in frames]


def _lost(text: str, node: str) -> Lost:
    """Describes an actor that died, from Ray's report of it and of its host."""
    if "low on memory" in text:
        return Lost("ended by Ray, because its host ran low on memory", signal.SIGKILL)
    if "node has died" in text or any(n["NodeID"] == node and not n["Alive"] for n in ray.nodes()):
        return Lost("its host left the Ray cluster")
    return Lost("its process was killed (Ray does not report how; most likely signal 9)", signal.SIGKILL)


@contextlib.contextmanager
def _room(what: str = "") -> Iterator[None]:
    """Reports what to do where Ray has no room left for an object."""
    try:
        yield
    except (ObjectStoreFullError, OutOfDiskError) as error:
        raise UserError(
            f"Ray's object store has no room left{what}",
            why=str(error).strip().splitlines()[0],
            fix="make room on the disk that Ray spills to (/tmp/ray), or give the store more memory "
            "(ray start --object-store-memory=BYTES); smaller steps send less (train.prompts_per_step)",
        ) from error
