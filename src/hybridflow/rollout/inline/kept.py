"""Keys and values of turns that ended, kept for the next turn of their sequence.

The next turn's context is what its sequence had, with what was observed behind it. Only the tokens that are new go
through the model: the last sampled one, which no step has read yet, and the observation.

Shapes: C contexts of a prefill, P their kept tokens, U their new ones, T all of them, context by context; N contexts of
a bucket, Q most new tokens among them, L longest of them; H query heads, K key-value heads, D size of a query or key,
E size of a value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridflow.batch import offsets_from_lengths
from hybridflow.models.attention import similar
from hybridflow.noise import NoiseKey
from hybridflow.rollout.inline.cache import Cache
from hybridflow.rollout.job import Job

Place = tuple[NoiseKey, int]  # of a sequence, and how many tokens were sampled in it: where its next turn begins


@dataclass(frozen=True, slots=True)
class KeptTurn:
    """What a sequence left behind at the end of a turn.

    Args:
        ids: its tokens, all but the last.
        stacks: their keys and values: for the layers of each size ``[layers, K, P, D]`` and ``[layers, K, P, E]``.
        layers: of each layer, its stack and its place in that.
    """

    ids: tuple[int, ...]
    stacks: list[tuple[Tensor, Tensor]]
    layers: list[tuple[int, int]]


class KeptTurns:
    """The turns that are kept: the oldest go first where there is no room."""

    def __init__(self) -> None:
        self._turns: dict[Place, KeptTurn] = {}
        self.tokens = 0

    def put(self, job: Job, cache: Cache, row: int) -> None:
        """Keeps a row of the cache whose job has ended."""
        self._pop((job.request.noise, job.place()))
        length = job.length() - 1
        self._turns[job.request.noise, job.place()] = KeptTurn(
            job.context()[:length], cache.copy(row, length), cache.layers
        )
        self.tokens += length

    def take(self, job: Job) -> KeptTurn | None:
        """Takes out what the job's context begins with; None where nothing is kept, or it begins otherwise."""
        found = self._pop((job.request.noise, job.place()))
        return found if found is not None and job.context()[: len(found.ids)] == found.ids else None

    def shrink(self, tokens: int) -> None:
        """Drops the oldest until at most this many tokens are kept."""
        while self.tokens > max(0, tokens):
            self._pop(next(iter(self._turns)))

    def _pop(self, place: Place) -> KeptTurn | None:
        found = self._turns.pop(place, None)
        self.tokens -= len(found.ids) if found is not None else 0
        return found


class _Bucket(NamedTuple):
    """Contexts of similar lengths. Queries are padded on the left, keys on the right."""

    query_NQ: Tensor  # which new token
    real_NQ: Tensor  # whether it is one
    place_NQ: Tensor  # its place in its context
    key_NL: Tensor  # which token


class ContinuedLayout:
    """Attention of the new tokens of contexts over the kept ones before them, and over themselves (see
    `models.attention.Layout`).

    Args:
        lengths: tokens of each context ``[C]``.
        turns: what is kept of each; None: all its tokens are new.
        device: where the model runs.
        keep: collects each layer's keys and values of whole contexts, ``[T, K, D]`` and ``[T, K, E]``.
    """

    def __init__(
        self,
        lengths: Tensor,
        turns: Sequence[KeptTurn | None],
        device: torch.device,
        keep: list[tuple[Tensor, Tensor]],
    ) -> None:
        self.device, self.keep = device, keep
        self.offsets = offsets_from_lengths(lengths)
        kept_C = torch.tensor([0 if turn is None else len(turn.ids) for turn in turns])
        new_C = lengths - kept_C
        self.new_offsets = offsets_from_lengths(new_C)
        first = next(turn for turn in turns if turn is not None)
        self.layers = first.layers
        found = [turn.stacks for turn in turns if turn is not None]
        self.kept = [
            (torch.cat([s[i][0] for s in found], 2), torch.cat([s[i][1] for s in found], 2))
            for i in range(len(first.stacks))
        ]
        context_T = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        step_T = torch.arange(int(self.offsets[-1])) - self.offsets[context_T]
        kept_T = step_T < kept_C[context_T]
        # Where each token's keys are: among all kept ones, or behind them among the new ones.
        self.source_T = torch.where(kept_T, kept_T.cumsum(0) - 1, int(kept_C.sum()) + (~kept_T).cumsum(0) - 1)
        self.source_T = self.source_T.to(device)
        self.position_ids = step_T[~kept_T][None].to(device)
        self._buckets = [self._bucket(torch.tensor(rows), lengths, new_C) for rows in similar(lengths)]
        self._back_U = torch.argsort(torch.cat([b.query_NQ[b.real_NQ] for b in self._buckets]))
        self._masks: dict[tuple[int, int | None], Tensor] = {}

    def _bucket(self, rows: Tensor, lengths: Tensor, new_C: Tensor) -> _Bucket:
        length_N1, new_N1 = lengths[rows][:, None], new_C[rows][:, None]
        step_L, step_Q = torch.arange(int(length_N1.max())), torch.arange(int(new_N1.max()))
        nth_NQ = step_Q - step_Q.numel() + new_N1
        some_NQ = nth_NQ.clamp(min=0)
        bucket = _Bucket(
            self.new_offsets[rows][:, None] + some_NQ,
            nth_NQ >= 0,
            length_N1 - new_N1 + some_NQ,
            self.offsets[rows][:, None] + torch.minimum(step_L, length_N1 - 1),
        )
        return _Bucket(*(index.to(self.device) for index in bucket))

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
        """Computes the attention of one layer: see `Layout`."""
        stack, place = self.layers[layer]
        kept_k, kept_v = (kept[place].transpose(0, 1) for kept in self.kept[stack])
        k_TKD = torch.cat([kept_k, k[0].transpose(0, 1).to(kept_k.dtype)])[self.source_T]
        v_TKE = torch.cat([kept_v, v[0].transpose(0, 1).to(kept_v.dtype)])[self.source_T]
        self.keep.append((k_TKD, v_TKE))
        q_UHD = q[0].transpose(0, 1).to(k_TKD.dtype)
        parts = []
        for number, bucket in enumerate(self._buckets):
            mask = self._mask(number, window)
            q_b = q_UHD[bucket.query_NQ].transpose(1, 2)
            k_b, v_b = (x[bucket.key_NL].transpose(1, 2) for x in (k_TKD, v_TKE))
            if softcap is None:
                out_b = F.scaled_dot_product_attention(q_b, k_b, v_b, attn_mask=mask, scale=scale, enable_gqa=True)
            else:
                k_b, v_b = (x.repeat_interleave(q_b.shape[1] // x.shape[1], 1) for x in (k_b, v_b))
                score_b = softcap * torch.tanh(q_b @ k_b.mT * (scale / softcap))
                weight_b = score_b.masked_fill(~mask, -torch.inf).softmax(-1, dtype=torch.float32)
                out_b = weight_b.to(v_b.dtype) @ v_b
            parts.append(out_b.transpose(1, 2)[bucket.real_NQ])
        return torch.cat(parts)[self._back_U][None]

    def _mask(self, number: int, window: int | None) -> Tensor:
        """Returns what each query of a bucket sees, ``[N, 1, Q, L]``; made once for all layers."""
        if (number, window) not in self._masks:
            bucket = self._buckets[number]
            place_NQ, step_L = bucket.place_NQ, torch.arange(bucket.key_NL.shape[1], device=self.device)
            seen = step_L <= place_NQ[..., None]
            if window is not None:
                seen &= step_L > place_NQ[..., None] - window
            self._masks[number, window] = seen[:, None]
        return self._masks[number, window]
