"""What runs in the processes of a pool: one rank of a trained model, of a reference, or a replica that generates."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from hybridflow.batch import Batch
from hybridflow.config.placement import PlacementSection
from hybridflow.config.sections import RolloutSection
from hybridflow.controller.dispatch import ALL_TO_ALL, ONE_TO_ALL, RANK_ZERO, over, remote
from hybridflow.controller.worker import WorkerContext
from hybridflow.engines.load import load_sharded
from hybridflow.engines.local import LocalEngine
from hybridflow.engines.mesh import check_parts
from hybridflow.engines.reference import LocalReference
from hybridflow.engines.sharded import ShardedEngine, ShardedReference
from hybridflow.models.load import require_context, stop_ids
from hybridflow.models.value import value_head
from hybridflow.protocols import Loss, Receipt, Request, Result, RolloutEngine, Update, returning_when
from hybridflow.trainers.generation import inline_engine, own_engine
from hybridflow.trainers.lifecycle import memory_metrics
from hybridflow.trainers.roles import Role, load_role, local_engine, local_reference, role_tokenizer
from hybridflow.weights.channel import Inbox
from hybridflow.weights.transport import Sender, drain, open_sender, pick_transport

Lora = Literal["adapters", "merged"] | None


class ScoringWorker:
    """One rank of a model that scores and shares its process with others: a reference, or an `EngineWorker`.

    Args:
        context: where this is.
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
        adapters_off = nullcontext()
        if whose == "reference":
            assert isinstance(self.engine, LocalEngine | ShardedEngine)
            adapters_off = self.engine.model.disable_adapter()
        with adapters_off:
            return self.engine.score(part, outputs, temperature=temperature)

    @remote(ONE_TO_ALL)
    def rest(self) -> None:
        """Another model of this process works now: what ``engine.offload`` names moves to host memory."""
        self._move("host")

    def work(self) -> None:
        """The reverse of `rest`."""
        self._move("device")

    def _move(self, where: Literal["device", "host"]) -> None:
        if self.role.engine.offload and self.where != where:
            assert isinstance(self.engine, ShardedEngine | ShardedReference)  # the section refuses it for others
            self.engine.to(where)
            self.where = where


class EngineWorker(ScoringWorker):
    """One rank of a model that is trained; the arguments are those of `ScoringWorker`."""

    engine: LocalEngine | ShardedEngine

    def __init__(self, context: WorkerContext, role: Role) -> None:
        super().__init__(context, role)
        self.sender: Sender | None = None

    @remote(over("dp"))
    def update(self, part: Batch, loss: Loss, rows: Sequence[int]) -> Update:
        """See `TrainEngine.update`; `rows` says how many sequences each data-parallel place was sent."""
        take_turn(self.context)
        if isinstance(self.engine, LocalEngine):
            check_parts([len(part)], rows)
            update = self.engine.update(part, loss)
        else:
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
        """Token ids that end an answer of this model."""
        return stop_ids(self.engine.model, role_tokenizer(self.role))

    @remote(RANK_ZERO)
    def weight_names(self, lora: Lora) -> frozenset[str]:
        """The names that a publication holds."""
        return self.engine.stream_weights(lora=lora).names

    @remote(RANK_ZERO)
    def open_weights(self, receivers: Sequence[str], placement: PlacementSection, device: str | None = None) -> str:
        """Opens the end that weights leave from, in place of an earlier one; its address.

        Args:
            receivers: the host of each process that takes them.
            placement: says how they travel.
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
        """Sends the weights from rank 0 to all receivers; the fingerprints that left, on rank 0."""
        take_turn(self.context)
        stream = self.engine.stream_weights(lora=lora)
        if self.sender is None:
            drain(stream)
        else:
            self.sender.send(stream)
        return stream.published


class RolloutWorker:
    """A replica that generates: on the memory of an actor that is whole in this process, else with weights of its own.

    Args:
        context: where this is.
        role: the actor's.
        section: how answers are generated.
        start: the folder of a model to begin with, for an engine that is not inline.
    """

    engine: RolloutEngine

    def __init__(self, context: WorkerContext, role: Role, section: RolloutSection, start: Path | None) -> None:
        self.context = context
        actor = context.siblings.get("actor")
        if start is not None:
            self.engine = own_engine(role, section, PlacementSection(), start)
        elif actor is not None and role.engine.strategy == "local":
            self.engine = inline_engine(actor.engine.model, role_tokenizer(role), section)
        else:
            model, tokenizer = load_role(replica_of(role))
            model.to(context.device).requires_grad_(False)
            self.engine = inline_engine(model, tokenizer, section)
        self.paused = False
        self.handles: dict[int, int] = {}  # the engine's to the controller's
        self.inbox = Inbox(timeout=context.timeout, device=context.device)

    @remote(ALL_TO_ALL)
    def advance(self, new: Sequence[tuple[int, Request]], seconds: float) -> list[Result]:
        """Takes new requests and generates until so much time is over; what has ended."""
        take_turn(self.context)
        for handle, request in new:
            self.handles[self.engine.submit(request)] = handle
        ended: list[Result] = []
        until = time.monotonic() + seconds
        with returning_when(lambda: time.monotonic() >= until, self.engine):
            while self.handles and not self.paused and time.monotonic() < until:
                ended += self._named(self.engine.wait())
        return ended

    @remote(ONE_TO_ALL)
    def abort(self, handles: Sequence[int]) -> list[Result]:
        """See `RolloutEngine.abort`; handles of other replicas are ignored."""
        own = {theirs: handle for handle, theirs in self.handles.items()}
        return self._named(self.engine.abort([own[handle] for handle in handles if handle in own]))

    @remote(ONE_TO_ALL)
    def host(self) -> str:
        """The name of the host that this process is on."""
        return self.context.host

    @remote(ONE_TO_ALL)
    def take_weights(self, actor: str, version: int, lora: Lora) -> tuple[list[Receipt], dict[str, int]]:
        """Takes the weights of the actor in this process; what was received, and (on rank 0) what was published."""
        worker = self.context.siblings[actor]
        take_turn(worker.context)
        stream = worker.engine.stream_weights(lora=lora)
        receipts = self.engine.update_weights(stream, version)
        return receipts, stream.published

    @remote(ONE_TO_ALL)
    def receive_weights(self, address: str, version: int) -> list[Receipt]:
        """Takes the weights that processes of another pool send."""
        with self.inbox.take(address, self.context.rank) as stream:
            return self.engine.update_weights(stream, version)

    @remote(ONE_TO_ALL)
    def pause(self) -> None:
        """See `RolloutEngine.pause`."""
        self.paused = True
        self.engine.pause()

    @remote(ONE_TO_ALL)
    def resume(self) -> None:
        """See `RolloutEngine.resume`."""
        self.paused = False
        self.engine.resume()

    @remote(ONE_TO_ALL)
    def sleep(self) -> None:
        """See `RolloutEngine.sleep`."""
        self.engine.sleep()

    @remote(ONE_TO_ALL)
    def wake(self) -> None:
        """See `RolloutEngine.wake`."""
        self.engine.wake()

    def rest(self) -> None:
        """Nothing is kept: the cache goes with the last answer."""

    def work(self) -> None:
        """See `rest`."""

    def _named(self, results: Sequence[Result]) -> list[Result]:
        for result in results:
            result.handle = self.handles.pop(result.handle)
        return list(results)


def engine_of(role: Role, device: torch.device) -> LocalEngine | ShardedEngine | LocalReference | ShardedReference:
    """A role's model, or this rank's part of it."""
    trained = role.optim is not None
    if role.engine.strategy == "local":
        return local_engine(role, device) if trained else local_reference(role, device)
    return sharded_engine(role, device) if trained else sharded_reference(role, device)


def sharded_engine(role: Role, device: torch.device) -> ShardedEngine:
    """This rank's part of a model that is trained."""
    assert role.optim is not None and role.name in ("actor", "critic")
    model = _sharded_model(role)
    return ShardedEngine(
        model,
        role.optim,
        section=role.engine,
        total_steps=role.total_steps,
        tokens_per_microbatch=role.tokens_per_microbatch,
        device=device,
        value_head=value_head(model) if role.value_head else None,
        name=role.name,
    )


def sharded_reference(role: Role, device: torch.device) -> ShardedReference:
    """This rank's part of a model that is never trained."""
    model = _sharded_model(role)
    return ShardedReference(model, section=role.engine, tokens_per_microbatch=role.tokens_per_microbatch, device=device)


def _sharded_model(role: Role) -> PreTrainedModel:
    model, _ = load_sharded(role.model, seed=role.seed, classifier=role.classifier)
    if role.longest is not None:
        require_context(model, role.longest)
    return model


def replica_of(role: Role) -> Role:
    """The actor's role as a replica has it: never trained, and plain where adapters arrive as part of the weights."""
    lora = role.model.lora if role.publish == "adapters" else None
    model = role.model.model_copy(update={"lora": lora, "activation_checkpointing": False})
    return replace(role, model=model, optim=None)


def take_turn(context: WorkerContext) -> None:
    """The other models of this process rest, and this one works."""
    for name, worker in context.siblings.items():
        if name != context.name:
            worker.rest()
    context.siblings[context.name].work()
