"""The section that says where models are."""

from __future__ import annotations

import os
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from hybridflow.config.paths import WrittenPath
from hybridflow.config.sections.base import Section
from hybridflow.errors import nearest

Transport = Literal["auto", "shared_memory", "broadcast", "cuda_ipc", "files"]
ROLES = ("actor", "critic", "reference", "reward", "rollout")  # what can be placed; "reward": a reward model


class PlacementSection(Section):
    """Which processes there are, and which models live in which of them."""

    backend: Literal["auto", "in_process", "processes", "ray", "torchrun"] = Field(
        "auto",
        description="What starts the processes. in_process: nothing, all models are in this process; processes: this "
        "program, on this host; ray: a Ray cluster, or a local instance; torchrun: torchrun, before the "
        "run. auto: torchrun if it started this process, in_process if the pools have one process in "
        "total, else processes.",
    )
    pools: dict[str, PositiveInt] = Field(
        default_factory=dict,
        description="Number of processes (devices) of each pool, such as {all: 4} or {train: 4, generate: 2}; empty: "
        "one process.",
    )
    roles: dict[str, str] = Field(
        default_factory=dict,
        description="Pool of each role: actor, critic, reference, reward (a reward model), rollout. A role that is "
        "not named is in the first pool. Roles of one pool share its processes.",
    )
    address: str | None = Field(
        None, description="Address of a running Ray cluster (host:port, or auto); unset: a local one is started."
    )
    port: PositiveInt | None = Field(None, description="Port on which the processes meet; unset: a free port.")
    transport: Transport = Field(
        "auto",
        description="How weights travel between processes. auto: shared_memory on one host, else broadcast; cuda_ipc: "
        "handles of GPU memory, if sender and receiver share a GPU; files: through placement.folder.",
    )
    folder: WrittenPath | None = Field(
        None, description="Folder for transport files; all processes must reach it under this path."
    )
    delta: bool = Field(
        False,
        description="Send only the bytes that changed since the last weight update. Sender and receiver then both "
        "keep a copy of all weights in host memory.",
    )
    timeout: PositiveFloat = Field(
        600, description="Seconds that a collective or a worker may take without progress before the run ends."
    )

    @field_validator("pools", "roles", mode="before")
    @classmethod
    def _check_spaces(cls, given: Any) -> Any:
        for key in given if isinstance(given, dict) else ():
            if given[key] is None and ":" in str(key):
                name, _, value = str(key).partition(":")
                raise ValueError(f"YAML reads {{{key}}} as one word: write {{{name}: {value}}}, with a space")
        return given

    @model_validator(mode="after")
    def _check_roles(self) -> PlacementSection:
        for role, pool in self.roles.items():
            if role not in ROLES:
                raise ValueError(f"placement.roles names {role!r}, which is no role; {nearest(role, ROLES)}")
            if pool not in self.pools:
                known = nearest(pool, self.pools) if self.pools else "placement.pools is empty"
                raise ValueError(f"placement.roles puts {role} into pool {pool!r}, which does not exist; {known}")
        idle = set(self.pools) - {self.pool_of(role) for role in ROLES}
        if idle:
            raise ValueError(f"placement.pools: nothing is placed in {sorted(idle)}; name it in placement.roles")
        if self.address is not None and self.backend != "ray":
            raise ValueError("placement.address is of a Ray cluster: set placement.backend=ray")
        if self.backend in ("processes", "ray") and not self.pools:
            raise ValueError(f"placement.backend is {self.backend}, but placement.pools is empty: give {{all: 2}}")
        if self.backend == "in_process" and sum(self.pools.values()) > 1:
            raise ValueError("placement.backend in_process is one process: set placement.backend=processes or ray")
        return self

    def pool_of(self, role: str) -> str | None:
        """Returns the pool of a role; None where there are no pools and everything is in this process."""
        if not self.pools:
            return None
        return self.roles.get(role, next(iter(self.pools)))


def started_by_torchrun() -> bool:
    """Returns whether this process is one of several that torchrun started."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def resolved_placement(placement: PlacementSection) -> PlacementSection:
    """Returns the section with its open values filled in: the back end, and under torchrun one pool of all its
    processes.
    """
    backend, pools = placement.backend, placement.pools
    if backend == "auto":
        several = len(pools) > 1 or any(size > 1 for size in pools.values())
        backend = "torchrun" if started_by_torchrun() else "processes" if several else "in_process"
    if backend == "torchrun" and not pools:
        pools = {"all": int(os.environ.get("WORLD_SIZE", "1"))}
    return placement.model_copy(update={"backend": backend, "pools": pools})
