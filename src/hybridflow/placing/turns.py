"""Models of one process take turns on its device."""

from __future__ import annotations

from typing import Literal

from hybridflow.controller.worker import WorkerContext

Lora = Literal["adapters", "merged"] | None


def take_turn(context: WorkerContext) -> None:
    """Lets the other models of this process rest, and this one work."""
    for name, worker in context.siblings.items():
        if name != context.name:
            worker.rest()
    context.siblings[context.name].work()
