"""TensorBoard event files, in the run's ``tensorboard/``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


class TensorBoardTracker:
    """Writes every metric as a scalar.

    Args:
        folder: the run's folder.
        first_step: the first step that will be written. What an earlier, killed process wrote from there on is
            marked as void, so that a resumed run has one curve.

    Raises:
        ImportError: tensorboard is not installed.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path, *, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # an extra, and slow to import

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes the scalars of a step, on disk when this returns."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, *, failed: bool) -> None:
        """Ends the file."""
        self._writer.close()
