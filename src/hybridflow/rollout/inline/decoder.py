"""The common decoder without its Hugging Face modules: the quick path of the inline engine.

Covers Llama, Qwen2, Qwen3 and Mistral with full attention: RMSNorm, rotary embeddings, grouped queries, SwiGLU, with or
without biases and norms of queries and keys. The arithmetic is that of the modules; what differs is how often Python
and torch are called: the projections of queries, keys and values are one product, and so are those of gate and up.
For this the weights are copied side by side, as long as a batch is generated; where copies would take more than
`JOINED_BYTES` they stay apart, in the model's own memory. In bfloat16 all matrices are copied.

Shapes: T tokens, C hidden size, H query heads, K key-value heads, D head size, F feed-forward size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridflow.models.attention import Layout

FAMILIES = ("llama", "qwen2", "qwen3", "mistral")
JOINED_BYTES = 1 << 29  # copies for joint products up to this size (half a gigabyte)

Matrix = tuple[tuple[Tensor, Tensor | None], ...]  # weights and biases whose outputs are side by side


class Layer(NamedTuple):
    """Weights of one layer."""

    attention_norm: Tensor
    qkv: Matrix
    heads_norm: Tensor | None  # [H + K, D], for queries and keys
    out: Matrix
    feed_norm: Tensor
    gate_up: Matrix
    down: Matrix


def is_covered(model: Any) -> bool:
    """Returns whether the decoder computes this model as its own modules do, judged by its family and its
    configuration.
    """
    config = model.config
    if config.model_type not in FAMILIES or hasattr(model, "peft_config"):
        return False
    kinds = getattr(config, "layer_types", None) or [
        "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
    ]
    inverse, rotary = model.model.rotary_emb.inv_freq, model.model.rotary_emb.rope_type
    attention = model.model.layers[0].self_attn
    linear = (module for name, module in model.named_modules() if name.endswith("_proj"))
    return (
        set(kinds) == {"full_attention"}
        and config.hidden_act in ("silu", "swish")
        and rotary not in ("dynamic", "longrope")  # their frequencies change with the length
        and 2 * len(inverse) == attention.head_dim
        and all(type(module) is nn.Linear for module in linear)
    )


class Decoder:
    """A covered model's forward pass.

    Args:
        model: the model; its weights must stay as they are while this object is used.
        dtype: what matrix products are computed in; the rest is in float32, or the model's own type if that is wider.
        steps: the two functions that a layer is made of.
    """

    def __init__(self, model: Any, dtype: torch.dtype, steps: Steps) -> None:
        trunk, config = model.model, model.config
        self.dtype, self.wide = dtype, torch.promote_types(model.dtype, torch.float32)
        self.steps, self.eps = steps, config.rms_norm_eps
        attention = trunk.layers[0].self_attn
        self.size, self.scale = attention.head_dim, attention.scaling
        self.queries, self.pairs = config.num_attention_heads, config.num_key_value_heads
        self.inverse, self.rotary_scale = trunk.rotary_emb.inv_freq, trunk.rotary_emb.attention_scaling
        self.embedding, self.norm = model.get_input_embeddings().weight, trunk.norm.weight.to(self.wide)
        joined = dtype != model.dtype or sum(p.nbytes for p in trunk.layers.parameters()) <= JOINED_BYTES
        self.head = self._matrix([model.get_output_embeddings()], joined)
        self.layers = [self._layer(layer, joined) for layer in trunk.layers]

    def _layer(self, layer: Any, joined: bool) -> Layer:
        a, m = layer.self_attn, layer.mlp
        norm = None
        if hasattr(a, "q_norm"):
            parts = [a.q_norm.weight.expand(self.queries, -1), a.k_norm.weight.expand(self.pairs, -1)]
            norm = torch.cat(parts).to(self.wide)
        return Layer(
            layer.input_layernorm.weight.to(self.wide),
            self._matrix([a.q_proj, a.k_proj, a.v_proj], joined),
            norm,
            self._matrix([a.o_proj], joined),
            layer.post_attention_layernorm.weight.to(self.wide),
            self._matrix([m.gate_proj, m.up_proj], joined),
            self._matrix([m.down_proj], joined),
        )

    def _matrix(self, modules: Sequence[Any], joined: bool) -> Matrix:
        parts = [(m.weight.to(self.dtype), None if m.bias is None else m.bias.to(self.dtype)) for m in modules]
        if len(parts) == 1 or not joined:
            return tuple(parts)
        weight = torch.cat([w for w, _ in parts])
        if all(b is None for _, b in parts):
            return ((weight, None),)
        return ((weight, torch.cat([w.new_zeros(len(w)) if b is None else b for w, b in parts])),)

    def hidden(self, ids_T: Tensor, position_T: Tensor, layout: Layout, *, packed: bool) -> Tensor:
        """Computes the last hidden states ``[T, C]``.

        Args:
            ids_T: token ids.
            position_T: their places in their sequences.
            layout: computes attention.
            packed: tokens are sequences side by side, as in a prefill; else every token is a row's newest one.
        """
        x_TC = F.embedding(ids_T, self.embedding).to(self.wide)
        angle_TD = position_T[:, None].float() * self.inverse.float()
        cos_T1D = (angle_TD.cos() * self.rotary_scale).repeat(1, 2)[:, None].to(self.wide)
        sin_TD = angle_TD.sin() * self.rotary_scale
        sin_T1D = torch.cat([-sin_TD, sin_TD], -1)[:, None].to(self.wide)
        for i, layer in enumerate(self.layers):
            q, k, v = self.steps.before(x_TC, layer, cos_T1D, sin_T1D, self.queries, self.pairs, self.size, self.eps)
            if self.dtype != self.wide and q.is_cuda:
                q, k, v = q.to(self.dtype), k.to(self.dtype), v.to(self.dtype)
            if packed:
                q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
                out = layout.attend(i, q, k, v, scale=self.scale)[0]
            else:
                out = layout.attend(i, q[:, :, None], k[:, :, None], v[:, :, None], scale=self.scale)[:, 0]
            x_TC = self.steps.after(x_TC, out.flatten(1), layer, self.eps)
        return F.rms_norm(x_TC, (x_TC.shape[-1],), self.norm, self.eps)

    def logits(self, hidden_TC: Tensor) -> Tensor:
        """Computes the logits ``[T, V]`` of these states."""
        return _product(hidden_TC, self.head)


def _product(x: Tensor, matrix: Matrix) -> Tensor:
    parts = [F.linear(x.to(weight.dtype), weight, bias) for weight, bias in matrix]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _before(
    x_TC: Tensor, layer: Layer, cos_T1D: Tensor, sin_T1D: Tensor, queries: int, pairs: int, size: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the part before attention: queries ``[T, H, D]``, keys and values ``[T, K, D]``."""
    x_TC = F.rms_norm(x_TC, (x_TC.shape[-1],), layer.attention_norm, eps)
    heads = _product(x_TC, layer.qkv).to(x_TC.dtype).view(len(x_TC), -1, size)
    both, v_TKD = heads[:, : queries + pairs], heads[:, queries + pairs :]
    if layer.heads_norm is not None:
        both = F.rms_norm(both, (size,), None, eps) * layer.heads_norm
    left, right = both.chunk(2, -1)
    both = torch.addcmul(both * cos_T1D, torch.cat([right, left], -1), sin_T1D)
    return both[:, :queries], both[:, queries:], v_TKD


def _after(x_TC: Tensor, attended: Tensor, layer: Layer, eps: float) -> Tensor:
    """Computes the part after attention: output projection and feed-forward network, each added to the stream."""
    x_TC = x_TC + _product(attended, layer.out)
    gate, up = _product(F.rms_norm(x_TC, (x_TC.shape[-1],), layer.feed_norm, eps), layer.gate_up).chunk(2, -1)
    return x_TC + _product(F.silu(gate).mul_(up), layer.down)


class Steps(NamedTuple):
    """The two functions of a layer, as they are or compiled; one graph serves all layers, and all weights."""

    before: Callable[..., tuple[Tensor, Tensor, Tensor]] = _before
    after: Callable[..., Tensor] = _after

    @staticmethod
    def compiled() -> Steps:
        """Returns the same steps through `torch.compile`, for any number of tokens."""
        return Steps(torch.compile(_before, dynamic=True), torch.compile(_after, dynamic=True))
