"""The gradient of one mini-batch, cut into micro-batches: what every local or sharded engine does on its own model.

Nothing here divides by a number of micro-batches or ranks: weights were computed for the whole mini-batch, so sums are
right whatever the cut.
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

from hybridflow.algorithms.losses import LOSSES, Terms, columns_of
from hybridflow.batch import Batch, balanced_parts
from hybridflow.errors import UserError
from hybridflow.models.forward import beginnings, hidden_states, packs, score_tokens
from hybridflow.models.value import ValueHead
from hybridflow.protocols import Loss

MODEL_COLUMNS = ("input_ids_T", "loss_mask_T", "group_B", "support_size_T", "support_ids_K")  # what scores depend on


@dataclass(slots=True)
class Sums:
    """Sums over a mini-batch, or over a rank's part of it."""

    loss: float = 0.0
    tokens: int = 0
    sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    means: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    maxima: dict[str, float] = field(default_factory=dict)
    bad_rows: list[int] = field(default_factory=list)

    def metrics(self) -> dict[str, float]:
        """Sums and maxima as they are, means over the scored tokens."""
        means = {name: value / max(self.tokens, 1) for name, value in self.means.items()}
        return dict(self.sums) | means | self.maxima


def accumulate_gradient(
    model: PreTrainedModel,
    batch: Batch,
    loss: Loss,
    *,
    tokens_per_microbatch: int,
    autocast: Callable[[], AbstractContextManager[None]],
    value_head: ValueHead | None = None,
) -> Sums:
    """Adds the gradient of the mini-batch's loss to the model's gradients.

    Args:
        model: the model; its gradients must be zero or hold other parts of the same mini-batch.
        batch: sequences with their weight columns.
        loss: which loss, with its parameters.
        tokens_per_microbatch: most tokens in one forward pass.
        autocast: opens the precision that the forward pass runs in.
        value_head: reads values, for the losses that learn them.
    """
    total = Sums()
    batch = _sharing(model, batch)
    for rows in microbatches(batch, tokens_per_microbatch):
        part = batch.take(rows)
        with telling_memory(part, tokens_per_microbatch):
            with autocast():
                index_M, scores = _scores(
                    model,
                    part,
                    value_head,
                    _outputs(loss),
                    temperature=loss.params.get("temperature", 1.0),
                    entropy_gradient=bool(loss.params.get("entropy_coef")),
                )
            columns = {n: part[n][index_M].to(model.device) for n in columns_of(loss) if n in part}
            columns["sequence_T"] = part.sequence_of()[index_M].to(model.device)
            terms = LOSSES[loss.name](scores, columns, loss.params)
            terms.loss_M.sum().backward()
        _add(total, terms)
        total.bad_rows += _bad_rows(terms.loss_M.detach(), index_M, part, rows)
    total.bad_rows.sort()
    return total


def score_microbatches(
    model: PreTrainedModel,
    batch: Batch,
    outputs: Sequence[str],
    *,
    temperature: float,
    tokens_per_microbatch: int,
    autocast: Callable[[], AbstractContextManager[None]],
    value_head: ValueHead | None = None,
) -> dict[str, Tensor]:
    """Per-token columns of a batch without gradients: see `TrainEngine.score`."""
    dtype = torch.promote_types(torch.float32, model.dtype)
    result = {name: torch.zeros(batch.total(), dtype=dtype) for name in outputs}
    positions = torch.arange(batch.total())
    batch = batch.select([n for n in MODEL_COLUMNS if n in batch])
    batch["position_T"] = positions
    batch = _sharing(model, batch)
    for rows in microbatches(batch, tokens_per_microbatch):
        part = batch.take(rows)
        with telling_memory(part, tokens_per_microbatch), torch.no_grad(), autocast():
            index_M, scores = _scores(model, part, value_head, outputs, temperature=temperature)
        where = part["position_T"][index_M]
        for name in outputs:
            result[name][where] = scores[name].to("cpu", dtype)
    return result


def microbatches(batch: Batch, budget: int) -> list[list[int]]:
    """Rows of each micro-batch: at most `budget` tokens go through the model at once.

    Sequences of one group stay together where they fit, because their prompt then goes through the model once.

    Raises:
        ValueError: one sequence alone is over the budget.
    """
    lengths = batch.lengths().tolist()
    if "group_B" not in batch:
        return balanced_parts(lengths, budget)
    prompts = beginnings(batch).tolist()
    units: dict[tuple[int, int], list[int]] = {}
    for row, group in enumerate(batch["group_B"].tolist()):
        units.setdefault((group, prompts[row]), []).append(row)
    rows: list[list[int]] = []
    costs: list[int] = []
    for (_, prompt), members in units.items():
        cost = prompt + sum(lengths[r] - prompt for r in members)
        together = cost <= budget
        rows += [members] if together else [[r] for r in members]
        costs += [cost] if together else [lengths[r] for r in members]
    return [sorted(r for unit in part for r in rows[unit]) for part in balanced_parts(costs, budget)]


@contextmanager
def telling_memory(part: Batch, budget: int) -> Iterator[None]:
    """Says how large a micro-batch was that did not fit into a GPU's memory.

    Raises:
        UserError: instead of torch's OutOfMemoryError.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        lengths = part.lengths()
        raise UserError(
            f"a forward pass of {part.total()} tokens ({len(part)} sequences, the longest of {int(lengths.max())}) "
            "does not fit into the GPU's memory",
            why=str(error).partition(". ")[0],
            fix=f"lower train.tokens_per_microbatch (it is {budget}) down to the longest sequence, set "
            "model.activation_checkpointing=true, or train adapters (model.lora)",
        ) from error


def autocast_on(device: torch.device) -> Callable[[], AbstractContextManager[None]]:
    """The precision of a forward pass: bfloat16 where a GPU computes it, else that of the weights."""
    if device.type != "cuda":
        return nullcontext
    return lambda: torch.autocast("cuda", dtype=torch.bfloat16)


def _sharing(model: PreTrainedModel, batch: Batch) -> Batch:
    """The batch, without its groups where the model pads: padded sequences share no prompts."""
    return batch if packs(model) else batch.select([name for name in batch if name != "group_B"])


def _outputs(loss: Loss) -> tuple[str, ...]:
    """The scores that a loss reads."""
    if loss.name == "value":
        return ("value",)
    if loss.name != "policy":
        return ("logp",)
    return ("logp", "entropy", "value") if loss.params.get("value_coef") else ("logp", "entropy")


def _scores(
    model: PreTrainedModel,
    part: Batch,
    value_head: ValueHead | None,
    outputs: Sequence[str],
    *,
    temperature: float,
    entropy_gradient: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The scores asked for, by name, from one forward pass; values alone do without logits."""
    assert value_head is not None or "value" not in outputs, "values need a value head"
    if value_head is not None and tuple(outputs) == ("value",):
        hidden_MD, index_M = hidden_states(model, part)
        return index_M, {"value": value_head(hidden_MD)}
    entropy: Literal["with gradient", "detached"] = "with gradient" if entropy_gradient else "detached"
    scores = score_tokens(
        model,
        part,
        temperature=temperature,
        entropy=entropy if "entropy" in outputs else "no",
        value_head=value_head if "value" in outputs else None,
        sum_pi_squared="sum_pi_squared" in outputs,
    )
    return scores.index_M, scores.named()


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


def _bad_rows(loss_M: Tensor, index_M: Tensor, part: Batch, rows: list[int]) -> list[int]:
    finite_M = torch.isfinite(loss_M).cpu()
    if bool(finite_M.all()):
        return []
    return sorted({rows[i] for i in part.sequence_of()[index_M[~finite_M]].tolist()})
