"""Weights & Biases. ``WANDB_MODE=offline`` keeps everything in the run's ``wandb/``, to be synced later or never."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


class WandbTracker:
    """Logs every metric at its step.

    The run's id is kept in ``wandb-id.txt``, so that a resumed run continues the same wandb run. Steps that it repeats
    exist already; wandb keeps the first values.

    Args:
        folder: the run's folder.
        project: the wandb project.
        config: the resolved configuration.

    Attributes:
        where: address of the run, or its folder if offline; empty if disabled.

    Raises:
        ImportError: wandb is not installed.
        Exception: any that wandb raises, such as when the user is not logged in.
    """

    def __init__(self, folder: Path, *, project: str, config: Mapping[str, Any]) -> None:
        import wandb  # an extra, and slow to import

        id_file = folder / "wandb-id.txt"
        known = id_file.read_text().strip() if id_file.exists() else ""
        offline = wandb.setup().settings.mode in ("offline", "dryrun")
        self._run = wandb.init(
            project=project,
            name=folder.resolve().name,
            dir=str(folder),
            id=known or None,
            resume=None if offline else "allow",  # offline there is only the same id; sync joins the parts
            config=dict(config),
            reinit="create_new",  # leaves a wandb run that the surrounding program has open alone
            # The terminal belongs to the progress display: no chatter, and no copy of it in the wandb run.
            settings=wandb.Settings(silent=True, console="off"),
        )
        if not self._run.disabled:  # WANDB_MODE=disabled hands out a dummy
            id_file.write_text(self._run.id + "\n")
        self.where = str(Path(self._run.dir).parent if offline else self._run.url or "")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Logs the metrics of a step."""
        self._run.log(dict(metrics), step=step)

    def close(self, *, failed: bool) -> None:
        """Ends the wandb run and says how it ended."""
        self._run.finish(exit_code=int(failed))
