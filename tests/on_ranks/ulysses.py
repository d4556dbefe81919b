"""Ranks that share the tokens of a forward pass, held to one process that runs all of them; for `test_ulysses.py`."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from hybridflow.algorithms.losses import LOSSES
from hybridflow.batch import Batch
from hybridflow.models.checkpointing import checkpoint_activations
from hybridflow.models.forward import score_tokens, score_values
from hybridflow.models.ulysses import SequenceParallel
from hybridflow.models.value import ValueHead, value_head
from hybridflow.protocols.training import Loss

from tiny import group_batch, packed_model, ragged_batch, with_policy_columns


def policy_loss(name: str) -> Loss:
    """A loss with an entropy bonus and a shared trunk's value loss, so that every score has a gradient."""
    values = {"clip_low": 0.2, "clip_high": 0.28, "clip_dual": 3.0}
    params = {"policy_loss": name, "values": values, "entropy_coef": 0.01, "value_coef": 0.5, "clip_value": 0.2}
    return Loss("policy", {**params, "temperature": 0.8})


def batch_of(lengths: Sequence[int], groups: bool) -> Batch:
    """Sequences of these lengths, or groups of answers to prompts of these lengths, with what a loss reads."""
    batch = group_batch(lengths) if groups else ragged_batch(lengths)
    rng = torch.Generator().manual_seed(5)
    batch = with_policy_columns(batch, torch.full((batch.total(),), -3.6, dtype=torch.float64), "seq-mean-token-mean")
    for name in ("value_T", "return_T"):
        batch[name] = torch.randn(batch.total(), generator=rng, dtype=torch.float64)
    batch["value_weight_T"] = batch["policy_weight_T"]
    return batch


def scores_and_gradients(
    model: PreTrainedModel, head: ValueHead, batch: Batch, loss: Loss, sp: SequenceParallel | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What one process has: the scores, the loss of each token, and its own gradient of every parameter."""
    model.zero_grad()
    head.zero_grad()
    scores = score_tokens(model, batch, temperature=0.8, entropy="with gradient", value_head=head, sp=sp)
    spec = LOSSES[loss.name]
    columns = {n: batch[n][scores.index_M] for n in spec.reads(loss.params).columns if n in batch}
    columns["sequence_T"] = batch.sequence_of()[scores.index_M]
    loss_M = spec.function(scores.named(), columns, loss.params).loss_M
    loss_M.sum().backward()
    found = {"loss": loss_M, "index": scores.index_M, **scores.named()}
    parameters = [*model.named_parameters(), *head.named_parameters()]
    return {n: t.detach() for n, t in found.items()}, {n: _gradient(p) for n, p in parameters}


def sequence_parallel() -> SequenceParallel:
    """All ranks of the default group."""
    assert dist.group.WORLD is not None
    return SequenceParallel(dist.group.WORLD, dist.get_rank(), dist.get_world_size())


def compare(
    kind: str,
    dtype: torch.dtype = torch.float64,
    lengths: Sequence[int] = (7, 3, 12, 5, 9, 4),
    *,
    groups: bool = False,
    checkpointing: bool = False,
    autocast: bool = False,
    policy: str = "ppo_clip",
) -> dict[str, float]:
    """Largest differences from one process: of each score, and of the gradient summed over the ranks."""
    model, batch, sp = packed_model(kind, dtype=dtype), batch_of(lengths, groups), sequence_parallel()
    head = value_head(model).to(dtype)
    torch.nn.init.constant_(head.weight, 0.1)
    if checkpointing:
        checkpoint_activations(model.train())
    with torch.autocast("cpu", dtype=torch.bfloat16) if autocast else nullcontext():
        expected, gradients = scores_and_gradients(model, head, batch, policy_loss(policy), None)
        found, parts = scores_and_gradients(model, head, batch, policy_loss(policy), sp)
    for part in parts.values():
        dist.all_reduce(part)
    return {n: _distance(found[n], expected[n]) for n in expected} | {
        "gradients": max(_distance(parts[n], gradients[n]) for n in gradients),
        "largest gradient": max(float(g.abs().max()) for g in gradients.values()),
    }


def rounding(kind: str, lengths: Sequence[int] = (7, 3, 12, 5, 9, 4)) -> dict[str, float]:
    """How far one process in float32 is from the same in float64: what rounding does to each score here."""
    sides = []
    for dtype in (torch.float32, torch.float64):
        model, batch = packed_model(kind, dtype=dtype), batch_of(lengths, groups=False)
        head = value_head(model).to(dtype)
        torch.nn.init.constant_(head.weight, 0.1)
        found, gradients = scores_and_gradients(model, head, batch, policy_loss("ppo_clip"), None)
        sides.append((found, gradients))
    (found, gradients), (exact, exact_gradients) = sides
    return {n: _distance(found[n], exact[n]) for n in exact} | {
        "gradients": max(_distance(gradients[n], exact_gradients[n]) for n in gradients)
    }


def compare_without_gradients(kind: str, lengths: Sequence[int]) -> dict[str, float]:
    """The same for sums of squared probabilities, with a support for some tokens, and for values without logits."""
    model, batch, sp = packed_model(kind, dtype=torch.float64), ragged_batch(lengths), sequence_parallel()
    head = value_head(model).double()
    torch.nn.init.constant_(head.weight, 0.1)
    size_T = torch.arange(batch.total()) % 3
    words = [[int(w), (int(w) + 5) % 37][: int(n)] for w, n in zip(batch["input_ids_T"], size_T, strict=True)]
    ends = batch.offsets["T"].tolist()
    rows: Mapping[str, Any] = {
        **{name: batch.rows(name) for name in batch},
        "support_size_T": list(size_T.split(batch.lengths().tolist())),
        "support_ids_K": [[word for own in words[a:b] for word in own] for a, b in itertools.pairwise(ends)],
    }
    batch = Batch.from_rows(rows)
    sides = []
    with torch.no_grad():
        for ranks in (None, sp):
            scores = score_tokens(model, batch, temperature=1.0, entropy="detached", sum_pi_squared=True, sp=ranks)
            index_M, value_M = score_values(model, batch, head, sp=ranks)
            sides.append({"value index": index_M, "value": value_M, "index": scores.index_M, **scores.named()})
    return {name: _distance(sides[1][name], sides[0][name]) for name in sides[0]}


def slices(lengths: Sequence[int]) -> int:
    """How many tokens this rank runs through the model's layers."""
    model, seen = packed_model(), []
    model.model.layers[0].register_forward_hook(lambda module, args, out: seen.append(args[0].shape[1]))
    score_tokens(model, ragged_batch(lengths), temperature=1.0, entropy="no", sp=sequence_parallel())
    return seen[0]


def empty_part() -> float:
    """The largest gradient from a batch without sequences: the pass runs, so that other ranks' collectives find it."""
    model = packed_model()
    batch = ragged_batch().take([])
    scores = score_tokens(model, batch, temperature=1.0, entropy="no", sp=sequence_parallel())
    assert scores.logp_M.shape == (0,)
    scores.logp_M.sum().backward()
    return max(float(_gradient(p).abs().max()) for p in model.parameters())


def refused_padded() -> str:
    """What a model that does not pack says."""
    model = packed_model()
    model.set_attn_implementation("eager")
    try:
        score_tokens(model, ragged_batch(), temperature=1.0, entropy="no", sp=sequence_parallel())
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def _gradient(parameter: torch.nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max()) if a.shape == b.shape else float("inf")
