"""Where models live, and how each is cut over its processes. Importable without torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from hybridflow.config.paths import WrittenPath
from hybridflow.config.section import HERE, Section
from hybridflow.errors import nearest

if TYPE_CHECKING:  # the sections check themselves with this file
    from hybridflow.config.kinds.registry import TrainingConfig
    from hybridflow.config.rewards import RewardModelSection
    from hybridflow.config.rollout import RolloutSection

Transport = Literal["auto", "shared_memory", "broadcast", "cuda_ipc", "files"]
ROLES = ("actor", "critic", "reference", "reward", "rollout")  # what can be placed; "reward": a reward model


class EngineSection(Section):
    """How a model is computed by the processes of its pool: what is sharded, and in which precision."""

    strategy: Literal["local", "fsdp2", "fsdp1"] = Field(
        "local",
        description="local: one process holds all of the model; fsdp2, fsdp1: every process holds a part of it.",
    )
    shard_size: PositiveInt | None = Field(
        None,
        description="Processes that share one copy of the parameters (HSDP); unset: all of the pool. Fewer keep "
        "several copies, and gradients are summed between them.",
    )
    sequence_parallel: PositiveInt = Field(
        1,
        description="Processes that share the tokens of one micro-batch (DeepSpeed-Ulysses): for sequences whose "
        "activations do not fit one device. Must divide the query heads and the pool.",
    )
    reshard_after_forward: bool = Field(
        True, description="Give gathered parameters back after the forward pass: less memory, one more gathering."
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="What is multiplied in; weights stay float32. auto: bfloat16 on a GPU, float32 on a CPU."
    )
    reduce_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="What gradients are summed in between processes."
    )
    sync_every_microbatch: bool = Field(
        False,
        description="Sum gradients between processes after every micro-batch, so that each keeps its part of them "
        "alone: less memory, one more exchange for each. Otherwise they are summed once for an update, and every "
        "process keeps whole gradients until then.",
    )
    cpu_offload: bool = Field(
        False, description="Keep parameters, gradients and optimizer state in host memory; layers visit the device."
    )
    offload: list[Literal["parameters", "optimizer"]] = Field(
        default_factory=list, description="What moves to host memory between the phases in which this model works."
    )
    activation_offload: bool = Field(
        False, description="Keep saved activations in host memory until the backward pass."
    )
    compile: bool = Field(False, description="torch.compile of every layer: slow to start, and meant for GPUs.")

    @model_validator(mode="after")
    def _check_strategy(self) -> EngineSection:
        if self.strategy == "local":
            plain = EngineSection.model_construct()
            for key in type(self).model_fields:
                if key != "dtype" and getattr(self, key) != getattr(plain, key):
                    raise ValueError(f"{HERE}.{key} is for sharded models: set {HERE}.strategy=fsdp2 or leave it out")
        if self.cpu_offload and "parameters" in self.offload:
            raise ValueError(f"{HERE}.cpu_offload keeps parameters in host memory already: leave {HERE}.offload out")
        return self


class PlacementSection(Section):
    """Which processes there are, and which models live in which of them."""

    backend: Literal["auto", "in_process", "processes", "ray", "torchrun"] = Field(
        "auto",
        description="Who starts the processes. in_process: none, everything in this one; processes: this host; ray: a "
        "Ray cluster or a local instance of it; torchrun: they are started already. auto: torchrun where it started "
        "us, in_process where the pools have one process together, else processes.",
    )
    pools: dict[str, PositiveInt] = Field(
        default_factory=dict,
        description="Processes (devices) of each pool, such as {all: 4} or {train: 4, generate: 2}. Empty: one.",
    )
    roles: dict[str, str] = Field(
        default_factory=dict,
        description="The pool of actor, critic, reference, reward (a reward model), rollout. Those that are not named "
        "are in the first pool; roles of one pool share its processes.",
    )
    address: str | None = Field(None, description="Of a running Ray cluster (host:port, or auto); unset: a local one.")
    port: PositiveInt | None = Field(None, description="Where the processes meet; unset: a free port.")
    transport: Transport = Field(
        "auto",
        description="How weights travel between processes. auto: shared memory on one host, else broadcast; cuda_ipc: "
        "handles of GPU memory, where sender and receiver share a GPU; files: in placement.folder.",
    )
    folder: WrittenPath | None = Field(
        None, description="Where transport files puts weights: a folder that all processes reach under this path."
    )
    delta: bool = Field(
        False,
        description="Send only the bytes that changed since the last publication. Either end then keeps a copy of all "
        "weights in host memory.",
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
        """The pool of a role; None where there are no pools and everything is in this process."""
        if not self.pools:
            return None
        return self.roles.get(role, next(iter(self.pools)))


def check_placement(config: TrainingConfig) -> None:
    """Holds the pools, and how each model is cut over them, together.

    Raises:
        ValueError: a pool has another size than a model needs; all that is wrong is told at once.
    """
    problems = [p for key, role, engine in engines_of(config) for p in _engine_in_pool(config, key, role, engine)]
    p, rollout = config.placement, getattr(config, "rollout", None)
    critic = getattr(config, "critic", None)
    if critic is not None and critic.shared_trunk and p.pool_of("critic") != p.pool_of("actor"):
        problems.append(
            "critic.shared_trunk: the critic is the actor's own model, so placement.roles puts both in one pool"
        )
    adapters = config.model.lora is not None and getattr(config.model, "reference", None) is None
    if adapters and rollout is not None and p.pool_of("reference") != p.pool_of("actor"):
        problems.append(
            "model.lora: the reference is the actor with its adapters switched off, so placement.roles puts both in "
            "one pool; or name model.reference"
        )
    problems += [
        f"placement.roles names {role}, and there is none in this run: leave it out"
        for role in sorted(p.roles.keys() - _roles_of(config))
    ]
    problems += _rollout_problems(config)
    problems += [
        f"{key}.sequence_parallel is {engine.sequence_parallel}, but with model.packing=false sequences are padded, "
        "and padded tokens cannot be shared: leave one of them out"
        for key, _, engine in engines_of(config)
        if engine.sequence_parallel > 1 and not config.model.packing
    ]
    if problems:
        raise ValueError("; ".join(problems))


def _rollout_problems(config: TrainingConfig) -> Iterator[str]:
    p, r = config.placement, getattr(config, "rollout", None)
    if p.transport == "files" and p.folder is None:
        yield "placement.transport is files: name placement.folder, which all processes reach"
    if r is None or r.engine == "inline" or "rollout" not in p.roles:
        return
    pool = p.roles["rollout"]
    if (r.engine, r.mode) != ("vllm", "in_process"):
        yield (
            f"placement.roles puts rollout into pool {pool!r}, but rollout.engine {r.engine} in rollout.mode {r.mode} "
            "has processes of its own: leave rollout out of placement.roles"
        )
    elif any(p.pool_of(role) == pool and engine.strategy != "local" for _, role, engine in engines_of(config)):
        yield (
            f"pool {pool!r} has both vLLM and a sharded model, and either wants torch.distributed for itself: give "
            "rollout a pool of its own, or set rollout.mode=workers and leave rollout out of placement.roles"
        )


def _roles_of(config: TrainingConfig) -> set[str]:
    """The roles that live in pools."""
    algorithm, rollout = getattr(config, "algorithm", None), getattr(config, "rollout", None)
    found = {
        "actor": True,
        "critic": getattr(config, "critic", None) is not None,
        "reference": algorithm is not None and algorithm.needs_reference,
        "reward": reward_model_of(config) is not None,
        "rollout": rollout is not None and in_pool(config.placement, rollout),
    }
    return {role for role, there in found.items() if there}


def reward_model_of(config: TrainingConfig) -> RewardModelSection | None:
    """The section of the reward model, where the run has one."""
    reward = getattr(config, "reward", None)
    return None if reward is None else reward.model


def in_pool(placement: PlacementSection, rollout: RolloutSection) -> bool:
    """Whether answers are generated in the processes of a pool, rather than beside the controller.

    The inline engine always is, where there are pools. vLLM is where ``placement.roles`` says so; with workers of its
    own, or behind servers, an engine has its processes already.
    """
    if not placement.pools:
        return False
    return rollout.engine == "inline" or "rollout" in placement.roles


def engines_of(config: TrainingConfig) -> Iterator[tuple[str, str, EngineSection]]:
    """The models that are computed: the key of each one's section, its role, and the section."""
    yield "engine", "actor", config.engine
    critic = getattr(config, "critic", None)
    if critic is not None and not critic.shared_trunk:
        yield ("engine" if critic.engine is None else "critic.engine"), "critic", critic.engine or config.engine
    algorithm = getattr(config, "algorithm", None)
    adapters_off = config.model.lora is not None and getattr(config.model, "reference", None) is None
    if algorithm is not None and algorithm.needs_reference and not adapters_off:
        own = getattr(config.model, "reference_engine", None)
        yield ("engine" if own is None else "model.reference_engine"), "reference", own or config.engine
    model = reward_model_of(config)
    if model is not None:
        yield ("engine" if model.engine is None else "reward.model.engine"), "reward", model.engine or config.engine


def _engine_in_pool(config: TrainingConfig, key: str, role: str, engine: EngineSection) -> Iterator[str]:
    pool = config.placement.pool_of(role)
    if pool is None:
        if engine.strategy != "local" and not started_by_torchrun():
            yield (
                f"{key}.strategy is {engine.strategy}, which cuts a model over processes: give placement.pools, such "
                "as {all: 2}"
            )
        return
    size = config.placement.pools[pool]
    where = f"pool {pool!r} of the {role} has {size} process{'es' * (size > 1)}"
    if engine.strategy == "local":
        if size > 1:
            yield (
                f"{where}, but {key}.strategy local is for one: set {key}.strategy=fsdp2, or give the {role} a pool of "
                "one"
            )
        return
    for name, degree in [("shard_size", engine.shard_size), ("sequence_parallel", engine.sequence_parallel)]:
        if degree is not None and size % degree:
            yield f"{where}, which {key}.{name} {degree} does not divide"


def started_by_torchrun() -> bool:
    """Whether this process is one of several that torchrun started."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def resolved_placement(placement: PlacementSection) -> PlacementSection:
    """The section with what was left to us: the back end, and under torchrun one pool of all its processes."""
    backend, pools = placement.backend, placement.pools
    if backend == "auto":
        several = len(pools) > 1 or any(size > 1 for size in pools.values())
        backend = "torchrun" if started_by_torchrun() else "processes" if several else "in_process"
    if backend == "torchrun" and not pools:
        pools = {"all": int(os.environ.get("WORLD_SIZE", "1"))}
    return placement.model_copy(update={"backend": backend, "pools": pools})
