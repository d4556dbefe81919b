"""A replica of a generation engine in a process of a pool."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hybridflow.config.sections.placement import PlacementSection
from hybridflow.config.sections.rollout import RolloutSection
from hybridflow.controller.dispatch import ALL_TO_ALL, ONE_TO_ALL, remote
from hybridflow.controller.worker import WorkerContext
from hybridflow.placing.build import load_role, role_tokenizer
from hybridflow.placing.generation import inline_engine, own_engine
from hybridflow.placing.role import Role
from hybridflow.placing.turns import Lora, take_turn
from hybridflow.protocols.generation import Request, Result, RolloutEngine
from hybridflow.protocols.waiting import returning_when
from hybridflow.protocols.weights import Receipt
from hybridflow.weights.channel import Inbox


class RolloutWorker:
    """A replica that generates: on the memory of an actor that is whole in this process, else with weights of its own.

    Args:
        context: where the worker runs.
        role: the actor's.
        section: how responses are generated.
        start: the folder of a model to begin with, for an engine that is not inline.
    """

    engine: RolloutEngine

    def __init__(self, context: WorkerContext, role: Role, section: RolloutSection, start: Path | None) -> None:
        self.context = context
        actor = context.siblings.get("actor")
        if section.engine != "inline":
            self.engine = own_engine(role, section, PlacementSection(), start)
        elif actor is not None and role.engine.strategy == "local":
            self.engine = inline_engine(
                actor.engine.model, role_tokenizer(role), section, same_memory=True, keep_turns=role.turns
            )
        else:
            model, tokenizer = load_role(replica_of(role))
            model.to(context.device).requires_grad_(False)
            self.engine = inline_engine(model, tokenizer, section, keep_turns=role.turns)
        self.paused = False
        self.handles: dict[int, int] = {}  # the engine's handles to the controller's
        self.inbox = Inbox(timeout=context.timeout, device=context.device)

    @remote(ALL_TO_ALL)
    def advance(self, new: Sequence[tuple[int, Request]], seconds: float) -> list[Result]:
        """Takes new requests and generates until this much time is over; returns what has ended."""
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
    def sizes(self) -> tuple[int, int]:
        """Returns `RolloutEngine.max_model_len` and `cache_block` of its engine."""
        return self.engine.max_model_len, self.engine.cache_block

    @remote(ONE_TO_ALL)
    def read_back(self, names: Sequence[str]) -> dict[str, int]:
        """See `RolloutEngine.read_back`."""
        return self.engine.read_back(names)

    @remote(ONE_TO_ALL)
    def host(self) -> str:
        """Returns the name of the host that this process is on."""
        return self.context.host

    @remote(ONE_TO_ALL)
    def take_weights(self, actor: str, version: int, lora: Lora) -> tuple[list[Receipt], dict[str, int]]:
        """Takes the weights of the actor in this process; returns what was received, and (on rank 0) what was
        published.
        """
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
    def forget(self) -> None:
        """See `RolloutEngine.forget`."""
        self.engine.forget()

    @remote(ONE_TO_ALL)
    def sleep(self) -> None:
        """See `RolloutEngine.sleep`."""
        self.engine.sleep()

    @remote(ONE_TO_ALL)
    def wake(self) -> None:
        """See `RolloutEngine.wake`."""
        self.engine.wake()

    def rest(self) -> None:
        """Does nothing: the cache is freed with the last response."""

    def work(self) -> None:
        """Does nothing: there is nothing to restore."""

    def _named(self, results: Sequence[Result]) -> list[Result]:
        for result in results:
            result.handle = self.handles.pop(result.handle)
        return list(results)


def replica_of(role: Role) -> Role:
    """Returns the actor's role as a replica has it: never trained, and plain where adapters arrive as part of the
    weights.
    """
    lora = role.model.lora if role.publish == "adapters" else None
    model = role.model.model_copy(update={"lora": lora, "activation_checkpointing": False})
    return replace(role, model=model, optim=None)
