"""The workers of models in the processes of a pool: a rank of a trained model, or of a model that only scores."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from hybridflow.batch import Batch
from hybridflow.config.sections.placement import PlacementSection
from hybridflow.controller.dispatch import ONE_TO_ALL, RANK_ZERO, over, remote
from hybridflow.controller.worker import WorkerContext
from hybridflow.devices import memory_metrics
from hybridflow.engines.fsdp.engine import ShardedEngine, ShardedReference
from hybridflow.engines.local import LocalEngine
from hybridflow.engines.reference import LocalReference
from hybridflow.placing.build import engine_of, role_tokenizer
from hybridflow.placing.role import Role
from hybridflow.placing.turns import Lora, take_turn
from hybridflow.protocols.training import Loss, Scorer, Update
from hybridflow.weights.transport import Sender, drain, open_sender, pick_transport


class ScoringWorker:
    """One rank of a model that scores and shares its process with others: a reference, or an `EngineWorker`.

    Args:
        context: where the worker runs.
        role: the model.

    Raises:
        UserError: it cannot be loaded, or not be cut as its engine section says.
    """

    engine: LocalEngine | ShardedEngine | LocalReference | ShardedReference
    where: Literal["device", "host"] = "device"

    def __init__(self, context: WorkerContext, role: Role) -> None:
        self.context, self.role = context, role
        if role.engine.strategy != "local":
            context.join_pool()
        self.engine = engine_of(role, context.device)

    @remote(over("dp"))
    def score(
        self, part: Batch, outputs: Sequence[str], temperature: float, whose: Literal["own", "reference"]
    ) -> dict[str, Tensor]:
        """See `Scorer.score`; of an actor's "reference": with adapters switched off."""
        take_turn(self.context)
        return self.scorer(whose).score(part, outputs, temperature=temperature)

    def scorer(self, whose: Literal["own", "reference"]) -> Scorer:
        """Returns the scorer."""
        assert whose == "own", "only what is trained has a reference in it"
        return self.engine

    @remote(ONE_TO_ALL)
    def rest(self) -> None:
        """Moves what ``engine.offload`` names to host memory, because another model of this process works now."""
        self._move("host")

    def work(self) -> None:
        """Reverses `rest`."""
        self._move("device")

    def _move(self, where: Literal["device", "host"]) -> None:
        if self.role.engine.offload and self.where != where:
            self.engine.to(where)
            self.where = where


class EngineWorker(ScoringWorker):
    """One rank of a model that is trained; the arguments are those of `ScoringWorker`."""

    engine: LocalEngine | ShardedEngine

    def __init__(self, context: WorkerContext, role: Role) -> None:
        super().__init__(context, role)
        self.sender: Sender | None = None

    def scorer(self, whose: Literal["own", "reference"]) -> Scorer:
        """Returns the scorer: the model, or the model as it was before its adapters were trained."""
        return self.engine if whose == "own" else self.engine.without_adapters()

    @remote(over("dp"))
    def update(self, part: Batch, loss: Loss, rows: Sequence[int]) -> Update:
        """See `TrainEngine.update`; `rows` says how many sequences each data-parallel place was sent."""
        take_turn(self.context)
        update = self.engine.update(part, loss, rows=rows)
        return replace(update, metrics=update.metrics | memory_metrics())

    @remote(ONE_TO_ALL)
    def save(self, folder: Path, background: bool = False) -> None:
        """See `TrainEngine.save`."""
        take_turn(self.context)
        self.engine.save(folder, background=background)

    @remote(ONE_TO_ALL)
    def saved(self, wait: bool) -> bool:
        """See `TrainEngine.saved`."""
        return self.engine.saved(wait=wait)

    @remote(ONE_TO_ALL)
    def load(self, folder: Path) -> None:
        """See `TrainEngine.load`."""
        take_turn(self.context)
        self.engine.load(folder)

    @remote(ONE_TO_ALL)
    def export(self, folder: Path, dtype: torch.dtype) -> None:
        """See `TrainEngine.export`."""
        take_turn(self.context)
        self.engine.export(folder, dtype)

    @remote(ONE_TO_ALL)
    def to(self, where: Literal["device", "host"]) -> None:
        """See `TrainEngine.to`."""
        self.engine.to(where)

    @remote(ONE_TO_ALL)
    def perturb(self, names: Collection[str] | None = None) -> None:
        """See `TrainEngine.perturb`."""
        take_turn(self.context)
        self.engine.perturb(names)

    @remote(RANK_ZERO)
    def stop_ids(self) -> tuple[int, ...]:
        """Returns the token ids that end a response of this model."""
        return self.engine.stop_ids(role_tokenizer(self.role))

    @remote(RANK_ZERO)
    def weight_names(self, lora: Lora) -> frozenset[str]:
        """Returns the names that a publication holds."""
        return self.engine.stream_weights(lora=lora).names

    @remote(RANK_ZERO)
    def open_weights(self, receivers: Sequence[str], placement: PlacementSection, device: str | None = None) -> str:
        """Opens the end that weights leave from, in place of an earlier one; returns its address.

        Args:
            receivers: the host of each process that takes them.
            placement: how they travel.
            device: where bytes are broadcast from; None: from this worker's.
        """
        if self.sender is not None:
            self.sender.close()
        kind = pick_transport(placement.transport, one_host={*receivers} == {self.context.host})
        self.sender = open_sender(
            kind,
            len(receivers),
            host=self.context.address,
            timeout=self.context.timeout,
            device=device or self.context.device,
            folder=placement.folder,
            delta=placement.delta,
        )
        return self.sender.address

    @remote(ONE_TO_ALL)
    def send_weights(self, lora: Lora) -> dict[str, int]:
        """Sends the weights from rank 0 to all receivers; returns the fingerprints that left, on rank 0."""
        take_turn(self.context)
        stream = self.engine.stream_weights(lora=lora)
        if self.sender is None:
            drain(stream)
        else:
            self.sender.send(stream)
        return stream.published
