"""Engines whose models live in worker groups: what the loop calls, and what it never notices.

The controller cuts a batch into one part for every data-parallel place, balanced by the work in it, and sends each part
the columns that are read there. Everything between ranks (gathered parameters, summed gradients) is the workers' own.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from hybridflow.algorithms.losses import columns_of
from hybridflow.balance import balanced_ranks, beginning_costs, seqlen_metrics, sequence_costs
from hybridflow.batch import Batch
from hybridflow.config.placement import PlacementSection
from hybridflow.controller.group import Future, WorkerGroup
from hybridflow.engines.microbatch import MODEL_COLUMNS
from hybridflow.models.forward import beginnings
from hybridflow.protocols import (
    DirectReceiver,
    Loss,
    Receipt,
    Request,
    Result,
    RolloutEngine,
    Scorer,
    TrainEngine,
    Update,
    WeightStream,
    never,
)
from hybridflow.weights.transport import Receiver, open_receiver

Scores = dict[str, Tensor]
SLICE_SECONDS = 0.5  # how long replicas generate before they hand over what has ended


@dataclass(frozen=True, slots=True)
class Pending:
    """Scores that may still be computed elsewhere: call it to have them.

    Args:
        result: waits for them.
        done: whether that would return at once.
    """

    result: Callable[[], Scores]
    done: Callable[[], bool] = lambda: True

    def __call__(self) -> Scores:
        """The scores."""
        return self.result()


class GroupScorer:
    """A `Scorer` over a group of workers.

    Args:
        group: workers that have `score`, on a mesh with a dimension "dp".
        whose: "own" scores, or those of the "reference": the same model without its adapters.
    """

    def __init__(self, group: WorkerGroup, whose: Literal["own", "reference"] = "own") -> None:
        self.group, self.whose = group, whose

    def score(self, batch: Batch, outputs: Sequence[str], *, temperature: float = 1.0) -> Scores:
        """See `Scorer.score`."""
        return self.score_later(batch, outputs, temperature=temperature)()

    def score_later(self, batch: Batch, outputs: Sequence[str], *, temperature: float = 1.0) -> Pending:
        """Begins to score; what it returns waits for the scores."""
        if not len(batch):
            return Pending(lambda: {name: torch.zeros(0) for name in outputs})
        rows = self.rows(batch)
        sent = batch.select([name for name in MODEL_COLUMNS if name in batch])
        future = self.group.score.later([sent.take(r) for r in rows], list(outputs), temperature, self.whose)

        def in_order() -> Scores:
            places = sent.select([])
            places["position_T"] = torch.arange(batch.total())
            position_T = torch.cat([places.take(r)["position_T"] for r in rows])
            found = {}
            for name in outputs:
                column_T = torch.cat([score[name] for score in future.result()])
                found[name] = torch.empty_like(column_T)
                found[name][position_T] = column_T
            return found

        return Pending(in_order, future.done)

    def rest(self) -> None:
        """Something else works on its devices now: what its section's `offload` names moves to host memory."""
        self.group.rest()

    def rows(self, batch: Batch) -> list[list[int]]:
        """The sequences of every data-parallel place."""
        costs, places = sequence_costs(batch.lengths().tolist()), self.group.mesh.dims["dp"]
        if "group_B" not in batch:
            return balanced_ranks(costs, places)
        return balanced_ranks(costs, places, batch["group_B"].tolist(), beginning_costs(beginnings(batch).tolist()))


class GroupEngine(GroupScorer):
    """A `TrainEngine` over a group of workers.

    Args:
        group: `trainers.workers.EngineWorker`.
        name: what its metrics begin with.
        placement: how its weights travel to other processes; None: as the section's defaults say.
    """

    def __init__(
        self,
        group: WorkerGroup,
        name: Literal["actor", "critic"] = "actor",
        *,
        placement: PlacementSection | None = None,
    ) -> None:
        super().__init__(group)
        self.name, self.placement = name, placement or PlacementSection()
        self._receiver: Receiver | None = None  # in the controller's process
        self._address: str | None = None  # where other processes take weights from
        self._receivers: list[str] = []  # who they are

    def update(self, batch: Batch, loss: Loss) -> Update:
        """See `TrainEngine.update`."""
        return self.update_later(batch, loss)()

    def update_later(self, batch: Batch, loss: Loss) -> Callable[[], Update]:
        """Begins an optimizer step; what it returns waits for its end."""
        if not len(batch):
            return lambda: Update({})
        rows = self.rows(batch)
        read = {*MODEL_COLUMNS, *columns_of(loss)}
        sent = batch.select([name for name in batch if name in read])
        future = self.group.update.later([sent.take(r) for r in rows], loss, [len(r) for r in rows])
        return lambda: self._joined(batch, rows, future.result())

    def _joined(self, batch: Batch, rows: list[list[int]], updates: list[Update]) -> Update:
        bad_rows = sorted(r[i] for r, update in zip(rows, updates) for i in update.bad_rows)
        most = {key: max(u.metrics[key] for u in updates) for key in updates[0].metrics if key.startswith("perf/")}
        metrics = updates[0].metrics | most  # the memory of the worker that has the most; all else is alike
        if self.name == "actor":
            metrics = metrics | seqlen_metrics(batch.lengths().tolist(), rows)
        return Update(metrics, updates[0].applied, bad_rows)

    def save(self, folder: Path, *, background: bool = False) -> None:
        """See `TrainEngine.save`."""
        self.group.save(folder.absolute(), background)

    def saved(self, *, wait: bool) -> bool:
        """See `TrainEngine.saved`."""
        return all(self.group.saved(wait))

    def load(self, folder: Path) -> None:
        """See `TrainEngine.load`."""
        self.group.load(folder.absolute())

    def export(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        """See `TrainEngine.export`."""
        self.group.export(folder.absolute(), dtype)

    def stream_weights(self, *, lora: Literal["adapters", "merged"] | None = None) -> WeightStream:
        """See `TrainEngine.stream_weights`: nothing moves before it is taken."""
        stream = RemoteStream(iter(()), self.group.weight_names(lora), engine=self, lora=lora)
        stream.tensors = self._arriving(stream)
        return stream

    def send_weights(
        self, stream: RemoteStream, receivers: Sequence[str], take: Callable[[str], list[Receipt]]
    ) -> list[Receipt]:
        """Sends weights from the workers to other processes, past the controller's.

        Args:
            stream: of this engine; what left is noted in it.
            receivers: the host of each process that takes them.
            take: has them take what comes from an address; returns when they have.
        """
        if self._address is None or self._receivers != [*receivers]:
            self._address, self._receivers = self.group.open_weights(receivers, self.placement), [*receivers]
        sent = self.group.send_weights.later(stream.lora)
        receipts = take(self._address)
        stream.published.update(sent.result()[0])
        return receipts

    def perturb(self, names: Collection[str] | None = None) -> None:
        """See `TrainEngine.perturb`."""
        self.group.perturb(names)

    def to(self, where: Literal["device", "host"]) -> None:
        """See `TrainEngine.to`."""
        self.group.to(where)

    def _arriving(self, stream: RemoteStream) -> Iterator[tuple[str, Tensor]]:
        """The weights in the controller's process: for an engine that lives here (vLLM)."""
        if self._receiver is None:
            address = self.group.open_weights([socket.gethostname()], self.placement, "cpu")
            self._receiver = open_receiver(address, 0, timeout=self.placement.timeout)
        sent = self.group.send_weights.later(stream.lora)
        yield from self._receiver.receive().tensors
        stream.published.update(sent.result()[0])


@dataclass(slots=True)
class RemoteStream(WeightStream):
    """Weights that are still with their workers: taken in the controller's process, or sent past it.

    Args:
        engine: whose workers they are.
        lora: see `TrainEngine.stream_weights`.
    """

    engine: GroupEngine | None = None
    lora: Literal["adapters", "merged"] | None = None


class GroupRollout:
    """A `RolloutEngine` over replicas in a pool: each answers its share of the prompts.

    Replicas generate for a moment, hand over what has ended, and go on while the controller scores it. What a replica
    gets is decided by the requests alone, so tokens and the company that they were computed in repeat. A request may
    name its replica.

    Args:
        group: `trainers.workers.RolloutWorker`.
    """

    def __init__(self, group: WorkerGroup) -> None:
        self.group = group
        self.should_return: Callable[[], bool] = never
        self.replicas = group.world_size
        self._next = 0
        self._queue: list[tuple[int, Request]] = []
        self._in_flight: set[int] = set()
        self._slice: Future | None = None  # under way in the replicas
        self._ready: list[Result] = []

    def submit(self, request: Request) -> int:
        """See `RolloutEngine.submit`."""
        self._next += 1
        self._queue.append((self._next, request))
        self._in_flight.add(self._next)
        return self._next

    def wait(self) -> list[Result]:
        """See `RolloutEngine.wait`."""
        while not self._ready and self._in_flight and not self.should_return():
            self._advance()
        ready, self._ready = self._ready, []
        if self._in_flight and self._slice is None:
            self._begin()
        return ready

    def abort(self, handles: Iterable[int]) -> list[Result]:
        """See `RolloutEngine.abort`."""
        if self._slice is not None:
            self._finish()
        wanted = set(handles)
        never = [h for h, _ in self._queue if h in wanted]
        self._queue = [(h, r) for h, r in self._queue if h not in wanted]
        done = [result for part in self.group.abort(sorted(wanted)) for result in part]
        done += [result for result in self._ready if result.handle in wanted]
        self._ready = [result for result in self._ready if result.handle not in wanted]
        self._in_flight -= wanted
        return done + [Result(h, [], [], "abort", []) for h in never]

    def pause(self) -> None:
        """See `RolloutEngine.pause`."""
        self._settle()
        self.group.pause()

    def resume(self) -> None:
        """See `RolloutEngine.resume`."""
        self.group.resume()

    def update_weights(self, stream: WeightStream, version: int) -> list[Receipt]:
        """See `RolloutEngine.update_weights`: the receipts of every replica's processes, replica by replica."""
        assert isinstance(stream, RemoteStream) and stream.engine is not None, "replicas take weights from workers"
        self._settle()
        actor = stream.engine.group
        if actor.pool == self.group.pool:
            answers = self.group.take_weights(actor.name, version, stream.lora)
            stream.published.update(answers[0][1])
            return _flat(receipts for receipts, _ in answers)
        return stream.engine.send_weights(
            stream, self.group.host(), lambda address: _flat(self.group.receive_weights(address, version))
        )

    def sleep(self) -> None:
        """See `RolloutEngine.sleep`."""
        assert not self._in_flight, "sleep with requests in flight"
        self.group.sleep()

    def wake(self) -> None:
        """See `RolloutEngine.wake`."""
        self.group.wake()

    def close(self) -> None:
        """See `RolloutEngine.close`: the processes end with their cluster."""

    def _advance(self) -> None:
        if self._slice is None:
            self._begin()
        self._finish()

    def _begin(self) -> None:
        shares = shares_of(self._queue, self.group.world_size)
        self._queue = []
        self._slice = self.group.advance.later(shares, [SLICE_SECONDS] * len(shares))

    def _finish(self) -> None:
        assert self._slice is not None
        under_way, self._slice = self._slice, None
        for results in under_way.result():
            for result in results:
                self._in_flight.discard(result.handle)
                self._ready.append(result)

    def _settle(self) -> None:
        """Waits for the moment of generation that is under way, if any: commands reach replicas in order."""
        if self._slice is not None:
            self._finish()


def score_later(scorer: Scorer, batch: Batch, outputs: Sequence[str], *, temperature: float = 1.0) -> Pending:
    """Has a model score; what it returns gives the scores. A model in other processes works meanwhile."""
    if isinstance(scorer, GroupScorer):
        return scorer.score_later(batch, outputs, temperature=temperature)
    scores = scorer.score(batch, outputs, temperature=temperature)
    return Pending(lambda: scores)


def update_later(engine: TrainEngine, batch: Batch, loss: Loss) -> Callable[[], Update]:
    """Has a model take an optimizer step; what it returns gives the result. The same as of `score_later` holds."""
    if isinstance(engine, GroupEngine):
        return engine.update_later(batch, loss)
    update = engine.update(batch, loss)
    return lambda: update


def deliver(stream: WeightStream, engine: RolloutEngine, version: int) -> list[Receipt]:
    """Gives an engine new weights: from workers straight to its own processes where it has some, else through here.

    Returns:
        A receipt of every process that took them; none is held against the stream yet.
    """
    if isinstance(stream, RemoteStream) and stream.engine is not None and isinstance(engine, DirectReceiver):
        return stream.engine.send_weights(
            stream, engine.receivers(), lambda address: engine.receive_weights(address, version)
        )
    return engine.update_weights(stream, version)


def _flat(replicas: Iterable[list[Receipt]]) -> list[Receipt]:
    return [receipt for receipts in replicas for receipt in receipts]


def shares_of(queue: Sequence[tuple[int, Request]], replicas: int) -> list[list[tuple[int, Request]]]:
    """The requests of every replica: those of one prompt together, as many tokens to each as can be told beforehand."""
    prompts: dict[tuple[int, ...], list[tuple[int, Request]]] = {}
    for handle, request in queue:
        if request.replica is None:
            prompts.setdefault(request.prompt_ids, []).append((handle, request))
    costs = [
        len(prompt) + sum(r.sampling.max_tokens - len(r.generated_ids) for _, r in asked)
        for prompt, asked in prompts.items()
    ]
    together = list(prompts.values())
    shares = [[entry for i in rows for entry in together[i]] for rows in balanced_ranks(costs, replicas)]
    for handle, request in queue:
        if request.replica is not None:
            shares[request.replica].append((handle, request))
    return shares
