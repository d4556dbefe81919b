"""Checkpoints: a folder is complete or absent, and its manifest proves it.

    checkpoints/step-000010/
        ...                     what the engines wrote
        state.json              step, data, counters
        manifest.json           size and hash of every file above

It is written to a hidden folder beside, and renamed when all of it is on disk. ``checkpoints/best.json`` names the one
that is best by a held-out metric, where a run asks for that; it is not deleted with the old ones.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from hybridflow.errors import UserError
from hybridflow.faults import fault_point

MANIFEST, STATE = "manifest.json", "state.json"
BEST = "best.json"
HASHES = 4  # files that are hashed at a time


@dataclass(frozen=True, slots=True)
class Best:
    """The step that was best so far.

    Args:
        step: the step.
        metric: by which metric.
        value: its value.
    """

    step: int
    metric: str
    value: float


def step_folder(checkpoints: Path, step: int) -> Path:
    """Returns the folder of a step's checkpoint."""
    return checkpoints / f"step-{step:06d}"


def saved_steps(checkpoints: Path) -> list[int]:
    """Returns the steps with a complete checkpoint, ascending."""
    return sorted(int(p.name.removeprefix("step-")) for p in checkpoints.glob("step-*") if (p / MANIFEST).is_file())


@dataclass(frozen=True, slots=True)
class NewCheckpoint:
    """A checkpoint that is being written: begun, filled by the engines, and completed, whole or not at all.

    Args:
        checkpoints: the run's ``checkpoints/``.
        step: the step that is done.
        run_state: plain values: everything but what engines keep.
        keep: how many of the newest to keep.
        best: the best step so far, this one or one that is saved already; ``best.json`` will name it.
    """

    checkpoints: Path
    step: int
    run_state: Mapping[str, Any]
    keep: int
    best: Best | None = None

    @property
    def folder(self) -> Path:
        """The folder that engines write into, aside until the checkpoint is complete."""
        return _aside(step_folder(self.checkpoints, self.step))

    def begin(self) -> None:
        """Makes the folder, and writes the run's state into it: as it is now, whatever the run does next."""
        _make_empty(self.folder)
        state = {"step": self.step, "run": dict(self.run_state)}
        (self.folder / STATE).write_text(json.dumps(state, indent=1))

    def complete(self) -> None:
        """Makes a checkpoint of what engines have written, and deletes old ones beyond `keep`, except the best."""
        fault_point("save", self.step)
        _write_manifest(self.folder)
        _take_place(self.folder, step_folder(self.checkpoints, self.step))
        if self.best is not None:  # before the best one until now is deleted: what best.json names always exists
            write_best(self.checkpoints, self.best)
        for old in saved_steps(self.checkpoints)[: -self.keep]:
            if self.best is None or old != self.best.step:
                shutil.rmtree(step_folder(self.checkpoints, old))

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Wraps all of the above: after an error nothing half written is left, and what was saved before stands.

        Raises:
            UserError: the disk is full or not writable.
        """

        def refused(error: Exception) -> UserError:
            stands = saved_steps(self.checkpoints) if self.checkpoints.is_dir() else []
            return UserError(
                f"the checkpoint of step {self.step} could not be saved: {error}",
                why=f"the checkpoint of step {stands[-1]} still stands" if stands else "there is no earlier checkpoint",
                fix=f"make room on the disk of {self.checkpoints} and run the same command again",
            )

        with _leaving_nothing(self.folder, refused):
            yield


@contextmanager
def whole_folder(target: Path, refused: Callable[[Exception], UserError]) -> Iterator[Path]:
    """Yields an empty folder to fill, which takes the place of `target` when all of it is on disk.

    Args:
        target: where it will stand; what stands there is replaced, or stays as it is after an error.
        refused: makes the error where the disk is full or not writable.

    Raises:
        UserError: what `refused` returns.
    """
    aside = _aside(target)
    with _leaving_nothing(aside, refused):
        _make_empty(aside)
        yield aside
        _take_place(aside, target)


def _aside(target: Path) -> Path:
    return target.with_name(f".partial-{target.name}")


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _take_place(aside: Path, target: Path) -> None:
    _sync_tree(aside)
    if target.exists():
        shutil.rmtree(target)
    os.replace(aside, target)
    _sync_folder(target.parent)


@contextmanager
def _leaving_nothing(aside: Path, refused: Callable[[Exception], UserError]) -> Iterator[None]:
    try:
        yield
    except BaseException as error:  # Ctrl-C too
        shutil.rmtree(aside, ignore_errors=True)
        if not isinstance(error, Exception) or not _disk_refused(error):
            raise
        raise refused(error) from error


def write_best(checkpoints: Path, best: Best) -> None:
    """Writes ``best.json``: it is there whole, or as it was."""
    aside = checkpoints / f".partial-{BEST}"
    aside.write_text(json.dumps(asdict(best)) + "\n")
    os.replace(aside, checkpoints / BEST)


def read_best(checkpoints: Path) -> Best | None:
    """Reads what ``best.json`` names, if there is one and its checkpoint stands."""
    with suppress(FileNotFoundError):
        best = Best(**json.loads((checkpoints / BEST).read_text()))
        if best.step in saved_steps(checkpoints):
            return best
    return None


def _disk_refused(error: Exception) -> bool:
    """Returns whether the disk is why writing failed: safetensors and tokenizers report that by types of their own."""
    return isinstance(error, OSError | SafetensorError) or "(os error" in str(error)


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """Reads the run's state of a checkpoint with its "step", after every file was compared with the manifest.

    Raises:
        UserError: a file is missing, cut short or altered; the message names it.
    """
    _verify_manifest(folder)
    state = json.loads((folder / STATE).read_text())
    return {**state["run"], "step": state["step"]}


def _write_manifest(folder: Path) -> None:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    with ThreadPoolExecutor(HASHES) as threads:
        hashes = list(threads.map(_hash, files))
    entries = {str(p.relative_to(folder)): {"bytes": p.stat().st_size, "blake2b": h} for p, h in zip(files, hashes)}
    (folder / MANIFEST).write_text(json.dumps(entries, indent=1))


def _verify_manifest(folder: Path) -> None:
    try:
        entries = json.loads((folder / MANIFEST).read_text())
    except ValueError as error:
        raise UserError(
            f"the checkpoint {folder} is damaged: {MANIFEST} cannot be read ({error})",
            fix=f"delete {folder} to resume from the checkpoint before it, or restore the file",
        ) from error
    with ThreadPoolExecutor(HASHES) as threads:
        problems = list(threads.map(lambda name: _problem(folder / name, entries[name]), entries))
    for name, problem in zip(entries, problems):
        if problem is None:
            continue
        raise UserError(
            f"the checkpoint {folder} is damaged: {name} {problem}",
            fix=f"delete {folder} to resume from the checkpoint before it, or restore the file",
        )


def _problem(path: Path, expected: Mapping[str, Any]) -> str | None:
    """Returns what is wrong with a file, if anything."""
    if not path.is_file():
        return "is missing"
    if path.stat().st_size != expected["bytes"]:
        return f"has {path.stat().st_size} bytes, {expected['bytes']} were written"
    return None if _hash(path) == expected["blake2b"] else "was altered since it was written"


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
