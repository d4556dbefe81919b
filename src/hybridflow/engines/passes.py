"""The gradient of one mini-batch, cut into micro-batches: how every local or sharded engine uses its own model.

Nothing here divides by a number of micro-batches or ranks: weights were computed for the whole mini-batch, so sums are
right whatever the cut.

Shapes: B sequences, T tokens of all sequences, K words that these were drawn from, M scored tokens of a micro-batch.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from hybridflow.algorithms.losses import Terms, loss_spec
from hybridflow.algorithms.mismatch import gap_metrics
from hybridflow.balance import balanced_parts, beginning_costs, sequence_costs
from hybridflow.batch import Batch
from hybridflow.errors import UserError
from hybridflow.models.attention import similar
from hybridflow.models.forward import beginnings, packs
from hybridflow.protocols.training import Loss

Dtype = Literal["auto", "float32", "bfloat16"]  # see ``engine.dtype``
MODEL_COLUMNS = ("input_ids_T", "loss_mask_T", "group_B", "support_size_T", "support_ids_K")  # what scores depend on


@dataclass(slots=True)
class Sums:
    """Sums over a mini-batch, or over a rank's part of it."""

    loss: float = 0.0
    tokens: int = 0
    sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    means: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    maxima: dict[str, float] = field(default_factory=dict)
    gap: Tensor | None = None
    bad_rows: list[int] = field(default_factory=list)

    def metrics(self) -> dict[str, float]:
        """Returns sums and maxima as they are, means over the scored tokens, and the metrics of the gap between
        engines.
        """
        means = {name: value / max(self.tokens, 1) for name, value in self.means.items()}
        gap = {} if self.gap is None else gap_metrics(self.gap)
        return dict(self.sums) | means | self.maxima | gap


def joined(parts: Sequence[Sums]) -> Sums:
    """Adds up the sums of all ranks; rows that are not finite stay with their rank."""
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
        total.gap = _added(total.gap, part.gap)
    return total


@dataclass(frozen=True, slots=True)
class Passes:
    """The passes of a batch through an engine's model, some tokens at a time.

    Args:
        root: a `TokenScorer`, or what it became when it was sharded: called for every forward pass.
        model: the model in it.
        tokens_per_microbatch: most tokens in one forward pass.
        device: where scores are computed.
        within: opened around every forward pass: its precision, where its activations are kept.
        agree: from the passes that this rank needs to those that all ranks make together. A rank that needs fewer adds
            some without sequences: weights are gathered, and gradients summed, by all ranks at once.
        alike: whether all passes run every layer once, as ranks that gather its weights together must: a padded model,
            which runs a layer for each length in a pass, gets passes of one length.
        no_sync: opened around every forward and backward pass but the last: gradients are summed between ranks once.
    """

    root: torch.nn.Module
    model: PreTrainedModel
    tokens_per_microbatch: int
    device: torch.device
    within: Callable[[], AbstractContextManager[None]] = nullcontext
    agree: Callable[[int], int] = int
    alike: bool = False
    no_sync: Callable[[], AbstractContextManager[None]] = nullcontext

    def accumulate(self, batch: Batch, loss: Loss) -> Sums:
        """Adds the gradient of a batch's loss to the model's gradients.

        Args:
            batch: sequences with their weight columns: a mini-batch, or this rank's part of one.
            loss: which loss, with its parameters.
        """
        total = Sums()
        batch = self._sharing(batch)
        passes = self._agreed(batch)
        for number, rows in enumerate(passes):
            with nullcontext() if number == len(passes) - 1 else self.no_sync():
                self._learn(batch.take(rows), loss, rows, total)
        total.bad_rows.sort()
        return total

    def score(self, batch: Batch, outputs: Sequence[str], temperature: float) -> dict[str, Tensor]:
        """Computes per-token columns of a batch without gradients: see `Scorer.score`."""
        dtype = torch.promote_types(torch.float32, self.model.dtype)
        result = {name: torch.zeros(batch.total(), dtype=dtype) for name in outputs}
        positions = torch.arange(batch.total())
        batch = batch.select([n for n in MODEL_COLUMNS if n in batch])
        batch["position_T"] = positions
        batch = self._sharing(batch)
        for rows in self._agreed(batch):
            part = batch.take(rows)
            with telling_memory(part, self.tokens_per_microbatch), torch.no_grad(), self.within():
                index_M, scores = self.root(part, outputs, temperature)
            where = part["position_T"][index_M]
            for name in outputs:
                result[name][where] = scores[name].to("cpu", dtype)
        return result

    def _learn(self, part: Batch, loss: Loss, rows: list[int], total: Sums) -> None:
        spec, temperature = loss_spec(loss.name), loss.params.get("temperature", 1.0)
        reads = spec.reads(loss.params)
        with telling_memory(part, self.tokens_per_microbatch):
            with self.within():
                index_M, scores = self.root(part, reads.outputs, temperature, reads.entropy_gradient)
            columns = {n: part[n][index_M].to(self.device) for n in reads.columns if n in part}
            columns["sequence_T"] = part.sequence_of()[index_M].to(self.device)
            terms = spec.function(scores, columns, loss.params)
            terms.loss_M.sum().backward()
        _add(total, terms)
        total.bad_rows += _bad_rows(terms.loss_M.detach(), index_M, part, rows)

    def _agreed(self, batch: Batch) -> list[list[int]]:
        """Returns the rows of every pass, as many passes on every rank: one that needs fewer makes smaller ones."""
        passes = microbatches(batch, self.tokens_per_microbatch)
        if self.alike and not packs(self.model):
            lengths = batch.lengths()
            passes = [[rows[i] for i in bucket] for rows in passes for bucket in similar(lengths[rows])]
            return passes + [[]] * (self.agree(len(passes)) - len(passes))
        return microbatches(batch, self.tokens_per_microbatch, at_least=self.agree(len(passes)))

    def _sharing(self, batch: Batch) -> Batch:
        """Returns the batch, without its groups where the model pads: padded sequences share no prompts."""
        return batch if packs(self.model) else batch.select([name for name in batch if name != "group_B"])


def microbatches(batch: Batch, budget: int, at_least: int = 0) -> list[list[int]]:
    """Cuts rows into micro-batches: at most `budget` tokens go through the model at once, and all cost about the same.

    Sequences that begin alike stay together where they fit, because their beginning then goes through the model once:
    see `beginnings`. With `at_least`, some parts can be empty: see `balanced_parts`.

    Raises:
        ValueError: one sequence alone is over the budget.
    """
    lengths = batch.lengths().tolist()
    costs = sequence_costs(lengths)
    if "group_B" not in batch:
        return balanced_parts(lengths, budget, costs=costs, at_least=at_least)
    prompts, kinds = (column_B.tolist() for column_B in beginnings(batch))
    units: dict[int, list[int]] = {}
    for row, kind in enumerate(kinds):
        units.setdefault(kind, []).append(row)
    rows: list[list[int]] = []
    sizes: list[int] = []
    works: list[int] = []
    for members in units.values():
        prompt, again = prompts[members[0]], len(members) - 1  # it goes through the model this many times fewer
        size = sum(lengths[r] for r in members) - again * prompt
        together = size <= budget
        rows += [members] if together else [[r] for r in members]
        sizes += [size] if together else [lengths[r] for r in members]
        own = [costs[r] for r in members]
        works += [sum(own) - again * beginning_costs([prompt])[0]] if together else own
    parts = balanced_parts(sizes, budget, costs=works, at_least=at_least)
    return [sorted(r for unit in part for r in rows[unit]) for part in parts]


@contextmanager
def telling_memory(part: Batch, budget: int) -> Iterator[None]:
    """Reports how large a micro-batch was that did not fit into a GPU's memory.

    Raises:
        UserError: instead of torch's OutOfMemoryError.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        longest = max(part.lengths().tolist(), default=0)
        raise UserError(
            f"a forward pass of {part.total()} tokens ({len(part)} sequences, the longest of {longest}) "
            "does not fit into the GPU's memory",
            why=str(error).partition(". ")[0],
            fix=f"lower train.tokens_per_microbatch (it is {budget}) down to the longest sequence, set "
            "model.activation_checkpointing=true, or train adapters (model.lora)",
        ) from error


def autocast_on(device: torch.device, dtype: Dtype = "auto") -> Callable[[], AbstractContextManager[None]]:
    """Returns the precision of a forward pass: bfloat16 where that is asked for, else that of the weights.

    Args:
        device: where it is computed.
        dtype: auto is bfloat16 on a GPU.
    """
    if dtype == "float32" or (dtype == "auto" and device.type != "cuda"):
        return nullcontext
    return lambda: torch.autocast(device.type, dtype=torch.bfloat16)


def _add(total: Sums, terms: Terms) -> None:
    total.loss += float(terms.loss_M.detach().sum())
    total.tokens += len(terms.loss_M)
    for name, value in terms.sums.items():
        total.sums[name] += float(value.sum())
    for name, value in terms.means.items():
        total.means[name] += float(value.sum())
    for name, value in terms.maxima.items():
        if len(value):  # a micro-batch may hold no scored token
            total.maxima[name] = max(total.maxima.get(name, -math.inf), float(value.max()))
    total.gap = _added(total.gap, terms.gap)


def _added(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return other if one is None else one if other is None else one + other


def _bad_rows(loss_M: Tensor, index_M: Tensor, part: Batch, rows: list[int]) -> list[int]:
    finite_M = torch.isfinite(loss_M).cpu()
    if bool(finite_M.all()):
        return []
    return sorted({rows[i] for i in part.sequence_of()[index_M[~finite_M]].tolist()})
