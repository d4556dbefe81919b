"""The folder of a run: one process at a time, one configuration, atomic files."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from hybridflow.checkpoint.named_files import PATH_KEYS, content_of, same_files
from hybridflow.config.sections.base import Section
from hybridflow.config.sections.choices import settled
from hybridflow.errors import UserError

FILES = "files.json"  # what is in the files that the configuration names
STEP = "model-step"  # the step that model/ has the weights of

# A run whose data order or shapes change is another run; its journal and sampler would not fit.
FIXED_KEYS = (
    *("run.seed", "model.path", "model.reference", "model.lora", "critic.path", "critic.lora", "critic.shared_trunk"),
    *("data", "train.prompts_per_step", "train.samples_per_prompt"),
)


class RunFolder:
    """Opens a run's folder for one process; use it as a context.

    Args:
        path: the folder; made if absent.
        config: the resolved configuration, plain values; `keep_config` writes it into config.yaml.
        resume: "auto" resumes in a folder that has a run, "never" refuses it; "moved" resumes with files that are
            elsewhere now.
        kind: the class of the configuration, where it is a whole one.

    Raises:
        UserError: another process has the folder, the folder may not be resumed, or holds a run with other fixed keys.
    """

    def __init__(
        self, path: Path, config: Mapping[str, Any], *, resume: str, kind: type[Section] | None = None
    ) -> None:
        self.path, self.config = path, dict(config)
        self.checkpoints = path / "checkpoints"
        make_folder(path)
        self._lock = _lock(path / ".lock", path)
        try:
            if resume == "never" and (path / "metrics.jsonl").exists():
                raise UserError(
                    f"{path} already holds a run, and run.resume is never",
                    fix="choose another run.folder, delete this one, or set run.resume=auto to resume it",
                )
            self.changed = changed_settings(path, config, moved=resume == "moved", kind=kind)
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def keep_config(self) -> None:
        """Writes ``config.yaml``: the run resumes with these settings, or begins. A model that is there is old then."""
        (self.path / STEP).unlink(missing_ok=True)
        write_atomically(self.path / "config.yaml", yaml.safe_dump(self.config, sort_keys=False))
        write_atomically(self.path / FILES, json.dumps(content_of(flatten(self.config)), indent=1) + "\n")

    def exported_step(self) -> int | None:
        """Returns the step that the run was done at, if ``model/`` has its weights."""
        return exported_step(self.path)

    def note_export(self, step: int) -> None:
        """Records that ``model/`` holds the weights of this step."""
        write_atomically(self.path / STEP, str(step))

    def close(self) -> None:
        """Releases the folder to other processes."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _lock(file: Path, run: Path) -> int:
    # The system drops the lock when the process ends, in any way; a lock file alone would outlive a kill.
    try:
        lock = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"nothing can be written in {file.parent}: {error.strerror}", fix="set run.folder") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        holder = os.pread(lock, 32, 0).decode(errors="replace").strip()
        os.close(lock)
        raise UserError(
            f"another process (pid {holder or 'unknown'}) is running in {run}",
            why="two runs in one folder would overwrite each other's records",
            fix="wait for it, stop it, or choose another run.folder",
        ) from None
    os.ftruncate(lock, 0)
    os.pwrite(lock, str(os.getpid()).encode(), 0)
    return lock


@contextmanager
def locked(file: Path, *, run: Path) -> Iterator[None]:
    """Holds a lock for the block; it ends with the process.

    Args:
        file: the lock file; made if absent.
        run: the folder of the run that it protects, for messages.

    Raises:
        UserError: another process has it.
    """
    lock = _lock(file, run)
    try:
        yield
    finally:
        os.close(lock)


def has_begun(path: Path) -> bool:
    """Returns whether a folder holds a run that has begun: it then keeps its rows and its model."""
    return any(any(path.glob(name)) for name in ("metrics.jsonl", "journal/step-*", "checkpoints/step-*"))


def changed_settings(
    path: Path, config: Mapping[str, Any], *, moved: bool = False, kind: type[Section] | None = None
) -> dict[str, tuple[Any, Any]]:
    """Returns the keys whose values differ from those that the run in a folder had last, with the old and new values.

    Files are the same, whatever their names are now, where their content is the same; or where `moved` says so.

    Raises:
        UserError: keys are among them that a run cannot change, or config.yaml cannot be read.
    """
    file = path / "config.yaml"
    if not has_begun(path) or not file.is_file():  # a mistake that ended the first start may be mended
        return {}
    try:
        before = yaml.safe_load(file.read_text()) or {}
        before, now = flatten(settled(kind, before) if kind else before), flatten(config)
    except (yaml.YAMLError, AttributeError, ValueError) as error:
        raise UserError(
            f"{file} cannot be read any more: {error}", fix="restore it, or choose another run.folder"
        ) from error
    changed = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
    fixed = [k for k in changed if any(k == f or k.startswith(f + ".") for f in FIXED_KEYS)]
    files = [k for k in fixed if k in PATH_KEYS]
    if files:
        known = json.loads((path / FILES).read_text(encoding="utf-8")) if (path / FILES).is_file() else {}
        same = [k for k in files if same_files(before.get(k), now.get(k), known, moved=moved)]
        fixed = [k for k in fixed if k not in same]
    if fixed:
        shown = ", ".join(f"{k} was {_word(before.get(k))}, is {_word(now.get(k))}" for k in fixed)
        moving = "; where files have only moved, set run.resume=moved" if set(fixed) <= set(PATH_KEYS) else ""
        raise UserError(
            f"{path} holds a run with other settings: {shown}",
            why="resuming with them would mix two runs",
            fix=f"choose another run.folder, or give the old values{moving}",
        )
    return {key: (before.get(key), now.get(key)) for key in changed}


def _word(value: Any) -> str:
    """Returns a value as a configuration writes it.

    >>> _word([{"source": "a.jsonl", "weight": None}]), _word(True), _word(None)
    ('a.jsonl', 'true', 'unset')
    """
    if isinstance(value, list) and all(isinstance(entry, dict) and "source" in entry for entry in value):
        weights = [f" (weight {entry['weight']:g})" if entry.get("weight") is not None else "" for entry in value]
        return " and ".join(f"{entry['source']}{weight}" for entry, weight in zip(value, weights))
    if value is None or isinstance(value, str):
        return "unset" if value is None else value
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n").removesuffix("\n...")


def exported_step(path: Path) -> int | None:
    """Returns the step of the weights in ``model/``, at which a run was done; None if there is none, or the run has
    continued since.
    """
    file = path / STEP
    return int(file.read_text()) if file.is_file() and (path / "model").is_dir() else None


def make_folder(path: Path) -> None:
    """Makes the folder of a run.

    Raises:
        UserError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the run's folder {path} cannot be made: {error.strerror}", fix="set run.folder") from error


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Converts nested sections to dotted keys.

    >>> flatten({"optim": {"lr": 1.0}, "x": 2})
    {'optim.lr': 1.0, 'x': 2}
    """
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat


def write_atomically(path: Path, text: str) -> None:
    """Writes a file aside and renames it: it is there whole, or as it was."""
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)
