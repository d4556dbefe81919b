"""Small workers for tests of the controller."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hybridflow.batch import Batch
from hybridflow.controller.dispatch import ALL_TO_ALL, ONE_TO_ALL, RANK_ZERO, Call, Dispatch, Mesh, over, remote
from hybridflow.controller.worker import WorkerContext
from hybridflow.errors import UserError


def _reversed(mesh: Mesh, call: Call) -> list[Call | None]:
    return [((list(call[0][0])[mesh.size - 1 - rank],), {}) for rank in range(mesh.size)]


BACKWARDS = Dispatch(_reversed, lambda mesh, results: sum(results))  # a user's own pair: the last part to the first


class Toy:
    """Adds, waits, and fails."""

    def __init__(self, context: WorkerContext, start: int = 0, wrong: bool = False) -> None:
        if wrong:
            raise UserError("toys start at 0", why="they are toys", fix="set start=0")
        self.context, self.start = context, start

    @remote(ONE_TO_ALL)
    def about(self) -> tuple[str, str, int, int, int]:
        c = self.context
        return c.name, c.pool, c.rank, c.world_size, os.getpid()

    @remote(ALL_TO_ALL)
    def add(self, x: int, *, y: int = 0) -> int:
        return self.start + x + y

    @remote(over("dp"))
    def rows(self, part: Batch) -> dict[str, Tensor]:
        """Twice every token, and how many sequences there were."""
        return {"twice_T": 2 * part["input_ids_T"], "rank_B": torch.full((len(part),), self.context.rank)}

    @remote(RANK_ZERO)
    def first(self) -> int:
        return self.context.rank

    @remote(BACKWARDS)
    def sent_backwards(self, x: int) -> int:
        return x * 10**self.context.rank

    @remote(ONE_TO_ALL)
    def sum_of_pool(self, value: float) -> float:
        self.context.join_pool()
        total = torch.tensor([value + self.context.rank])
        dist.all_reduce(total)
        return float(total)

    @remote(over("dp"))
    def update(self, part: Batch) -> float:
        """A collective over the pool, as a training step has."""
        return self.sum_of_pool(float(len(part)))

    @remote(ONE_TO_ALL)
    def work(self, seconds: float, pieces: int = 1) -> tuple[float, float]:
        began = time.time()
        for _ in range(pieces):
            time.sleep(seconds / pieces)
            self.context.progress()
        return began, time.time()

    @remote(ONE_TO_ALL)
    def count_rows(self, part: Batch) -> int:
        return len(part)

    @remote(ONE_TO_ALL)
    def end_process(self, rank: int, status: int) -> None:
        if self.context.rank == rank:
            os._exit(status)

    @remote(ONE_TO_ALL)
    def stop_process(self, rank: int) -> float:
        """Stops the process as a debugger does: not even its threads go on."""
        if self.context.rank == rank:
            os.kill(os.getpid(), signal.SIGSTOP)
        return self.sum_of_pool(0.0)

    @remote(ONE_TO_ALL)
    def different_collectives(self) -> None:
        self.context.join_pool()
        if self.context.rank:
            dist.barrier()
            dist.barrier()
        else:
            dist.all_reduce(torch.zeros(1000))

    @remote(ONE_TO_ALL)
    def answer_with_a_function(self) -> Any:
        return lambda: 1

    @remote(ONE_TO_ALL)
    def stop_in_debugger(self) -> None:
        breakpoint()

    @remote(ONE_TO_ALL)
    def echo(self, value: Any) -> Any:
        return value

    @remote(ONE_TO_ALL)
    def raise_on(self, ranks: Sequence[int], mistake: bool = False) -> float:
        if self.context.rank in ranks:
            if mistake:
                raise UserError("a bad value", why="it is bad", fix="give a good one")
            raise ValueError("boom")
        return self.sum_of_pool(0.0)

    @remote(ONE_TO_ALL)
    def sibling_start(self, name: str) -> int:
        return self.context.siblings[name].start

    def unmarked(self) -> None:
        """Cannot be called on a group."""
