"""A run that is done, and is started again: nothing is left to do, which is no mistake (a requeued job)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hybridflow.checkpoint.run_folder import changed_settings, exported_step
from hybridflow.checkpoint.store import saved_steps
from hybridflow.config.kinds.registry import TrainingConfig, kind_for
from hybridflow.config.sections.train import LengthSection
from hybridflow.errors import UserError

CHANGES = 10  # that are named
Changes = Mapping[str, tuple[Any, Any]]  # what each setting was, and is


class AlreadyDone(UserError):
    """The run in a folder is at its end; the command line prints that and exits with 0.

    Args:
        folder: the run's.
        step: the last.
        total: how many steps are asked for now; None if as many as when it ended.
        changed: settings that are other than they were then.
        length: where it is to end.
    """

    def __init__(self, folder: Path, step: int, total: int | None, changed: Changes, length: LengthSection) -> None:
        what = f"the run in {folder} is already done: {step} of {step} steps; its model is in {folder / 'model'}"
        if total is not None and total < step:
            what = what.replace(f"{step} of {step} steps", f"{step} steps, and {total} are asked for")
        ends = _ends(length)
        others = {key: change for key, change in changed.items() if key not in ends and not key.startswith("run.")}
        why = f"nothing was trained with the settings that changed since: {said_changes(others)}" if others else ""
        super().__init__(what, why=why, fix=f"{length.longer} to train longer, or choose another run.folder")

    def line(self) -> str:
        """Returns all of it in one line."""
        return "; ".join(filter(None, [self.what, self.why, self.fix]))


def finished(config: TrainingConfig) -> AlreadyDone | None:
    """Returns a message where a run's folder shows, without loading anything, that the run is done as it is configured.

    Raises:
        UserError: the folder is of another run.
    """
    folder, step = Path(config.run.folder), exported_step(Path(config.run.folder))
    if config.run.resume == "never" or step is None or saved_steps(folder / "checkpoints")[-1:] != [step]:
        return None
    if not (folder / "config.yaml").is_file():
        return None  # only loading can tell whether it is this run
    moved = config.run.resume == "moved"
    changed = changed_settings(folder, config.model_dump(mode="json"), moved=moved, kind=kind_for(config).config)
    total = config.train.steps
    if any(key in changed for key in _ends(config.train)) and (total is None or total > step):
        return None  # loading the run decides
    return AlreadyDone(folder, step, total, changed, config.train)


def _ends(length: LengthSection) -> set[str]:
    return {f"train.{name}" for name in length.ends}


def said_changes(changed: Changes) -> str:
    """Describes settings with their old and new values.

    >>> said_changes({"optim.lr": (0.1, 0.2), "data.eval": (None, "rows.jsonl")})
    'optim.lr was 0.1, is 0.2; data.eval was unset, is rows.jsonl'
    """
    texts = [f"{key} was {said(old)}, is {said(new)}" for key, (old, new) in changed.items()]
    more = [f"and {len(texts) - CHANGES} more"] if len(texts) > CHANGES else []
    return "; ".join(texts[:CHANGES] + more)


def said(value: Any) -> str:
    """Describes a setting's value."""
    return "unset" if value is None else str(value)
