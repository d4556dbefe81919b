"""Engines whose models live in worker groups. The loop calls them like engines of its own process.

The controller cuts a batch into one part for every data-parallel place, balanced by the work in it, and sends each part
the columns that are read there. The workers handle everything between ranks themselves (gathered parameters, summed
gradients).

Shapes: B sequences, T tokens of all sequences.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hybridflow.algorithms.losses import loss_spec
from hybridflow.balance import balanced_ranks, beginning_costs, seqlen_metrics, sequence_costs
from hybridflow.batch import Batch
from hybridflow.config.sections.placement import PlacementSection
from hybridflow.controller.group import WorkerGroup
from hybridflow.engines.passes import MODEL_COLUMNS
from hybridflow.models.forward import beginnings
from hybridflow.protocols.training import Loss, Pending, Scorer, TrainEngine, Update
from hybridflow.protocols.weights import Receipt, WeightStream
from hybridflow.weights.transport import Receiver, open_receiver

Scores = dict[str, Tensor]


class GroupScorer(Scorer):
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
        """Begins to score; the result waits for the scores when it is called."""
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
        """Moves what its section's `offload` names to host memory, because another model works on its devices now."""
        self.group.rest()

    def rows(self, batch: Batch) -> list[list[int]]:
        """Returns the sequences of every data-parallel place."""
        costs, places = sequence_costs(batch.lengths().tolist()), self.group.mesh.dims["dp"]
        if "group_B" not in batch:
            return balanced_ranks(costs, places)
        length_B, kind_B = beginnings(batch)
        return balanced_ranks(costs, places, kind_B.tolist(), beginning_costs(length_B.tolist()))


class GroupEngine(GroupScorer, TrainEngine):
    """A `TrainEngine` over a group of workers.

    Args:
        group: `placing.train_worker.EngineWorker`.
        name: the prefix of its metrics.
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
        self._receiver: Receiver | None = None  # of a stream that this process takes
        self._address: str | None = None  # the address where other processes take weights from
        self._receivers: list[str] = []  # the hosts of these processes

    def update(self, batch: Batch, loss: Loss) -> Update:
        """See `TrainEngine.update`."""
        return self.update_later(batch, loss)()

    def update_later(self, batch: Batch, loss: Loss) -> Callable[[], Update]:
        """Begins an optimizer step; the result waits for its end when it is called."""
        if not len(batch):
            return lambda: Update({})
        rows = self.rows(batch)
        read = {*MODEL_COLUMNS, *loss_spec(loss.name).reads(loss.params).columns}
        sent = batch.select([name for name in batch if name in read])
        future = self.group.update.later([sent.take(r) for r in rows], loss, [len(r) for r in rows])
        return lambda: self._joined(batch, rows, future.result())

    def _joined(self, batch: Batch, rows: list[list[int]], updates: list[Update]) -> Update:
        bad_rows = sorted(r[i] for r, update in zip(rows, updates) for i in update.bad_rows)
        most = {key: max(u.metrics[key] for u in updates) for key in updates[0].metrics if key.startswith("perf/")}
        metrics = updates[0].metrics | most  # memory is the largest of all workers; all else is the same on each
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
        stream.send = lambda receivers, take: self.send_weights(stream, receivers, take)
        return stream

    def send_weights(
        self, stream: RemoteStream, receivers: Sequence[str], take: Callable[[str], list[Receipt]]
    ) -> list[Receipt]:
        """Sends weights from the workers to other processes, past the controller's.

        Args:
            stream: of this engine; the fingerprints of what left are added to it.
            receivers: the host of each process that takes them.
            take: has them receive from an address; returns when they have.
        """
        if self._address is None or self._receivers != [*receivers]:
            self._address, self._receivers = self.group.open_weights(receivers, self.placement), [*receivers]
        sent = self.group.send_weights.later(stream.lora)
        receipts = take(self._address)
        stream.published.update(sent.result()[0])
        return receipts

    def without_adapters(self) -> GroupScorer:
        """See `TrainEngine.without_adapters`."""
        return GroupScorer(self.group, "reference")

    def stop_ids(self, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
        """See `TrainEngine.stop_ids`; the worker reads the tokenizer of its role, which is the same."""
        return self.group.stop_ids()

    def perturb(self, names: Collection[str] | None = None) -> None:
        """See `TrainEngine.perturb`."""
        self.group.perturb(names)

    def to(self, where: Literal["device", "host"]) -> None:
        """See `TrainEngine.to`."""
        self.group.to(where)

    def _arriving(self, stream: RemoteStream) -> Iterator[tuple[str, Tensor]]:
        """Yields the weights in the controller's process: for an engine that lives here (vLLM)."""
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
        engine: the engine of the workers.
        lora: see `TrainEngine.stream_weights`.
    """

    engine: GroupEngine | None = None
    lora: Literal["adapters", "merged"] | None = None
