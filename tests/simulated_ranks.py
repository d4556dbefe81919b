"""Training engines of several ranks that a test drives like one: in one process, and in real ones.

In one process, every rank has a replica of the model and an optimizer of its own, takes a part of the sequences, and
sees nothing of the others but the sum of gradients and the sum of metrics: what an all-reduce gives.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hybridflow.batch import Batch
from hybridflow.config.sections.optim import OptimSection
from hybridflow.engines.local import LocalEngine
from hybridflow.engines.passes import joined
from hybridflow.models.value import ValueHead
from hybridflow.protocols.training import Loss, Scorer, TrainEngine, Update
from hybridflow.protocols.weights import WeightStream

import on_ranks.engines
from on_ranks.engines import Case
from ranks import shared_ranks


class SimulatedRanks(TrainEngine):
    """A `TrainEngine` over replicas.

    Args:
        model: a model that `models.load` loaded; the ranks train copies of it.
        optim: optimizer and schedule.
        total_steps: optimizer steps of the whole run.
        tokens_per_microbatch: most tokens in one forward pass of one rank.
        ranks: number of replicas.
        value_head: as of `LocalEngine`; the ranks train copies of it too.
        name: as of `LocalEngine`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        optim: OptimSection,
        *,
        total_steps: int,
        tokens_per_microbatch: int,
        ranks: int = 2,
        value_head: ValueHead | None = None,
        name: Literal["actor", "critic"] = "actor",
    ) -> None:
        self.optim, self.total_steps, self.tokens_per_microbatch = optim, total_steps, tokens_per_microbatch
        self.ranks = [
            LocalEngine(
                copy.deepcopy(model),
                optim,
                total_steps=total_steps,
                tokens_per_microbatch=tokens_per_microbatch,
                value_head=copy.deepcopy(value_head),
                name=name,
            )
            for _ in range(ranks)
        ]

    @property
    def model(self) -> PreTrainedModel:
        return self.ranks[0].model

    @property
    def trained(self) -> dict[str, torch.nn.Parameter]:
        return self.ranks[0].trained

    def score(self, batch: Batch, outputs: Sequence[str], *, temperature: float = 1.0) -> dict[str, Tensor]:
        rows = self._rows(batch)
        scores = [
            rank.score(batch.take(part), outputs, temperature=temperature) for rank, part in zip(self.ranks, rows)
        ]
        order = torch.argsort(torch.tensor([i for part in rows for i in part]))
        joined = Batch.concat([batch.take(part).select([]) for part in rows])
        for name in outputs:
            joined[f"{name}_T"] = torch.cat([s[name] for s in scores])
        joined = joined.take(order)
        return {name: joined[f"{name}_T"] for name in outputs}

    def update(self, batch: Batch, loss: Loss) -> Update:
        parts = self._rows(batch)
        sums = []
        for rank, rows in zip(self.ranks, parts):
            rank.optimizer.zero_grad(set_to_none=True)
            sums.append(rank.passes.accumulate(batch.take(rows), loss))
        self._all_reduce_gradients()
        norms = [
            float(torch.nn.utils.clip_grad_norm_(r.trained.values(), self.optim.clip_grad_norm)) for r in self.ranks
        ]
        assert not math.isfinite(norms[0]) or len(set(norms)) == 1, "replicas have drifted apart"
        total = joined(sums)
        total.bad_rows = sorted(rows[i] for rows, s in zip(parts, sums) for i in s.bad_rows)
        updates = [rank.step(total, norms[0]) for rank in self.ranks]
        return updates[0]

    def save(self, folder: Path, *, background: bool = False) -> None:
        self.ranks[0].save(folder, background=background)

    def saved(self, *, wait: bool) -> bool:
        return self.ranks[0].saved(wait=wait)

    def load(self, folder: Path) -> None:
        for rank in self.ranks:
            rank.load(folder)

    def export(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        self.ranks[0].export(folder, dtype)

    def stream_weights(self, *, lora: Literal["adapters", "merged"] | None = None) -> WeightStream:
        return self.ranks[0].stream_weights(lora=lora)

    def without_adapters(self) -> Scorer:
        return self.ranks[0].without_adapters()

    def stop_ids(self, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
        return self.ranks[0].stop_ids(tokenizer)

    def perturb(self, names: Collection[str] | None = None) -> None:
        for rank in self.ranks:
            rank.perturb(names)

    def to(self, where: Literal["device", "host"]) -> None:
        for rank in self.ranks:
            rank.to(where)

    def _rows(self, batch: Batch) -> list[list[int]]:
        """Which sequences each rank takes; a rank may get none."""
        return [list(range(r, len(batch), len(self.ranks))) for r in range(len(self.ranks))]

    def _all_reduce_gradients(self) -> None:
        for replicas in zip(*(rank.trained.values() for rank in self.ranks)):
            gradients = [p.grad for p in replicas if p.grad is not None]
            total = torch.stack(gradients).sum(0) if gradients else None
            for p in replicas:
                p.grad = None if total is None else total.clone()


class RealRanks:
    """A model of the tests cut over the processes of `ranks.shared_ranks`, driven like one engine.

    Args:
        case: the model, and how it is cut.
        processes: how many.
    """

    def __init__(self, case: Case, processes: int) -> None:
        self.ranks, self.key = shared_ranks(processes), (repr(case), processes)
        self.model = case.model()  # holds the gradients of the last update
        self.places = processes // case.section.get("sequence_parallel", 1)
        self.ranks.run(on_ranks.engines.make, self.key, case)

    def score(self, batch: Batch, outputs: Sequence[str], *, temperature: float = 1.0) -> dict[str, Tensor]:
        rows = self._rows(batch)
        parts = [batch.take(r) for r in rows]
        scores = self.ranks.run(on_ranks.engines.score, self.key, parts, outputs, temperature)
        peers = len(scores) // self.places
        joined = Batch.concat([part.select([]) for part in parts])
        for name in outputs:
            joined[f"{name}_T"] = torch.cat([s[name] for s in scores[::peers]])
        joined = joined.take(torch.argsort(torch.tensor([i for r in rows for i in r])))
        return {name: joined[f"{name}_T"] for name in outputs}

    def update(self, batch: Batch, loss: Loss) -> Update:
        parts = [batch.take(r) for r in self._rows(batch)]
        (update, gradients), *others = self.ranks.run(on_ranks.engines.update, self.key, parts, loss)
        assert all(other.metrics == update.metrics for other, _ in others), "ranks disagree"
        for name, parameter in self.model.named_parameters():
            parameter.grad = gradients.get(name)
        return update

    def _rows(self, batch: Batch) -> list[list[int]]:
        """Unevenly: the first place gets half of the sequences, and of more than two the last none."""
        assert self.places > 1
        half, rest = len(batch) // 2, max(1, self.places - 2)
        middle = [list(range(half + r, len(batch), rest)) for r in range(rest)]
        return [list(range(half)), *middle, []][: self.places]
