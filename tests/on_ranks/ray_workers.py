"""A worker that says where it runs."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from hybridflow.controller.dispatch import ONE_TO_ALL, remote
from hybridflow.controller.worker import WorkerContext


class Surroundings:
    """Looks around."""

    def __init__(self, context: WorkerContext) -> None:
        self.context = context

    @remote(ONE_TO_ALL)
    def read(self, path: str) -> str:
        """A file, by a path relative to the controller's folder."""
        return Path(path).read_text()

    @remote(ONE_TO_ALL)
    def variable(self, name: str) -> str | None:
        return os.environ.get(name)

    @remote(ONE_TO_ALL)
    def sum_after_adding_one(self, value: torch.Tensor) -> float:
        return float(value.add_(1).sum())

    @remote(ONE_TO_ALL)
    def threads(self) -> int:
        return torch.get_num_threads()
