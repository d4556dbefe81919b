"""Sequence parallelism on packed sequences: several ranks share the tokens of one forward pass (DeepSpeed-Ulysses).

Every rank runs a slice of the packed tokens through the model. Attention needs all tokens of a sequence, but every head
by itself: so each layer exchanges tokens for heads, each rank computes its heads for all tokens, and the exchange is
undone. What a rank keeps for the backward pass is its share of the tokens, and its share of the heads.

DeepSpeed Ulysses: System Optimizations for Enabling Training of Extreme Long Sequence Transformer Models,
arXiv 2309.14509.

Shapes: P ranks, U tokens that go through the model, u of them on this rank, M scored tokens, m of them on this rank,
H query heads, h of them on this rank, K key-value heads, D key size, E value size, W numbers that a token sends to one
rank.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hybridflow.errors import UserError
from hybridflow.models.attention import PackedLayout


@dataclass(frozen=True, slots=True)
class SequenceParallel:
    """The ranks that share the tokens of a forward pass; all of them call with the same sequences.

    Args:
        group: their process group.
        rank: of this process in the group.
        size: P, how many there are.
    """

    group: dist.ProcessGroup
    rank: int
    size: int

    def sizes(self, tokens: int) -> list[int]:
        """Returns how many of this many tokens each rank has: equal but for one."""
        return [tokens // self.size + (rank < tokens % self.size) for rank in range(self.size)]

    def bounds(self, tokens: int) -> tuple[int, int]:
        """Returns the first of this rank's tokens, and the first after them."""
        starts = list(itertools.accumulate(self.sizes(tokens), initial=0))
        return starts[self.rank], starts[self.rank + 1]

    def whole(self, score_m: Tensor, own_m: Tensor, count: int) -> Tensor:
        """Gathers the ``[M]`` scores of all ranks' tokens from those of this rank's.

        The backward pass takes this rank's slice of the gradient: every rank computes the same loss from all scores, so
        each has the whole gradient already, and no rank's may be counted twice.

        Args:
            score_m: scores of this rank's tokens.
            own_m: where they stand among the M.
            count: M.
        """
        whole_M: Tensor = _Whole.apply(score_m, own_m, count, self.group)  # type: ignore[no-untyped-call]
        return whole_M


class SlicedLayout:
    """A layout of all tokens, for a rank that runs a slice of them through the model; see `attention.Layout`.

    Args:
        layout: of all U tokens; every rank has the same.
        sp: the ranks.
    """

    def __init__(self, layout: PackedLayout, sp: SequenceParallel) -> None:
        self.layout, self.sp = layout, sp
        tokens = layout.position_ids.shape[1]
        self.sizes = sp.sizes(tokens)
        self.position_ids = layout.position_ids[:, slice(*sp.bounds(tokens))]

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """Computes one layer, for this rank's tokens: q ``[1, H, u, D]``, k ``[1, K, u, D]``, v ``[1, K, u, E]``."""
        ranks, own = self.sp.size, q.shape[2]
        check_degree(q.shape[1], ranks)
        # Where the key-value heads do not divide among the ranks, a rank gets copies of those that its queries read.
        copies = math.lcm(k.shape[1], ranks) // k.shape[1]
        k, v = (x.repeat_interleave(copies, dim=1) for x in (k, v))
        if torch.is_autocast_enabled(q.device.type):  # attention casts to this anyway: half the traffic
            q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
        sent_uPW = torch.cat([x[0].transpose(0, 1).unflatten(1, (ranks, -1)).flatten(2) for x in (q, k, v)], dim=2)
        got_UW = self._exchange(sent_uPW.transpose(0, 1).flatten(0, 1), [own] * ranks, self.sizes)
        widths = [x.shape[1] // ranks * x.shape[3] for x in (q, k, v)]
        q, k, v = (
            part.unflatten(1, (-1, x.shape[3])).transpose(0, 1)[None]
            for part, x in zip(got_UW.split(widths, dim=1), (q, k, v), strict=True)
        )
        out_UhE = self.layout.attend(layer, q, k, v, scale=scale, window=window, softcap=softcap)[0]
        back = self._exchange(out_UhE.flatten(1), self.sizes, [own] * ranks)
        return back.view(ranks, own, *out_UhE.shape[1:]).transpose(0, 1).flatten(1, 2)[None]

    def _exchange(self, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        exchanged: Tensor = _Exchange.apply(rows, send, receive, self.sp.group)  # type: ignore[no-untyped-call]
        return exchanged


def check_degree(heads: int, degree: int) -> None:
    """Checks that every rank computes as many query heads as the others.

    Raises:
        UserError: the degree does not divide the heads.
    """
    if heads % degree:
        fitting = [str(d) for d in range(1, heads + 1) if heads % d == 0]
        raise UserError(
            f"engine.sequence_parallel is {degree}, but the model has {heads} query heads",
            why="each process computes its share of the heads, and a head is not cut",
            fix=f"set it to one of {', '.join(fitting)}",
        )


class _Exchange(torch.autograd.Function):
    """Rows to the ranks and from them: ``send[r]`` rows go to rank r, ``receive[r]`` come from it, in order of rank."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return _exchanged(rows, send, receive, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None, None]:
        return _exchanged(gradients[0], ctx.receive, ctx.send, ctx.group), None, None, None


def _exchanged(rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    out = rows.new_empty(sum(receive), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), receive, send, group=group)
    return out


class _Whole(torch.autograd.Function):
    """Gathers scores of all ranks' tokens; backward takes this rank's slice of the gradient."""

    @staticmethod
    def forward(ctx: Any, score_m: Tensor, own_m: Tensor, count: int, group: dist.ProcessGroup) -> Tensor:
        ctx.save_for_backward(own_m)
        whole_M = score_m.new_zeros(count)
        whole_M[own_m] = score_m
        dist.all_reduce(whole_M, group=group)
        return whole_M

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None, None]:
        (own_m,) = ctx.saved_tensors
        return gradients[0][own_m], None, None, None
