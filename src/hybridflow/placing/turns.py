"""Models of one process take turns on its device."""

from __future__ import annotations

from typing import Literal

from hybridflow.controller.worker import WorkerContext

Lora = Literal["adapters", "merged"] | None


def take_turn(context: WorkerContext) -> None:
    """The other models of this process rest, and this one works."""
    for name, worker in context.siblings.items():
        if name != context.name:
            worker.rest()
    context.siblings[context.name].work()
