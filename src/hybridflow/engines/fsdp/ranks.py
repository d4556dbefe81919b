"""The processes of an engine: which share a copy of the parameters or a micro-batch, and what all must agree on.

All of it is about the default process group, which a worker's pool has made before an engine is built.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from hybridflow.config.sections.engine import ShardedSection
from hybridflow.errors import UserError
from hybridflow.models.ulysses import SequenceParallel


class Ranks:
    """The processes of an engine, seen from one of them.

    With a sequence parallelism of P, ranks ``i P`` to ``i P + P - 1`` stand at data-parallel place i and get the same
    sequences.

    Args:
        section: the degrees.
        device: of this process.

    Raises:
        UserError: the number of processes is no multiple of a degree.
    """

    def __init__(self, section: ShardedSection, device: torch.device) -> None:
        self.size, self.rank = dist.get_world_size(), dist.get_rank()
        check_degrees(self.size, section)
        self.sp_size = section.sequence_parallel
        self.place, self.places = self.rank // self.sp_size, self.size // self.sp_size
        shard = section.shard_size or self.size
        if shard == self.size:
            self.mesh = init_device_mesh(device.type, (self.size,), mesh_dim_names=("shard",))
        else:
            names = ("replicate", "shard")
            self.mesh = init_device_mesh(device.type, (self.size // shard, shard), mesh_dim_names=names)
        self.sp: SequenceParallel | None = None
        if self.sp_size > 1:
            peers: DeviceMesh = init_device_mesh(device.type, (self.places, self.sp_size), mesh_dim_names=("dp", "sp"))[
                "sp"
            ]
            self.sp = SequenceParallel(peers.get_group(), self.rank % self.sp_size, self.sp_size)

    def gathered(self, value: Any) -> list[Any]:
        """Gathers a small picklable value of every rank, by rank."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def one_per_place(self, values: Sequence[Any]) -> list[Any]:
        """Returns, of values by rank, those of the first rank at each place: its peers have the same sequences."""
        return list(values[:: self.sp_size])

    def largest(self, number: int) -> int:
        """Returns the largest of all ranks' numbers."""
        return max(self.gathered(number))


def check_degrees(processes: int, section: ShardedSection) -> None:
    """Checks that every copy of the parameters, and every micro-batch, is shared by equally many processes.

    Raises:
        UserError: a degree does not divide the processes.
    """
    for key, degree, what in (
        ("shard_size", section.shard_size or 1, "shares of one copy of the parameters"),
        ("sequence_parallel", section.sequence_parallel, "processes for one micro-batch"),
    ):
        if processes % degree:
            fitting = [str(d) for d in range(1, processes + 1) if processes % d == 0]
            raise UserError(
                f"engine.{key} is {degree}, but there are {processes} processes",
                why=f"{degree} {what} do not divide them evenly",
                fix=f"set it to one of {', '.join(fitting)}, or give the pool another size (placement.pools)",
            )


def check_parts(rows: Sequence[int], expected: Sequence[int]) -> None:
    """Compares the sequences that ranks were given with what the controller sent to each data-parallel place.

    Args:
        rows: sequences at hand, by rank.
        expected: sequences sent, by place; the ranks of one place get the same.

    Raises:
        RuntimeError: a rank has others; the message names it.
    """
    peers = len(rows) // len(expected)
    wrong = [
        f"rank {r} has {n} and was sent {expected[r // peers]}" for r, n in enumerate(rows) if n != expected[r // peers]
    ]
    if wrong:
        raise RuntimeError(
            f"sequences were lost or added between the controller and the workers: {', '.join(wrong)}; all ranks stop "
            "before anything is computed"
        )


def check_same_model(models: Sequence[str]) -> None:
    """Compares the models that the ranks want to cut.

    Args:
        models: a line for every tensor, by rank.

    Raises:
        RuntimeError: a rank has another model than rank 0.
    """
    for rank, lines in enumerate(models):
        if lines != models[0]:
            other = sorted(set(lines.splitlines()) ^ set(models[0].splitlines()))
            raise RuntimeError(
                f"rank {rank} has made another model than rank 0: {other[0] if other else 'another order'}"
            )
