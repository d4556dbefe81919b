"""The key-value cache of the inline engine, and attention of one new token per row over it.

Layers may have any sizes; those of equal sizes share one tensor, so that moving a row is one operation for all of them.

Shapes: R running rows, H query heads, K key-value heads, G = H / K, D size of a query or key, E size of a value, W
width in tokens, L longest running sequence, T tokens of a prefill, C sequences of a prefill, B = R * K.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Kept = Sequence[tuple[Tensor, Tensor]]


class Cache:
    """Keys and values of the running rows, layer by layer.

    Args:
        rows: rows to hold.
        width: tokens per row.
        kept: keys and values of a prefill, ``[T, K, D]`` and ``[T, K, E]`` per layer: they give the sizes.
        dtype: what is stored.
        old: the cache so far; its first `keep` rows are taken over.
        keep: how many.
    """

    def __init__(
        self, rows: int, width: int, kept: Kept, dtype: torch.dtype, old: Cache | None = None, keep: int = 0
    ) -> None:
        self.rows, self.width, self.dtype = rows, width, dtype
        self.keys: list[Tensor] = []  # of each layer, [R, K, W, D]
        self.values: list[Tensor] = []  # [R, K, W, E]
        self._stacks: list[tuple[Tensor, Tensor]] = []
        self.layers: list[tuple[int, int]] = []  # of each layer, its stack and its place in that
        sizes = [(k.shape[1], k.shape[2], v.shape[2]) for k, v in kept]
        make: dict[str, Any] = {"dtype": dtype, "device": kept[0][0].device}
        # Zeros: what is masked out still enters attention as 0 x value, and must not be a stray NaN.
        stacks = {
            (heads, d, e): (
                torch.zeros(sizes.count((heads, d, e)), rows, heads, width, d, **make),
                torch.zeros(sizes.count((heads, d, e)), rows, heads, width, e, **make),
            )
            for heads, d, e in dict.fromkeys(sizes)
        }
        for layer, size in enumerate(sizes):
            place = sizes[:layer].count(size)
            keys, values = stacks[size]
            self.keys.append(keys[place])
            self.values.append(values[place])
            self.layers.append((list(stacks).index(size), place))
        self._stacks = list(stacks.values())
        if old is not None and keep:
            for (keys, values), (old_keys, old_values) in zip(self._stacks, old._stacks, strict=True):
                keys[:, :keep, :, : old.width] = old_keys[:, :keep]
                values[:, :keep, :, : old.width] = old_values[:, :keep]

    def store(self, kept: Kept, offsets: Tensor, which: Tensor, first: int) -> None:
        """Copies the keys and values of distinct contexts to the rows from `first` on.

        Args:
            kept: see `Cache`; contexts lie one after the other.
            offsets: where each context begins, and the end of the last.
            which: the context of each new row.
            first: the first new row.
        """
        lengths = offsets.diff()
        longest = int(lengths.max())
        # Contexts side by side, padded with their last token: positions beyond a row's length are masked, or written
        # over.
        index_CL = offsets[:-1, None] + torch.minimum(torch.arange(longest), lengths[:, None] - 1)
        device = self.keys[0].device
        index_CL, which, rows = index_CL.to(device), which.to(device), slice(first, first + len(which))
        for layer, (k_TKD, v_TKE) in enumerate(kept):
            self.keys[layer][rows, :, :longest] = k_TKD.to(self.dtype)[index_CL].transpose(1, 2)[which]
            self.values[layer][rows, :, :longest] = v_TKE.to(self.dtype)[index_CL].transpose(1, 2)[which]

    def copy(self, row: int, length: int) -> list[tuple[Tensor, Tensor]]:
        """Returns a copy of a row's first tokens: for the layers of each size ``[layers, K, length, D]`` and values."""
        return [(k[:, row, :, :length].clone(), v[:, row, :, :length].clone()) for k, v in self._stacks]

    def move(self, sources: list[int], targets: list[int], used: int) -> None:
        """Moves rows `sources` to the places `targets`; only their first `used` tokens matter."""
        source, target = (torch.tensor(x, device=self.keys[0].device) for x in (sources, targets))
        for keys, values in self._stacks:
            keys[:, target, :, :used] = keys[:, source, :, :used]
            values[:, target, :, :used] = values[:, source, :, :used]


class CacheLayout:
    """Attention of one new token per row over its cached ones (see `models.attention.Layout`).

    Args:
        cache: keys and values; those of the new tokens are written into it.
        length_R: tokens of each running row, the new one included.
    """

    def __init__(self, cache: Cache, length_R: Tensor) -> None:
        shortest, longest = torch.stack(length_R.aminmax()).tolist()
        self.cache, self.used, self.equal = cache, longest, longest == shortest
        self.place_R, self.row_R = length_R - 1, torch.arange(len(length_R), device=length_R.device)
        self._masks: dict[tuple[int, int | None], Tensor] = {}

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
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        rows, heads, _, size = q.shape
        kv_heads, width = keys.shape[1], self.cache.width
        if self.equal:  # contiguous: no index
            keys[:rows, :, self.used - 1], values[:rows, :, self.used - 1] = k[:, :, 0], v[:, :, 0]
        else:
            keys[self.row_R, :, self.place_R] = k[:, :, 0].to(keys.dtype)
            values[self.row_R, :, self.place_R] = v[:, :, 0].to(values.dtype)
        # Heads of a group take the place of query positions. Two products are faster than SDPA at one position.
        both, group = rows * kv_heads, heads // kv_heads
        q_BGD = q.reshape(both, group, size).to(keys.dtype)
        keys_BLD = keys[:rows].view(both, width, size)[:, : self.used]
        values_BLE = values[:rows].view(both, width, -1)[:, : self.used]
        mask_B1L = self._mask(kv_heads, window)
        if softcap is None:
            score_BGL = torch.baddbmm(mask_B1L, q_BGD, keys_BLD.mT, alpha=scale, beta=int(mask_B1L.numel() > 1))
        else:
            score_BGL = softcap * torch.tanh(torch.bmm(q_BGD, keys_BLD.mT) * (scale / softcap)) + mask_B1L
        weight_BGL = score_BGL.softmax(-1, dtype=torch.promote_types(score_BGL.dtype, torch.float32))
        out = torch.bmm(weight_BGL.to(values.dtype), values_BLE)
        return out.view(rows, 1, heads, -1)

    def _mask(self, kv_heads: int, window: int | None) -> Tensor:
        """Returns 0 for what a row sees, else -inf, ``[R * K, 1, L]``; a single 0 where every row sees all."""
        if window is not None and window >= self.used:
            window = None
        if (kv_heads, window) not in self._masks:
            if self.equal and window is None:
                self._masks[kv_heads, window] = torch.zeros(1, 1, 1, dtype=self.cache.dtype, device=self.row_R.device)
            else:
                step_L = torch.arange(self.used, device=self.row_R.device)
                hidden_RL = step_L > self.place_R[:, None]
                if window is not None:
                    hidden_RL |= step_L <= self.place_R[:, None] - window
                mask_RL = torch.zeros(hidden_RL.shape, dtype=self.cache.dtype, device=hidden_RL.device)
                mask_RL.masked_fill_(hidden_RL, -torch.inf)
                self._masks[kv_heads, window] = mask_RL.repeat_interleave(kv_heads, 0)[:, None]
        return self._masks[kv_heads, window]
