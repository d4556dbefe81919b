"""Causal attention with soft-capped scores (Gemma 2), which SDPA does not have, in bounded memory.

The scores are written out, so they are made for a few queries at a time and made again for the backward pass.

Shapes: N sequences, L tokens, H query heads, K key-value heads, G = H / K, D key size, E value size, I queries of a
piece, J keys that they see.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

PIECE = 2**20  # most scores at once


def softcapped_attention(
    q_NHLD: Tensor, k_NKLD: Tensor, v_NKLE: Tensor, *, scale: float, softcap: float, window: int | None
) -> Tensor:
    """Computes attention ``[N, H, L, E]`` with scores ``softcap * tanh(scale * q k / softcap)``; see
    `attention.Layout`.
    """
    sequences, heads, length = q_NHLD.shape[:3]
    step = max(16, PIECE // (sequences * heads * length))
    parts = []
    # The last queries see the most keys. They come first, so that later pieces fit into the memory that earlier ones
    # freed.
    for start in reversed(range(0, length, step)):
        stop = min(start + step, length)
        first = 0 if window is None else max(0, start - window + 1)
        piece = q_NHLD[:, :, start:stop], k_NKLD[:, :, first:stop], v_NKLE[:, :, first:stop]
        arguments = (*piece, scale, softcap, window, start - first)
        # Short sequences are a single piece: keeping it costs less than making it again.
        again = torch.is_grad_enabled() and stop - start < length
        parts.append(
            checkpoint(_piece, *arguments, use_reentrant=False, preserve_rng_state=False)
            if again
            else _piece(*arguments)
        )
    return torch.cat(parts[::-1], dim=2)


def _piece(
    q_NHID: Tensor, k_NKJD: Tensor, v_NKJE: Tensor, scale: float, softcap: float, window: int | None, lead: int
) -> Tensor:
    """Computes the attention of I queries over J keys; query i stands at key ``lead + i``."""
    sequences, heads, queries, size = q_NHID.shape
    kv_heads, keys = k_NKJD.shape[1:3]
    grouped = q_NHID.reshape(sequences, kv_heads, -1, size)  # heads of a group stand as if they were more queries
    scores = (grouped @ k_NKJD.transpose(-1, -2)).view(sequences, heads, queries, keys) * (scale / softcap)
    scores = torch.tanh(scores) * softcap
    scores = scores.masked_fill(~visible(queries, keys, lead, window, scores.device), -torch.inf)
    weights = scores.softmax(-1, dtype=torch.promote_types(torch.float32, scores.dtype)).to(v_NKJE.dtype)
    return (weights.view(sequences, kv_heads, -1, keys) @ v_NKJE).view(sequences, heads, queries, v_NKJE.shape[-1])


def visible(queries: int, keys: int, lead: int, window: int | None, device: torch.device) -> Tensor:
    """Returns ``[queries, keys]``: which keys a query sees; query i stands at key ``lead + i``."""
    query_I1 = torch.arange(lead, lead + queries, device=device)[:, None]
    key_1J = torch.arange(keys, device=device)[None]
    seen_IJ = key_1J <= query_I1
    return seen_IJ if window is None else seen_IJ & (key_1J > query_I1 - window)
