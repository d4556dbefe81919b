"""Where models live, and how each is cut over its processes. Importable without torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from hybridflow.config.sections.engine import EngineSection
from hybridflow.config.sections.placement import PlacementSection, started_by_torchrun

if TYPE_CHECKING:  # the sections check themselves with this file
    from hybridflow.config.kinds.registry import TrainingConfig
    from hybridflow.config.sections.rewards import RewardModelSection
    from hybridflow.config.sections.rollout import RolloutSection


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
