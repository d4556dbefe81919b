"""Attention over ragged tokens, inside the Hugging Face model's own forward.

The model runs with ``attn_implementation="hybridflow"`` on one row of T tokens without padding, and is given a *layout*
as a keyword argument. The layout knows which tokens belong together and computes every layer's attention. There is no
mask and no padding in the model, so nothing depends on the way sequences are packed.

This avoids a trap: with an attention mask of ones beside packed position ids, transformers attends across sequences.

Sequences that begin with the same tokens, as the responses to one prompt do, can share that beginning: its tokens then
go through the model once, and every response's attention reads them.

Shapes: T tokens of all sequences, U of them that go through the model (all, where nothing is shared), N sequences of a
bucket, L longest of a bucket, H query heads, K key-value heads, D size of a query or key, E size of
a value, B sequences.
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
from hybridflow.errors import UserError
from hybridflow.models.softcap import softcapped_attention, visible

ATTENTION = "hybridflow"
# What models hand to the attention besides queries, keys and values, and what a layout can ignore.
COVERED = frozenset({"layout", "scaling", "sliding_window", "softcap", "is_causal"})
NEUTRAL = frozenset(
    {
        "dropout", "position_ids", "cache_position", "use_cache", "past_key_values", "return_dict", "deterministic",
        "output_attentions", "output_hidden_states", "output_router_logits", "num_items_in_batch",
    }
)  # fmt: skip


class Layout(Protocol):
    """Computes one layer's attention for the tokens of a forward pass."""

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
        """Maps q ``[rows, H, tokens, D]``, k ``[rows, K, tokens, D]``, v ``[rows, K, tokens, E]`` to
        ``[rows, tokens, H, E]``.

        Args:
            layer: number of the layer.
            q: queries.
            k: keys.
            v: values; their size E can differ from D (multi-head latent attention).
            scale: multiplies the scores.
            window: a token sees itself and the ``window - 1`` tokens before it; None sees all before it.
            softcap: scores become ``softcap * tanh(score / softcap)`` (Gemma 2); None leaves them.
        """
        ...


def attention(
    module: torch.nn.Module, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Passes the attention of transformers on to the layout of this forward pass.

    Raises:
        UserError: the model asks for something that layouts do not compute (attention sinks, a bias by position, ...).
    """
    layout: Layout | None = kwargs.get("layout")
    assert layout is not None, "a model with this attention is called with layout=..."
    assert attention_mask is None, "layouts replace masks"
    asked = [name for name, value in kwargs.items() if value is not None and name not in COVERED | NEUTRAL]
    causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        asked.append("is_causal=False")
    if asked:
        raise UserError(
            f"{type(module).__name__} needs attention that packed sequences do not support: {', '.join(asked)}",
            why="leaving it out would silently compute another model",
            fix="set model.packing=false (generate: --no-packing)",
        )
    scale = kwargs.get("scaling")
    out = layout.attend(
        int(module.layer_idx),  # type: ignore[arg-type]
        q,
        k,
        v,
        scale=scale if scale is not None else q.shape[-1] ** -0.5,
        window=kwargs.get("sliding_window"),
        softcap=kwargs.get("softcap"),
    )
    return out, None


class PackedLayout:
    """Whole sequences side by side in one row of tokens; each attends causally to itself.

    On a GPU a varlen kernel computes this directly. Elsewhere sequences of similar length are gathered into buckets,
    and each bucket is one SDPA call: padded on the right inside the call only, which a causal mask makes harmless.

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
        self._masks: dict[tuple[int, int], Tensor] = {}
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
        gather, scatter = bucket_indices(self.lengths, self.offsets)
        if self.shared is not None:
            gather = [self.shared.place_T[index] for index in gather]
            scatter = scatter[self.shared.token_U]
        return [index.to(self.device) for index in gather], scatter.to(self.device)

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
        """Computes one layer: see `Layout`."""
        if self.keep is not None:
            self.keep.append((k[0].transpose(0, 1), v[0].transpose(0, 1)))
        size, value_size = q.shape[-1], v.shape[-1]
        if value_size < size and softcap is None:
            v = F.pad(v, (0, size - value_size))  # fused kernels want one head size; the zeros are cut off again
        q_UHD, k_UKD, v_UKD = (x[0].transpose(0, 1) for x in (q, k, v))
        if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and softcap is None and size <= 256:
            out_UHD = self._varlen(q_UHD, k_UKD, v_UKD, scale, window)
        else:
            out_UHD = self._bucketed(q_UHD, k_UKD, v_UKD, scale, window, softcap)
        return out_UHD[None, ..., :value_size]

    def _varlen(self, q_UHD: Tensor, k_UKD: Tensor, v_UKD: Tensor, scale: float, window: int | None) -> Tensor:
        cu, longest = self.cu_seqlens, self.longest
        grouped = q_UHD.shape[1] != k_UKD.shape[1]
        sees = (-1 if window is None else window - 1, 0)
        if self.shared is not None:
            place_T = self.shared.place_T.to(q_UHD.device)
            q_UHD, k_UKD, v_UKD = q_UHD[place_T], k_UKD[place_T], v_UKD[place_T]
        out = varlen_attn(
            q_UHD, k_UKD, v_UKD, cu, cu, longest, longest, scale=scale, window_size=sees, enable_gqa=grouped
        )
        assert isinstance(out, Tensor)
        return out if self.shared is None else out[self.shared.token_U.to(out.device)]

    def _bucketed(
        self, q_UHD: Tensor, k_UKD: Tensor, v_UKE: Tensor, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        gather, scatter = self.buckets
        grouped = q_UHD.shape[1] != k_UKD.shape[1]
        parts = []
        for index_NL in gather:
            q_b, k_b, v_b = (x[index_NL].transpose(1, 2) for x in (q_UHD, k_UKD, v_UKE))
            length = index_NL.shape[1]
            narrow = window if window is not None and length > window else None
            if softcap is not None:
                out_b = softcapped_attention(q_b, k_b, v_b, scale=scale, softcap=softcap, window=narrow)
            else:
                mask = None if narrow is None else self._window_mask(length, narrow)
                out_b = F.scaled_dot_product_attention(
                    q_b, k_b, v_b, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
                )
            parts.append(out_b.transpose(1, 2).flatten(0, 1))
        return torch.cat(parts)[scatter]

    def _window_mask(self, length: int, window: int) -> Tensor:
        """Returns ``[L, L]``: which tokens each token of a sequence sees; made once for all layers."""
        if (length, window) not in self._masks:
            self._masks[length, window] = visible(length, length, 0, window, self.device)
        return self._masks[length, window]


@dataclass(frozen=True, slots=True)
class Shared:
    """The tokens of a packed batch that go through the model, and where each of the others is found.

    Args:
        token_U: on the T axis, the tokens that go through, ascending.
        place_T: for each of the T tokens, the one of the U that stands for it.
    """

    token_U: Tensor
    place_T: Tensor

    def with_more(self, tokens: int) -> Shared:
        """Adds this many tokens at the end, for which nothing else stands."""
        more, every, through = torch.arange(tokens), len(self.place_T), len(self.token_U)
        return Shared(torch.cat([self.token_U, every + more]), torch.cat([self.place_T, through + more]))


def shared_beginnings(offsets: Tensor, beginning_B: Tensor, kind_B: Tensor) -> Shared:
    """Lets sequences that begin alike share their first tokens.

    Args:
        offsets: ``[B + 1]`` offsets of the sequences.
        beginning_B: how many tokens of each are its beginning.
        kind_B: a number below B for each, equal where the beginnings are the same tokens.
    """
    first_B = torch.full_like(kind_B, len(kind_B)).scatter_reduce(0, kind_B, torch.arange(len(kind_B)), "amin")[kind_B]
    lengths = offsets.diff()
    sequence_T = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    every_T = torch.arange(len(sequence_T))
    step_T = every_T - offsets[sequence_T]
    source_T = torch.where(step_T < beginning_B[sequence_T], offsets[first_B[sequence_T]] + step_T, every_T)
    through_T = source_T == every_T
    return Shared(through_T.nonzero()[:, 0], (through_T.cumsum(0) - 1)[source_T])


def similar(lengths: Tensor) -> list[list[int]]:
    """Returns which sequences are padded together: those of similar lengths, the longest first."""
    order = torch.argsort(lengths, descending=True, stable=True)
    buckets: list[list[int]] = []
    for i in order.tolist():
        # A quarter of padding costs less than another call; for short sequences the launch is nearly all of the cost.
        if buckets and int(lengths[i]) >= 0.75 * int(lengths[buckets[-1][0]]) - 8:
            buckets[-1].append(i)
        else:
            buckets.append([i])
    return buckets


def bucket_indices(lengths: Tensor, offsets: Tensor) -> tuple[list[Tensor], Tensor]:
    """Returns how to gather T packed tokens into buckets ``[N, L]`` of similar lengths, and back.

    Returns:
        For each bucket the token indices ``[N, L]`` (padding repeats the sequence's last token), and for each of the T
        tokens its row among all buckets' entries laid end to end.
    """
    buckets = similar(lengths)
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
