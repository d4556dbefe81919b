"""The first cause of a failure: how it is found among everything that fails with it, and how it is reported.

When one process of a pool dies, raises, or stops, the others fail after it: their collectives lose a peer or run out of
time. `first_cause` picks what came first:

1. a process that ended without being asked to;
2. else the earliest exception that is not about a connection;
3. else, of the processes that have not answered, one whose stack is not in a collective: the others wait for it;
4. else the earliest exception of any kind, or where all of them stand.
"""

from __future__ import annotations

import re
import resource
import signal
import sys
import sysconfig
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybridflow.batch import Batch
from hybridflow.controller.messages import Lost, Place
from hybridflow.errors import UserError

FRAMES = 5  # lines of a stack, in a report
INNERMOST = 3  # lines of a stack that show whether it waits in a collective; a whole forward pass is inside of FSDP1's
MIB = 2**20
LIBRARIES = (sysconfig.get_path("purelib"), sysconfig.get_path("stdlib"))
CONNECTION = re.compile(
    r"gloo|nccl|hccl|connection (?:was )?(?:closed|reset|refused)|broken pipe|socket|DistNetwork|DistStore|DistBackend",
    re.IGNORECASE,
)
MEMORY_FIX = (
    "lower train.tokens_per_microbatch, or cut the model over more processes (placement.pools, engine.strategy=fsdp2)"
)


class WorkerFailure(UserError):
    """A worker failed, and the attempt has ended: one report of the first cause."""


@dataclass(frozen=True)
class CallFailure:
    """An exception that ended a call of a worker.

    Args:
        error: type and message.
        frames: the innermost of the user's and our own lines, the innermost last.
        time: when, in seconds since 1970.
        doing: what the worker was doing (see `Host`), with its process and memory.
        mistake: what, why and fix of a `UserError`.
        connection: it is about a connection to another process, which then failed first.
    """

    error: str
    frames: tuple[str, ...]
    time: float
    doing: dict[str, Any]
    mistake: tuple[str, str, str] | None = None
    connection: bool = False


@dataclass(frozen=True)
class Standing:
    """The state of a process while it works on a call.

    Args:
        idle: seconds since it last began something or reported progress.
        collective: whether it waits in a collective.
        frames: the innermost lines.
        doing: its current work.
    """

    idle: float
    collective: bool
    frames: tuple[str, ...]
    doing: dict[str, Any]


@dataclass
class Evidence:
    """The facts about a failed attempt: of every process at most one loss or failure, in order of arrival."""

    lost: dict[Place, Lost] = field(default_factory=dict)
    failed: dict[Place, CallFailure] = field(default_factory=dict)
    standing: dict[Place, Standing] = field(default_factory=dict)
    silent: list[Place] = field(default_factory=list)  # asked where they stand, without a reply
    boxes: dict[Place, Mapping[str, Any]] = field(default_factory=dict)

    def primary(self) -> bool:
        """Returns whether there is something that is not a consequence of something else."""
        return bool(self.lost) or any(not f.connection for f in self.failed.values())

    def apart(self, timeout: float) -> list[Place]:
        """Returns the processes that others wait for: not in a collective, without a reply, and late or of a failed
        pool.
        """
        pools = {place.pool for place in self.failed}
        standing = [p for p, s in self.standing.items() if not s.collective and p not in self.failed]
        return self.silent + [p for p in standing if p.pool in pools or self.standing[p].idle > timeout]

    def count(self) -> int:
        """Counts the processes that have failed."""
        return len(self.lost.keys() | self.failed.keys())


# --- in the worker ---


def failed(error: BaseException, doing: Mapping[str, Any]) -> CallFailure:
    """Describes an exception, at the place where it was caught."""
    text = "".join(traceback.format_exception_only(error)).strip()
    if error.__cause__ is not None:
        text += f" (from {type(error.__cause__).__name__}: {error.__cause__})"
    mistake = (error.what, error.why, error.fix) if isinstance(error, UserError) else None
    frames = _lines(traceback.extract_tb(error.__traceback__))
    connection = mistake is None and CONNECTION.search(text) is not None
    memory = {"resident": resident_bytes(), "peak": peak_bytes()}
    return CallFailure(text, frames, time.time(), {**doing, **memory}, mistake, connection)


def standing(thread: int | None, idle: float, doing: Mapping[str, Any]) -> Standing:
    """Describes where a thread of this process is; a backward pass on a device waits in threads of its own."""
    everywhere = sys._current_frames()
    frame = everywhere.get(thread or 0)
    stack = traceback.extract_stack(frame) if frame is not None else traceback.StackSummary()
    waits = any(
        "torch/distributed/" in entry.filename.replace("\\", "/")
        for f in everywhere.values()
        for entry in traceback.extract_stack(f)[-INNERMOST:]
    )
    memory = {"resident": resident_bytes(), "peak": peak_bytes()}
    return Standing(idle, waits, _lines(stack), {**doing, **memory})


def _lines(stack: Sequence[traceback.FrameSummary]) -> tuple[str, ...]:
    """Returns the innermost lines outside of libraries and of this room; all of them, where there is no other."""
    own = [f for f in stack if not f.filename.startswith((*LIBRARIES, str(Path(__file__).parent), "<"))]
    chosen = list(own or stack)[-FRAMES:]
    return tuple(f"{_short(f.filename)}:{f.lineno} in {f.name}: {f.line}" for f in chosen)


def _short(file: str) -> str:
    path = Path(file)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(Path(*path.parts[-3:]))


def describe_rows(arguments: Iterable[Any]) -> str:
    """Describes the sequences among the arguments of a call, in words."""
    said = []
    for batch in arguments:
        if not isinstance(batch, Batch):
            continue
        text = f"{len(batch)} sequence" + "s" * (len(batch) != 1)
        if "T" in batch.offsets and len(batch):
            text += f" of {batch.total()} tokens, the longest {int(batch.lengths().max())}"
        if "row" in batch:
            rows = batch.objects("row")
            text += f"; rows {', '.join(str(r) for r in rows[:8])}" + ", ..." * (len(rows) > 8)
        said.append(text)
    return "; ".join(said)


def resident_bytes() -> int:
    """Returns the memory of this process now; its peak on systems that report no other."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return peak_bytes()
    return int(statm.read_text(encoding="ascii").split()[1]) * resource.getpagesize()


def peak_bytes() -> int:
    """Returns the most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# --- in the controller ---


def first_cause(evidence: Evidence, timeout: float) -> UserError:
    """Returns the one report of a failed attempt; of a `UserError` in a worker, that error."""
    if evidence.lost:
        place = next(iter(evidence.lost))
        return _lost(place, evidence)
    order = sorted(evidence.failed, key=lambda p: (evidence.failed[p].connection, evidence.failed[p].time))
    if order and evidence.primary():
        return _raised(order[0], evidence)
    if apart := evidence.apart(timeout):
        return _hangs(apart[0], evidence, timeout)
    if order:
        return _raised(order[0], evidence)
    return _all_wait(evidence, timeout)


def _lost(place: Place, evidence: Evidence) -> WorkerFailure:
    lost, doing = evidence.lost[place], evidence.boxes.get(place, {})
    fix = "look at what its process printed; the run resumes from its newest checkpoint"
    why = lost.how
    if lost.signal == signal.SIGKILL:
        why += "; the kernel kills processes that run out of memory this way (`dmesg` says so), and so does a scheduler"
        fix = MEMORY_FIX
    elif lost.signal in (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGABRT):
        why += ": it crashed in native code"
    return _report(place, doing, f"{lost.how}", why, fix, evidence)


def _raised(place: Place, evidence: Evidence) -> UserError:
    failure = evidence.failed[place]
    if failure.mistake is not None:
        what, why, fix = failure.mistake
        return UserError(what, why=why, fix=fix)
    lines = [failure.error, *failure.frames]
    fix = "mend what raised it; the run resumes from its newest checkpoint"
    if re.search("MemoryError|out of memory|OutOfMemory", failure.error):
        fix = MEMORY_FIX
    elif failure.connection:
        fix = "every rank must make the same collectives, of the same sizes, in the same order; else check the network"
    return _report(place, failure.doing, failure.error.splitlines()[0], "\n    ".join(lines), fix, evidence)


def _hangs(place: Place, evidence: Evidence, timeout: float) -> WorkerFailure:
    here = evidence.standing.get(place)
    fix = "find out why it makes no progress; if it only needs longer, raise placement.timeout"
    if here is None:
        why = f"no progress for {timeout:g} seconds (placement.timeout), and it does not report where it stands: its"
        why += " process is stopped, or in native code"
        return _report(place, evidence.boxes.get(place, {}), "hangs", why, fix, evidence)
    waiting = len({p for p, s in evidence.standing.items() if s.collective} | evidence.failed.keys())
    why = f"no progress for {here.idle:.0f} seconds (placement.timeout is {timeout:g})"
    why += f"; {waiting} other{'s wait' if waiting > 1 else ' waits'} for it in a collective" if waiting else ""
    return _report(place, here.doing, "hangs", "\n    ".join([why + "; it stands at", *here.frames]), fix, evidence)


def _all_wait(evidence: Evidence, timeout: float) -> WorkerFailure:
    place = next(iter(evidence.standing))
    stacks = [f"{p}: {(s.frames or ('nowhere',))[-1]}" for p, s in evidence.standing.items()]
    why = "\n    ".join([f"all have waited in a collective for {timeout:g} seconds (placement.timeout)", *stacks])
    fix = (
        "every rank must make the same collectives in the same order; if they only need longer, raise placement.timeout"
    )
    return _report(place, evidence.standing[place].doing, "hangs", why, fix, evidence)


def _report(place: Place, doing: Mapping[str, Any], what: str, why: str, fix: str, evidence: Evidence) -> WorkerFailure:
    worker = f"{doing['worker']}.{place.rank}" if "worker" in doing else f"of {place}"
    method = doing.get("method", "start")
    step = f" of step {doing['step']}" if "step" in doing else ""
    lines = [
        why,
        f"worker: {worker}, {place}, process {doing.get('process', 'unknown')}",
        f"phase: {method}{step}",
        f"memory then: {_mib(doing.get('resident'))} (peak {_mib(doing.get('peak'))})",
        f"rows in hand: {doing.get('rows') or 'none'}",
    ]
    others = evidence.count() - (place in evidence.lost or place in evidence.failed)
    if others:
        lines.append(f"after it: {others} other worker{'s' * (others > 1)} failed")
    return WorkerFailure(f"worker {worker} failed in {method}{step}: {what}", why="\n  ".join(lines), fix=fix)


def _mib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / MIB:.0f} MiB"
