"""Checks where models are, and how each is sharded over its processes. Importable without torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from hybridflow.config.sections.engine import EngineSection
from hybridflow.config.sections.placement import PlacementSection, started_by_torchrun
from hybridflow.config.sections.rollout import RolloutSection


@dataclass(frozen=True)
class PlacedModel:
    """A model that a run computes.

    Args:
        role: what it is for.
        engine: how it is sharded.
        key: of that section.
    """

    role: str
    engine: EngineSection
    key: str = "engine"


@dataclass(frozen=True)
class RolesOfRun:
    """The models of a run, as its configuration says.

    Args:
        models: those that are computed.
        of_actor: further roles of the actor's own model, and why they are in its pool.
        rollout: how responses are generated, where they are.
    """

    models: tuple[PlacedModel, ...]
    of_actor: Mapping[str, str] = field(default_factory=dict)
    rollout: RolloutSection | None = None


def check_placement(placement: PlacementSection, roles: RolesOfRun, *, packing: bool) -> None:
    """Checks that the pools, and how each model is sharded over them, fit together.

    Args:
        placement: the pools, and which roles are in which.
        roles: the models of the run.
        packing: whether sequences are packed (``model.packing``).

    Raises:
        ValueError: a pool has another size than a model needs; the message names all of them.
    """
    problems = [problem for model in roles.models for problem in _engine_in_pool(placement, model)]
    problems += [why for role, why in roles.of_actor.items() if placement.pool_of(role) != placement.pool_of("actor")]
    known = {model.role for model in roles.models} | roles.of_actor.keys()
    if roles.rollout is not None and in_pool(placement, roles.rollout):
        known.add("rollout")
    problems += [
        f"placement.roles names {role}, but this run has none: leave it out"
        for role in sorted(placement.roles.keys() - known)
    ]
    if placement.transport == "files" and placement.folder is None:
        problems.append("placement.transport is files: name placement.folder, which all processes reach")
    if roles.rollout is not None:
        problems += _rollout_problems(placement, roles.rollout, roles.models)
    problems += [
        f"{model.key}.sequence_parallel is {model.engine.sequence_parallel}, but with model.packing=false sequences "
        "are padded, and padded tokens cannot be shared: leave one of them out"
        for model in roles.models
        if model.engine.sequence_parallel > 1 and not packing
    ]
    if problems:
        raise ValueError("; ".join(problems))


def _rollout_problems(p: PlacementSection, r: RolloutSection, models: tuple[PlacedModel, ...]) -> Iterator[str]:
    if r.engine == "inline" or "rollout" not in p.roles:
        return
    pool = p.roles["rollout"]
    if (r.engine, r.mode) != ("vllm", "in_process"):
        yield (
            f"placement.roles puts rollout into pool {pool!r}, but rollout.engine {r.engine} in rollout.mode {r.mode} "
            "has processes of its own: leave rollout out of placement.roles"
        )
    elif any(p.pool_of(model.role) == pool and model.engine.strategy != "local" for model in models):
        yield (
            f"pool {pool!r} has both vLLM and a sharded model, and each needs torch.distributed for itself: give "
            "rollout a pool of its own, or set rollout.mode=workers and leave rollout out of placement.roles"
        )


def in_pool(placement: PlacementSection, rollout: RolloutSection) -> bool:
    """Returns whether responses are generated in the processes of a pool, rather than beside the controller.

    The inline engine always generates there, if there are pools; vLLM does if ``placement.roles`` names a pool for
    rollout. An engine with workers of its own, or behind servers, has its processes already.
    """
    if not placement.pools:
        return False
    return rollout.engine == "inline" or "rollout" in placement.roles


def _engine_in_pool(placement: PlacementSection, model: PlacedModel) -> Iterator[str]:
    key, role, engine = model.key, model.role, model.engine
    pool = placement.pool_of(role)
    if pool is None:
        if engine.strategy != "local" and not started_by_torchrun():
            yield (
                f"{key}.strategy is {engine.strategy}, which cuts a model over processes: give placement.pools, such "
                "as {all: 2}"
            )
        return
    size = placement.pools[pool]
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
