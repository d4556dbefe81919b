"""The place of each model of a run: this process, or the worker groups of a cluster. The loop cannot tell."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hybridflow.checkpoint.artifacts import export_engine
from hybridflow.config.checks.placement import check_placement, in_pool
from hybridflow.config.kinds.registry import TrainingConfig
from hybridflow.config.sections.placement import PlacementSection, resolved_placement
from hybridflow.controller.backends.torchrun import serve
from hybridflow.controller.cluster import Cluster
from hybridflow.controller.group import WorkerGroup
from hybridflow.controller.open import open_cluster
from hybridflow.devices import CPU, kind_of, pick_device
from hybridflow.engines.fsdp.ranks import check_degrees
from hybridflow.engines.local import LocalEngine
from hybridflow.errors import UserError
from hybridflow.placing.build import local_engine, local_reference
from hybridflow.placing.generation import inline_engine, own_engine
from hybridflow.placing.group_engine import GroupEngine, GroupScorer
from hybridflow.placing.group_rollout import GroupRollout
from hybridflow.placing.preload import PRELOAD
from hybridflow.placing.role import Role
from hybridflow.placing.rollout_worker import RolloutWorker
from hybridflow.placing.train_worker import EngineWorker, ScoringWorker
from hybridflow.protocols.generation import RolloutEngine
from hybridflow.protocols.training import Scorer, TrainEngine


class Places:
    """Builds each model of a run where the configuration puts it; `close` it in the end.

    Args:
        config: the configuration.
        events: called with (kind, text) for events of processes.

    Raises:
        UserError: there are not enough devices, a port is taken, no cluster responds, ...
    """

    def __init__(self, config: TrainingConfig, events: Callable[[str, str], None]) -> None:
        self.placement, self.device = resolved_placement(config.placement), config.run.device
        self.roles, self.events = config.roles(), events
        self._beside = ExitStack()
        try:  # the sections were checked without what the environment decides
            check_placement(self.placement, self.roles, packing=config.model.packing)
        except ValueError as error:
            raise UserError(str(error)) from error
        self.cluster: Cluster | None = None
        if self.placement.pools:
            self.cluster = open_cluster(
                self.placement,
                device=self.device,
                threads=config.run.threads,
                preload=PRELOAD,
                events=events,
            )

    def on_close(self, end: Callable[[], None]) -> None:
        """Adds a function that is called when the processes end."""
        self._beside.callback(end)

    def close(self) -> None:
        """Ends the processes, if there are any."""
        self._beside.close()
        if self.cluster is not None:
            self.cluster.close()

    def begin_step(self, step: int) -> None:
        """Tells the processes the current step, for reports and fault points."""
        if self.cluster is not None:
            self.cluster.step = step

    def take_metrics(self) -> dict[str, float]:
        """Returns the bytes that passed through the controller since the last call, by class.

        They are of this process, not of the step alone: a resumed process has started its workers and read journaled
        responses instead of generating them.
        """
        if self.cluster is None:
            return {}
        found = {f"perf/controller_bytes/{kind}": float(count) for kind, count in self.cluster.bytes.items()}
        self.cluster.bytes.clear()
        return found

    def trained(self, role: Role) -> TrainEngine:
        """Makes a model that is trained.

        Raises:
            UserError: it cannot be loaded, or not be cut as its engine section says.
        """
        if self.cluster is None:
            return local_engine(role, pick_device(self.device))
        assert role.name in ("actor", "critic")
        return GroupEngine(self._group(role, EngineWorker), role.name, placement=self.placement)

    def reference(self, role: Role) -> Scorer:
        """Makes a model of its own that is never trained.

        Raises:
            UserError: it cannot be loaded, or not be cut as its engine section says.
        """
        if self.cluster is None:
            return local_reference(role, pick_device(self.device))
        return GroupScorer(self._group(role, ScoringWorker))

    def rollout(
        self, role: Role, actor: TrainEngine, tokenizer: PreTrainedTokenizerBase, folder: Path
    ) -> RolloutEngine:
        """Makes the generation engine of ``rollout.engine``.

        Args:
            role: the actor's.
            actor: the engine whose weights it samples with.
            tokenizer: decodes responses, where a text ends them.
            folder: the run's.
        """
        r = self.roles.rollout
        assert r is not None
        start = None
        if r.engine != "inline" and not (r.mode == "server" and r.servers):
            # These engines start from a folder; its weights are replaced by the first publication.
            start = folder / "rollout-model"
            export_engine(actor, tokenizer, start)
        if in_pool(self.placement, r):
            assert self.cluster is not None
            pool = self.placement.pool_of("rollout")
            assert pool is not None
            group = self.cluster.group("rollout", RolloutWorker, pool, role, r, start)
            return GroupRollout(group)
        if r.engine == "inline":
            assert isinstance(actor, LocalEngine)
            return inline_engine(actor.model, tokenizer, r, same_memory=True, keep_turns=role.turns)
        return own_engine(role, r, self.placement, start, run_folder=folder, note=self.events)

    def rollout_sleeps(self) -> bool:
        """Returns whether the generation engine shares devices with models, and rests while they work:
        ``rollout.sleep``.
        """
        r = self.roles.rollout
        assert r is not None
        if r.sleep != "auto":
            return r.sleep == "always"
        if r.engine == "inline" or r.mode == "server" or kind_of(self.device) is CPU:
            return False
        if not in_pool(self.placement, r):
            return True  # beside the controller, on the device that a pool's first process has too
        return self.placement.pool_of("rollout") in {self.placement.pool_of(m.role) for m in self.roles.models}

    def _group(self, role: Role, cls: type) -> WorkerGroup:
        assert self.cluster is not None
        pool = self.placement.pool_of(role.name)
        assert pool is not None
        size, sp = self.placement.pools[pool], role.engine.sequence_parallel
        return self.cluster.group(role.name, cls, pool, role, mesh={"dp": size // sp, "sp": sp})


def describe_placement(config: TrainingConfig) -> Iterator[str]:
    """Yields lines on which model is in which pool, before anything starts."""
    placement, roles = resolved_placement(config.placement), config.roles()
    if placement.backend == "ray":
        importlib.import_module("hybridflow.controller.backends.ray")  # refused where Ray is not installed
    cut: dict[str, list[str]] = {pool: [] for pool in placement.pools}
    for model in roles.models:
        engine, pool = model.engine, placement.pool_of(model.role)
        if pool is not None:
            if engine.strategy != "local":
                check_degrees(placement.pools[pool], engine)
            ulysses = f" x Ulysses {engine.sequence_parallel}" if engine.sequence_parallel > 1 else ""
            cut[pool].append(f"{model.role} ({engine.strategy}{ulysses})")
    if roles.rollout is not None and in_pool(placement, roles.rollout):
        cut[placement.pool_of("rollout") or ""].append(f"rollout ({roles.rollout.engine})")
    for pool, models in cut.items():
        size = placement.pools[pool]
        yield f"pool {pool}: {size} process{'es' * (size > 1)} ({placement.backend}): {', '.join(models) or 'nothing'}"


def serve_torchrun(placement: PlacementSection) -> None:
    """Works for the controller, in a process that torchrun started beside the first, and ends with it."""
    if resolved_placement(placement).backend == "torchrun" and int(os.environ.get("RANK", "0")) > 0:
        serve()
        raise SystemExit(0)
