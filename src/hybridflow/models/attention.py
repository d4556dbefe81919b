"""Attention over ragged tokens, inside the Hugging Face model's own forward.

The model runs with ``attn_implementation="hybridflow"`` on one row of T tokens without padding, and is given a *layout*
as a keyword argument: the layout knows which tokens belong together and computes every layer's attention. There is no
mask and no padding in the model, so nothing depends on the way sequences are packed.

Trap that this avoids: with an attention mask of ones beside packed position ids, transformers attends across sequences.

Sequences that begin alike, the answers to one prompt, can share that beginning: its tokens then go through the model
once, and every answer's attention reads them.

Shapes: T tokens of all sequences, U of them that go through the model (all, where nothing is shared), N sequences of a
bucket, L longest of a bucket, H query heads, K key-value heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn  # flash attention on packed sequences; has no CPU kernel

from hybridflow.batch import offsets_from_lengths

ATTENTION = "hybridflow"


class Layout(Protocol):
    """Computes one layer's attention for the tokens of a forward pass."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q ``[rows, H, tokens, D]``, k and v ``[rows, K, tokens, D]`` to ``[rows, tokens, H, D]``."""
        ...


def attention(
    module: torch.nn.Module, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """The function registered with transformers: hands over to the layout of this forward pass."""
    layout: Layout | None = kwargs.get("layout")
    assert layout is not None, "a model with this attention is called with layout=..."
    assert attention_mask is None, "layouts replace masks"
    scale = kwargs.get("scaling")
    out = layout.attend(int(module.layer_idx), q, k, v, scale if scale is not None else q.shape[-1] ** -0.5)  # type: ignore[arg-type]
    return out, None


class PackedLayout:
    """Whole sequences side by side in one row of tokens; each attends causally to itself.

    On a GPU a varlen kernel does this as it is. Elsewhere sequences of similar length are gathered into buckets, and
    each bucket is one SDPA call: padded on the right inside the call only, which a causal mask makes harmless.

    Args:
        lengths: tokens of each sequence, in order; they add up to T.
        device: where the model runs.
        shared: what `shared_beginnings` found; None where every token goes through the model.
        keep: collects each layer's (k, v), ``[U, K, D]``, for a prefill; None when training.
    """

    def __init__(
        self,
        lengths: Tensor,
        device: torch.device | str = "cpu",
        *,
        shared: Shared | None = None,
        keep: list[tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        self.keep, self.shared = keep, shared
        self.lengths, self.offsets, self.device = lengths, offsets_from_lengths(lengths), torch.device(device)
        self.longest = int(lengths.max())
        positions_T = torch.arange(int(self.offsets[-1])) - torch.repeat_interleave(self.offsets[:-1], lengths)
        self.position_ids = (positions_T if shared is None else positions_T[shared.token_U])[None].to(device)

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """Offsets as the varlen kernel takes them."""
        return self.offsets.to(device=self.device, dtype=torch.int32)

    @cached_property
    def buckets(self) -> tuple[list[Tensor], Tensor]:
        """Indices into and out of the buckets, on the model's device."""
        gather, scatter = _bucket_indices(self.lengths, self.offsets)
        if self.shared is not None:
            gather = [self.shared.place_T[index] for index in gather]
            scatter = scatter[self.shared.token_U]
        return [index.to(self.device) for index in gather], scatter.to(self.device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """One layer: see `Layout`."""
        q_THD, k_TKD, v_TKD = (x[0].transpose(0, 1) for x in (q, k, v))
        if self.keep is not None:
            self.keep.append((k_TKD, v_TKD))
        grouped = q.shape[1] != k.shape[1]
        if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
            cu, longest = self.cu_seqlens, self.longest
            if self.shared is not None:
                place_T = self.shared.place_T.to(q.device)
                q_THD, k_TKD, v_TKD = q_THD[place_T], k_TKD[place_T], v_TKD[place_T]
            out = varlen_attn(
                q_THD, k_TKD, v_TKD, cu, cu, longest, longest, scale=scale, window_size=(-1, 0), enable_gqa=grouped
            )
            assert isinstance(out, Tensor)
            return (out if self.shared is None else out[self.shared.token_U.to(q.device)])[None]
        gather, scatter_T = self.buckets
        parts = []
        for index_NL in gather:
            q_b, k_b, v_b = (x[index_NL].transpose(1, 2) for x in (q_THD, k_TKD, v_TKD))
            out_b = F.scaled_dot_product_attention(q_b, k_b, v_b, is_causal=True, scale=scale, enable_gqa=grouped)
            parts.append(out_b.transpose(1, 2).flatten(0, 1))
        return torch.cat(parts)[scatter_T][None]


@dataclass(frozen=True, slots=True)
class Shared:
    """Which tokens of a packed batch go through the model, and where each of the others is found.

    Args:
        token_U: on the T axis, the tokens that go through, ascending.
        place_T: for each of the T tokens, the one of the U that stands for it.
    """

    token_U: Tensor
    place_T: Tensor


def shared_beginnings(ids_T: Tensor, offsets: Tensor, group_B: Tensor, beginning_B: Tensor) -> Shared:
    """Lets sequences of one group share their first tokens.

    Args:
        ids_T: token ids.
        offsets: ``[B + 1]`` offsets of the sequences.
        group_B: sequences with the same number begin alike, as far as their beginnings are equally long.
        beginning_B: how many tokens of each are its beginning.
    """
    _, kind_B = torch.unique(torch.stack([group_B, beginning_B]), dim=1, return_inverse=True)
    first_B = torch.full_like(kind_B, len(kind_B)).scatter_reduce(0, kind_B, torch.arange(len(kind_B)), "amin")[kind_B]
    lengths = offsets.diff()
    sequence_T = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    step_T = torch.arange(len(ids_T)) - offsets[sequence_T]
    source_T = torch.arange(len(ids_T))
    source_T = torch.where(step_T < beginning_B[sequence_T], offsets[first_B[sequence_T]] + step_T, source_T)
    assert torch.equal(ids_T[source_T], ids_T), "sequences of one group begin with different tokens"
    through_T = source_T == torch.arange(len(ids_T))
    return Shared(through_T.nonzero()[:, 0], (through_T.cumsum(0) - 1)[source_T])


def _bucket_indices(lengths: Tensor, offsets: Tensor) -> tuple[list[Tensor], Tensor]:
    """How to gather T packed tokens into buckets ``[N, L]`` of similar lengths, and back.

    Returns:
        For each bucket the token indices ``[N, L]`` (padding repeats the sequence's last token), and for each of the T
        tokens its row among all buckets' entries laid end to end.
    """
    order = torch.argsort(lengths, descending=True, stable=True)
    buckets: list[list[int]] = []
    for i in order.tolist():
        # A quarter of waste is cheaper than another call; short sequences are all launch cost.
        if buckets and int(lengths[i]) >= 0.75 * int(lengths[buckets[-1][0]]) - 8:
            buckets[-1].append(i)
        else:
            buckets.append([i])
    gather, scatter = [], torch.empty(int(offsets[-1]), dtype=torch.int64)
    base = 0
    for bucket in buckets:
        rows = torch.tensor(bucket)
        length_N1, longest = lengths[rows][:, None], int(lengths[rows[0]])
        step_1L = torch.arange(longest)[None]
        index_NL = offsets[rows][:, None] + torch.minimum(step_1L, length_N1 - 1)
        entry_NL = base + torch.arange(index_NL.numel()).view_as(index_NL)
        real_NL = step_1L < length_N1
        scatter[index_NL[real_NL]] = entry_NL[real_NL]
        gather.append(index_NL)
        base += index_NL.numel()
    return gather, scatter
