"""Training and scoring with a model that is cut over processes: every rank calls the same methods in the same order.

Each rank has its own sequences, maybe none. Weights were computed for the whole mini-batch, so gradients are summed
over micro-batches and ranks and never averaged; sums are the same on every rank, so all ranks decide the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hybridflow.batch import Batch
from hybridflow.config.sections.engine import ShardedSection
from hybridflow.config.sections.optim import OptimSection
from hybridflow.engines.adam import AdamEngine
from hybridflow.engines.fsdp.files import ShardedFiles
from hybridflow.engines.fsdp.model import ShardedModel
from hybridflow.engines.fsdp.ranks import check_parts
from hybridflow.engines.passes import joined
from hybridflow.engines.reference import WithoutAdapters
from hybridflow.models.load import stop_ids
from hybridflow.models.value import ValueHead
from hybridflow.protocols.training import Loss, Scorer, TrainEngine, Update
from hybridflow.protocols.weights import WeightStream
from hybridflow.weights.adapters import WRAPPED
from hybridflow.weights.stream import stream_of


class ShardedEngine(AdamEngine, TrainEngine):
    """A `TrainEngine` around a `ShardedModel`: AdamW on float32 weights, of which each rank holds and steps its part.

    Args:
        model: see `ShardedModel`; parameters that require no gradient are left alone (LoRA).
        optim: optimizer and schedule.
        section: how the model is cut and computed.
        total_steps: optimizer steps of the whole run, for the schedule's decay.
        tokens_per_microbatch: most tokens in one forward pass.
        device: of this rank.
        value_head: see `LocalEngine`.
        name: the prefix of its metrics.

    Raises:
        UserError: see `ShardedModel`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        optim: OptimSection,
        *,
        section: ShardedSection,
        total_steps: int,
        tokens_per_microbatch: int,
        device: torch.device | str = "cpu",
        value_head: ValueHead | None = None,
        name: Literal["actor", "critic"] = "actor",
    ) -> None:
        model.train()
        self.sharded = ShardedModel(
            model,
            section=section,
            tokens_per_microbatch=tokens_per_microbatch,
            device=device,
            value_head=value_head,
        )
        self.model, self.value_head = model, value_head
        self.device, self.section, self.ranks = self.sharded.device, section, self.sharded.ranks
        trained = {n: p for n, p in self.sharded.parameters().items() if p.requires_grad}
        decayed = {n.removeprefix("model.") for n in self.sharded.decayed}
        super().__init__(trained, optim, decayed=decayed, total_steps=total_steps, name=name)
        self.files = ShardedFiles(self)

    def score(self, batch: Batch, outputs: Sequence[str], *, temperature: float = 1.0) -> dict[str, Tensor]:
        """See `TrainEngine.score`; the columns are those of this rank's sequences."""
        return self.sharded.score(batch, outputs, temperature=temperature)

    def update(self, batch: Batch, loss: Loss, *, rows: Sequence[int] | None = None) -> Update:
        """See `TrainEngine.update`: the same on every rank, but for `bad_rows`, which are of this rank's sequences.

        Args:
            batch: this rank's sequences; weight columns are of the whole mini-batch.
            loss: which loss, with its parameters.
            rows: how many sequences were sent to each data-parallel place; None: not counted.

        Raises:
            RuntimeError: a rank has fewer or more sequences than it was sent.
        """
        found = self.ranks.gathered(len(batch))
        if rows is not None:
            check_parts(found, rows)
        if not any(found):
            return Update({})  # no sequence carries loss: no step, and the schedule stands still
        self.optimizer.zero_grad(set_to_none=True)
        own = self.sharded.passes.accumulate(batch, loss)
        sums = joined(self.ranks.one_per_place(self.ranks.gathered(own)))
        sums.bad_rows = own.bad_rows
        norm = self.sharded.sharding.clip(list(self.trained.values()), self.optim.clip_grad_norm)
        return self.step(sums, norm)

    def anywhere(self, found: bool) -> bool:
        """See `AdamEngine.anywhere`."""
        return bool(self.ranks.largest(int(found)))

    def save(self, folder: Path, *, background: bool = False) -> None:
        """See `TrainEngine.save`."""
        self.require_finite(self.published() | self.trained, "and are not saved")
        self.files.save(folder, background=background)

    def saved(self, *, wait: bool) -> bool:
        """See `TrainEngine.saved`: of this rank's files."""
        return self.files.writing.done(wait=wait)

    def load(self, folder: Path) -> None:
        """See `TrainEngine.load`."""
        self.files.load(folder)

    def export(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        """See `TrainEngine.export`: tensor by tensor, and rank 0 writes."""
        self.require_finite(self.published() | self.trained, "and are not exported")
        self.files.export(folder, dtype)

    def stream_weights(
        self, *, lora: Literal["adapters", "merged"] | None = None, dtype: torch.dtype | None = None
    ) -> WeightStream:
        """See `TrainEngine.stream_weights` and `weights.stream.stream_of`: all ranks take the tensors in lock step."""
        names = [name for names in self.sharded.names.values() for name in names]
        first = self.ranks.rank == 0  # one set of fingerprints is enough
        return stream_of(self.model, lora=lora, dtype=dtype, fingerprints=first, names=names, gather=self.sharded.state)

    def without_adapters(self) -> WithoutAdapters:
        """See `TrainEngine.without_adapters`."""
        return WithoutAdapters(self, self.model)

    def stop_ids(self, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
        """See `TrainEngine.stop_ids`."""
        return stop_ids(self.model, tokenizer)

    def published(self) -> dict[str, Tensor]:
        """See `AdamEngine.published`."""
        names = self.sharded.names
        own: dict[str, Tensor] = {n: p for n, p in self.sharded.parameters().items() if n in names}
        buffers = ((n.replace(WRAPPED, ""), b) for n, b in self.model.named_buffers())
        return own | {n: b for n, b in buffers if n in names}

    def to(self, where: Literal["device", "host"]) -> None:
        """See `TrainEngine.to`: of parameters and moments what the section's `offload` says."""
        target = self.device if where == "device" else torch.device("cpu")
        if where == "host":
            self.optimizer.zero_grad(set_to_none=True)
        if "parameters" in self.section.offload:
            self.sharded.sharding.to(target)
        if "optimizer" in self.section.offload:
            self.move_moments(target)


class ShardedReference(Scorer):
    """A `Scorer` around a `ShardedModel` that is never trained; the arguments are those of `ShardedModel`."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        section: ShardedSection,
        tokens_per_microbatch: int,
        device: torch.device | str = "cpu",
    ) -> None:
        model.eval().requires_grad_(False)
        self.sharded = ShardedModel(model, section=section, tokens_per_microbatch=tokens_per_microbatch, device=device)

    def score(self, batch: Batch, outputs: Sequence[str], *, temperature: float = 1.0) -> dict[str, Tensor]:
        """See `Scorer.score`; the columns are those of this rank's sequences."""
        return self.sharded.score(batch, outputs, temperature=temperature)

    def to(self, where: Literal["device", "host"]) -> None:
        """Moves the parameters, where the section's `offload` names them."""
        if "parameters" in self.sharded.section.offload:
            self.sharded.sharding.to(self.sharded.device if where == "device" else torch.device("cpu"))
