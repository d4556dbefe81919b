"""Log-probabilities and entropies of tokens without holding all logits, with a gradient of their own.

For 1,024 tokens and a vocabulary of 152 thousand, the logits alone take 600 MB, and `log_softmax` with its backward
pass three times that. Here the logits are made in tiles, some tokens by some words, reduced to running sums, and made
again in the backward pass. What stays is a handful of numbers for each token. On a CPU, where products are what costs
most, tiles that take little memory all together stay too, as exp(logit - the token's maximum so far).

With tile logits z, the log-sum-exp l and p = exp(z - l), log p(y) has the gradient ``1[j = y] - p_j`` by z_j, and the
entropy ``-p_j (log p_j + entropy)``. The backward pass works on the second terms tile by tile; the first touches only
the rows of the words that occurred.

Shapes: T tokens of all sequences, K words that these were drawn from, M tokens that are scored, m tokens of a tile, D
hidden size, V vocabulary, v words of a tile, P (token, word) pairs of a support.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hybridflow.batch import Batch
from hybridflow.models.head import Head

Entropy = Literal["no", "detached", "with gradient"]

SMALL = 2**21  # at most this many logits are computed at once and kept: that is faster
SMALL_VOCABULARY = 512
TILE_CPU = 2**20  # logits of a tile: as many as the caches of a core hold
TILE_GPU = 2**28
KEPT_CPU = 2**26  # up to this many logits (256 MB in float32) stay for the backward pass
FAR = -1e30  # stands for minus infinity: finite, so that 0 x FAR is 0


@dataclass(frozen=True, slots=True)
class SupportPairs:
    """The words that some tokens were drawn from (top-p and the like); their softmax runs over these alone.

    Args:
        token_P: which of the M tokens a pair belongs to.
        word_P: the word.
        limited_M: tokens that have a support; the others have the whole vocabulary.
    """

    token_P: Tensor
    word_P: Tensor
    limited_M: Tensor

    @staticmethod
    def of(size_M: Tensor, ids: Tensor) -> SupportPairs:
        """Makes it from the number of words of each token (0: the whole vocabulary) and all these words, end to end."""
        token_P = torch.repeat_interleave(torch.arange(len(size_M), device=size_M.device), size_M)
        return SupportPairs(token_P, ids, size_M > 0)

    def outside(self, tokens: slice, words: slice) -> Tensor:
        """Returns ``[m, v]``: words that the tokens of a tile were not drawn from."""
        columns = words.stop - words.start
        here_P = (self.token_P >= tokens.start) & (self.token_P < tokens.stop)
        here_P &= (self.word_P >= words.start) & (self.word_P < words.stop)
        outside = self.limited_M[tokens, None].repeat(1, columns)
        outside.view(-1)[(self.token_P[here_P] - tokens.start) * columns + self.word_P[here_P] - words.start] = False
        return outside


def support_of(batch: Batch, index_M: Tensor, device: torch.device) -> SupportPairs | None:
    """Returns the support of the scored tokens, from ``support_size_T`` and ``support_ids_K`` where the batch has them.

    Args:
        batch: ``support_size_T``, how many words each token was drawn from (0: all), and on axis K the words of all
            tokens of a sequence, end to end.
        index_M: where the scored tokens stand on the T axis.
        device: where to put it.
    """
    if "support_size_T" not in batch:
        return None
    size_T = batch["support_size_T"].long()
    scored_T = torch.zeros(len(size_T), dtype=torch.bool, device=size_T.device)
    scored_T[index_M] = True
    ids = batch["support_ids_K"][torch.repeat_interleave(scored_T, size_T)].long()
    return SupportPairs.of(size_T[index_M].to(device), ids.to(device))


def token_logps(
    hidden_MD: Tensor,
    head: Head,
    target_M: Tensor,
    *,
    temperature: float = 1.0,
    entropy: Entropy = "no",
    support: SupportPairs | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Computes ``log_softmax(logits / temperature)`` at the targets, and the entropies in nats; float32 at least.

    Args:
        hidden_MD: last hidden states.
        head: the output layer.
        target_M: the tokens; with a support, each within its own.
        temperature: divides the logits.
        entropy: whether to compute entropies, and with what gradient.
        support: words that tokens were drawn from.
    """
    layer = head.layer
    words = head.vocabulary()
    if len(target_M) * words <= SMALL or words <= SMALL_VOCABULARY:
        return _plain(hidden_MD, head, target_M, temperature, entropy, support)
    if type(layer) is not torch.nn.Linear:  # an output layer with adapters
        return _in_turns(hidden_MD, head, target_M, temperature, entropy, support, max(1, 8 * TILE_CPU // words))
    keep = torch.is_grad_enabled() and hidden_MD.device.type == "cpu" and len(target_M) * words <= KEPT_CPU
    keep = keep and head.softcap is None and entropy != "with gradient"  # these need the logits themselves
    tiled: tuple[Tensor, Tensor | None] = _Tiled.apply(  # type: ignore[no-untyped-call]
        hidden_MD, layer.weight, layer.bias, target_M, head.scale, head.softcap, temperature, entropy, support, keep
    )
    return tiled


@torch.no_grad()
def token_moments(
    hidden_MD: Tensor, head: Head, target_M: Tensor, *, temperature: float = 1.0, support: SupportPairs | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes log-probabilities, entropies and sums over the words of their squared probabilities, without gradients.

    The logits are made once for all three; the arguments are those of `token_logps`.
    """
    layer, words = head.layer, head.vocabulary()
    quick = len(target_M) * words <= SMALL or words <= SMALL_VOCABULARY
    if type(layer) is torch.nn.Linear and not quick:
        tiles, _ = _tiles(hidden_MD, layer.weight, layer.bias, head.scale, head.softcap, temperature, support)
        with torch.autocast(hidden_MD.device.type, enabled=False):
            logit_M, lse_M, entropy_M, squares_M = _reduce(tiles, target_M, True, True)
        _check_within(logit_M, support)
        assert entropy_M is not None and squares_M is not None
        return logit_M - lse_M, entropy_M, squares_M
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    for part, own in _turns(len(target_M), support, len(target_M) if quick else max(1, 8 * TILE_CPU // words)):
        logp_mV = _log_softmax(hidden_MD[part], head, temperature, own)
        logp_m, p_mV = logp_mV.gather(-1, target_M[part, None])[:, 0], logp_mV.exp()
        rows.append((logp_m, -(p_mV * logp_mV).sum(-1), p_mV.square_().sum(-1)))
    if not rows:
        none_M = hidden_MD.new_zeros(0, dtype=_wide(hidden_MD.dtype))
        return none_M, none_M, none_M
    logp_M, entropy_M, squares_M = (torch.cat(parts) for parts in zip(*rows, strict=True))
    return logp_M, entropy_M, squares_M


def _log_softmax(hidden_MD: Tensor, head: Head, temperature: float, support: SupportPairs | None) -> Tensor:
    logits_MV = head.logits(hidden_MD, temperature)
    if support is not None:
        outside_MV = support.outside(slice(0, len(logits_MV)), slice(0, logits_MV.shape[1]))
        logits_MV = logits_MV.masked_fill(outside_MV, FAR)
    return torch.log_softmax(logits_MV, dim=-1)


def _plain(
    hidden_MD: Tensor, head: Head, target_M: Tensor, temperature: float, entropy: Entropy, support: SupportPairs | None
) -> tuple[Tensor, Tensor | None]:
    logp_MV = _log_softmax(hidden_MD, head, temperature, support)
    logp_M = logp_MV.gather(-1, target_M[:, None])[:, 0]
    if entropy == "no":
        return logp_M, None
    source_MV = logp_MV.detach() if entropy == "detached" else logp_MV
    return logp_M, -(source_MV.exp() * source_MV).sum(-1)


def _in_turns(
    hidden_MD: Tensor,
    head: Head,
    target_M: Tensor,
    temperature: float,
    entropy: Entropy,
    support: SupportPairs | None,
    step: int,
) -> tuple[Tensor, Tensor | None]:
    """Runs `_plain` for some tokens at a time, each made again by the backward pass: for any output layer."""
    logps: list[Tensor] = []
    entropies: list[Tensor] = []
    for part, own in _turns(len(target_M), support, step):
        arguments = (hidden_MD[part], head, target_M[part], temperature, entropy, own)
        logp_m, entropy_m = (
            checkpoint(_plain, *arguments, use_reentrant=False, preserve_rng_state=False)
            if torch.is_grad_enabled()
            else _plain(*arguments)
        )
        logps.append(logp_m)
        entropies += [] if entropy_m is None else [entropy_m]
    return torch.cat(logps), torch.cat(entropies) if entropies else None


def _turns(tokens: int, support: SupportPairs | None, step: int) -> Iterator[tuple[slice, SupportPairs | None]]:
    """Yields some tokens at a time, with their own support."""
    for start in range(0, tokens, step) if tokens else ():
        part = slice(start, min(start + step, tokens))
        own = None
        if support is not None:
            here_P = (support.token_P >= part.start) & (support.token_P < part.stop)
            own = SupportPairs(support.token_P[here_P] - start, support.word_P[here_P], support.limited_M[part])
        yield part, own


@dataclass(frozen=True, slots=True)
class _Tiles:
    """The logits of one call, tile by tile.

    Args:
        hidden_MD: the states, in the precision that products are computed in.
        weight_VD: the output layer's.
        bias_V: in the scale of the products; None for none.
        times: multiplies the products; 1 where the states are multiplied instead, which would round in low precision.
        after: the logits are ``after * tanh(product)`` with a soft-cap, else the product itself.
        support: see `SupportPairs`.
    """

    hidden_MD: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None
    times: float
    after: float | None
    support: SupportPairs | None

    def shapes(self) -> Iterator[tuple[slice, slice]]:
        """Yields the tokens and words of each tile; all tokens of a few words where they fit, so that weights are read
        once.
        """
        tokens, words = len(self.hidden_MD), len(self.weight_VD)
        tile = TILE_GPU if self.hidden_MD.is_cuda else TILE_CPU
        wide = min(words, max(1024, tile // max(tokens, 1)))
        high = max(1, tile // wide)
        for first in range(0, words, wide):
            for start in range(0, tokens, high):
                yield slice(start, min(start + high, tokens)), slice(first, min(first + wide, words))

    def logits(self, tokens: slice, words: slice) -> tuple[Tensor, Tensor | None]:
        """Computes a tile's logits, and with a soft-cap the tanh within."""
        weight_vD = self.weight_VD[words].to(self.hidden_MD.dtype)
        logits = _product(self.hidden_MD[tokens], weight_vD.T)
        if self.times != 1.0:
            logits *= self.times
        if self.bias_V is not None:
            logits += self.bias_V[words]
        bent = None
        if self.after is not None:
            bent = logits.tanh_()
            logits = bent * self.after
        if self.support is not None:
            logits.masked_fill_(self.support.outside(tokens, words), FAR)
        return logits, bent


def _tiles(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    scale: float,
    softcap: float | None,
    temperature: float,
    support: SupportPairs | None,
) -> tuple[_Tiles, float]:
    """Returns the tiles, and the factor of the products before a soft-cap."""
    device = hidden_MD.device.type
    compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_MD.dtype
    before = scale / temperature if softcap is None else scale / softcap
    after = None if softcap is None else softcap / temperature
    scaled_V = None if bias_V is None else bias_V.to(_wide(compute)) * before
    exact = compute == _wide(compute)
    states_MD = hidden_MD.to(compute) * before if exact else hidden_MD.to(compute)
    return _Tiles(states_MD, weight_VD, scaled_V, 1.0 if exact else before, after, support), before


def _check_within(logit_M: Tensor, support: SupportPairs | None) -> None:
    if support is not None and bool((logit_M <= FAR / 2).any()):
        raise ValueError("a token is outside of the support that it was drawn from")


class _Tiled(torch.autograd.Function):
    """Log-probabilities tile by tile, forward and backward; the arguments are those of `token_logps`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        target_M: Tensor,
        scale: float,
        softcap: float | None,
        temperature: float,
        entropy: Entropy,
        support: SupportPairs | None,
        keep: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        tiles, before = _tiles(hidden_MD, weight_VD, bias_V, scale, softcap, temperature, support)
        kept: list[Tensor] | None = [] if keep else None
        with torch.autocast(hidden_MD.device.type, enabled=False):
            logit_M, lse_M, entropy_M, _ = _reduce(tiles, target_M, entropy != "no", kept=kept)
        _check_within(logit_M, support)
        ctx.tiles, ctx.before, ctx.with_entropy = tiles, before, entropy == "with gradient"
        ctx.dtypes = hidden_MD.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype
        own_entropy_M = entropy_M if ctx.with_entropy else None
        ctx.save_for_backward(weight_VD, target_M, logit_M, lse_M, own_entropy_M, *(kept or ()))
        if entropy_M is not None and entropy == "detached":
            ctx.mark_non_differentiable(entropy_M)
        return logit_M - lse_M, entropy_M

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_logp_M: Tensor, grad_entropy_M: Tensor | None) -> tuple[Tensor | None, ...]:
        weight_VD, target_M, logit_M, lse_M, entropy_M, *kept = ctx.saved_tensors
        tiles: _Tiles = ctx.tiles
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        hidden_MD, wide = tiles.hidden_MD, lse_M.dtype
        d_hidden_MD = torch.zeros(hidden_MD.shape, dtype=wide, device=hidden_MD.device) if wants_hidden else None
        d_weight_VD = torch.empty(weight_VD.shape, dtype=wide, device=weight_VD.device) if wants_weight else None
        d_bias_V = torch.empty(len(weight_VD), dtype=wide, device=weight_VD.device) if wants_bias else None
        slope = 1.0 if tiles.after is None else tiles.after
        # Without entropies, a token's share of the gradient is one factor on all its words, so it multiplies the
        # token's state.
        share_M = grad_logp_M * -slope if not ctx.with_entropy else torch.full_like(lse_M, -slope)
        shared_MD = (hidden_MD * (share_M * tiles.times)[:, None]).to(hidden_MD.dtype)
        for tile, (tokens, words) in enumerate(tiles.shapes()):
            share_m, shared_mD, factor_m1 = share_M[tokens], shared_MD[tokens], None
            if kept:  # probabilities up to a factor of each token, which multiplies the smaller factors of the products
                grad, top_m = kept[2 * tile : 2 * tile + 2]
                factor_m1 = (top_m - lse_M[tokens]).exp_()[:, None]
                share_m, shared_mD = share_m * factor_m1[:, 0], (shared_mD * factor_m1).to(hidden_MD.dtype)
            else:
                grad, bent = tiles.logits(tokens, words)
                grad.sub_(lse_M[tokens, None])
                if ctx.with_entropy:
                    assert grad_entropy_M is not None  # zeros where nothing depends on it
                    factor = (grad + entropy_M[tokens, None]).mul_(grad_entropy_M[tokens, None])
                    grad.exp_().mul_(factor.add_(grad_logp_M[tokens, None]))
                else:
                    grad.exp_()
                if bent is not None:
                    grad.mul_(bent.square_().neg_().add_(1.0))
            low = grad.to(hidden_MD.dtype)
            if d_hidden_MD is not None and factor_m1 is not None:
                d_hidden_MD[tokens].addcmul_(_product(low, weight_VD[words].to(low.dtype)), factor_m1)
            elif d_hidden_MD is not None:
                _add_product(d_hidden_MD[tokens], low, weight_VD[words].to(low.dtype))
            if d_weight_VD is not None:
                _add_product(d_weight_VD[words], low.T, shared_mD, fresh=tokens.start == 0)
            if d_bias_V is not None:
                part = share_m.to(low.dtype) @ low
                d_bias_V[words] = part if tokens.start == 0 else d_bias_V[words] + part
        straight_M = grad_logp_M * slope
        if tiles.after is not None:
            straight_M = straight_M * (1.0 - (logit_M / tiles.after).square())
        if d_hidden_MD is not None:
            d_hidden_MD.mul_(share_M[:, None]).addcmul_(straight_M[:, None], weight_VD[target_M].to(wide))
            d_hidden_MD = d_hidden_MD.mul_(ctx.before).to(ctx.dtypes[0])
        if d_weight_VD is not None:
            d_weight_VD.index_add_(0, target_M, hidden_MD * (straight_M * tiles.times)[:, None])
            d_weight_VD = d_weight_VD.to(ctx.dtypes[1])
        if d_bias_V is not None:
            d_bias_V = d_bias_V.index_add_(0, target_M, straight_M).mul_(ctx.before).to(ctx.dtypes[2])
        return d_hidden_MD, d_weight_VD, d_bias_V, None, None, None, None, None, None, None


def _reduce(
    tiles: _Tiles,
    target_M: Tensor,
    with_entropy: bool,
    with_squares: bool = False,
    kept: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Computes the targets' logits, the log-sum-exps, the entropies, and the sums of squared probabilities.

    Each tile's exponentials and maxima go to `kept`.
    """
    assert kept is None or not with_squares, "squares are taken in place"
    logit_M = torch.zeros(len(target_M), dtype=_wide(tiles.hidden_MD.dtype), device=target_M.device)
    # Running maximum, sum of exp(z - maximum), sum of exp(z - maximum) (z - maximum), sum of exp(2 (z - maximum))
    top_M, sum_M, moment_M = torch.full_like(logit_M, FAR), torch.zeros_like(logit_M), torch.zeros_like(logit_M)
    square_M = torch.zeros_like(logit_M)
    for tokens, words in tiles.shapes():
        logits = tiles.logits(tokens, words)[0]
        column_m = target_M[tokens] - words.start
        mine_m = (column_m >= 0) & (column_m < logits.shape[1])
        found_m = logits.gather(1, column_m.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
        logit_M[tokens] = torch.where(mine_m, found_m, logit_M[tokens])
        top_m = torch.maximum(top_M[tokens], logits.amax(-1))
        lower_m = top_M[tokens] - top_m
        shrink_m = lower_m.exp()
        logits.sub_(top_m[:, None])
        weights = logits.exp() if with_entropy else logits.exp_()
        if kept is not None:
            kept += [weights, top_m]
        if with_entropy:
            before_m = shrink_m * (moment_M[tokens] + lower_m * sum_M[tokens])
            moment_M[tokens] = before_m + logits.mul_(weights).sum(-1)
        sum_M[tokens] = shrink_m * sum_M[tokens] + weights.sum(-1)
        if with_squares:
            square_M[tokens] = shrink_m.square() * square_M[tokens] + weights.square_().sum(-1)
        top_M[tokens] = top_m
    entropy_M = sum_M.log() - moment_M / sum_M if with_entropy else None
    return logit_M, top_M + sum_M.log(), entropy_M, square_M / sum_M.square() if with_squares else None


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(torch.float32, dtype)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Computes ``a @ b`` in float32 at least, whatever the precision of the factors."""
    if a.is_cuda and a.dtype != _wide(a.dtype):
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).to(_wide(a.dtype))


def _add_product(to: Tensor, a: Tensor, b: Tensor, *, fresh: bool = False) -> None:
    """Adds ``a @ b`` to `to`, or writes it there."""
    if a.dtype == to.dtype:
        to.addmm_(a, b, beta=0.0 if fresh else 1.0)
    elif fresh:
        to.copy_(_product(a, b))
    else:
        to.add_(_product(a, b))
