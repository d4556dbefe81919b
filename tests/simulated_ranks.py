"""A training engine of several ranks in one process: the shape of the protocol, proved without processes.

Every rank has a replica of the model and an optimizer of its own, takes a part of the sequences, and sees nothing of
the others but the sum of gradients and the sum of metrics: what an all-reduce gives.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from hybridflow.batch import Batch
from hybridflow.config.sections import OptimSection
from hybridflow.engines.local import LocalEngine, learning_rate
from hybridflow.engines.microbatch import Sums, accumulate_gradient
from hybridflow.models.value import ValueHead
from hybridflow.protocols import Loss, TrainEngine, Update, WeightStream


class SimulatedRanks:
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
            sums.append(
                accumulate_gradient(
                    rank.model,
                    batch.take(rows),
                    loss,
                    tokens_per_microbatch=self.tokens_per_microbatch,
                    autocast=nullcontext,
                    value_head=rank.value_head,
                )
            )
        self._all_reduce_gradients()
        norms = [
            float(torch.nn.utils.clip_grad_norm_(r.trained.values(), self.optim.clip_grad_norm)) for r in self.ranks
        ]
        assert not math.isfinite(norms[0]) or len(set(norms)) == 1, "replicas have drifted apart"
        lr = learning_rate(self.optim, self.ranks[0].steps_done, self.total_steps)
        total, bad_rows = _joined(sums), sorted(rows[i] for rows, s in zip(parts, sums) for i in s.bad_rows)
        own = {"loss": total.loss, "grad_norm": norms[0], "lr": lr}
        metrics = total.metrics() | {f"{self.ranks[0].name}/{key}": value for key, value in own.items()}
        if not (math.isfinite(total.loss) and math.isfinite(norms[0])):
            return Update(metrics, applied=False, bad_rows=bad_rows)
        for rank in self.ranks:
            for group in rank.optimizer.param_groups:
                group["lr"] = lr
            rank.optimizer.step()
            rank.steps_done += 1
        return Update(metrics)

    def state(self) -> dict[str, Any]:
        return self.ranks[0].state()

    def load(self, state: Mapping[str, Any]) -> None:
        for rank in self.ranks:
            rank.load(state)

    def stream_weights(self) -> WeightStream:
        return self.ranks[0].stream_weights()

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


def _joined(parts: Sequence[Sums]) -> Sums:
    total = Sums()
    for part in parts:
        total.loss += part.loss
        total.tokens += part.tokens
        for name, value in part.sums.items():
            total.sums[name] += value
        for name, value in part.means.items():
            total.means[name] += value
        for name, value in part.maxima.items():
            total.maxima[name] = max(total.maxima.get(name, -math.inf), value)
    return total


def as_train_engine(engine: SimulatedRanks) -> TrainEngine:
    """Type checkers hold the class to the protocol here."""
    return engine
