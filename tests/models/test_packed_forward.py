"""Packed sequences give what the plain Hugging Face model gives for each of them, in a padded batch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from hybridflow.batch import Batch
from hybridflow.models import softcap
from hybridflow.models.attention import ATTENTION, PackedLayout
from hybridflow.models.forward import score_tokens, trunk

from tiny import HEADS, KINDS, VOCAB, group_batch, packed_model, plain_model, ragged_batch

LENGTHS = [7, 3, 60, 1, 12, 12, 33, 2]


def padded_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """``[M, V]`` logits that predict the scored tokens, by Hugging Face's own attention on a padded batch."""
    ids_BL = batch.to_padded("input_ids_T")
    mask_BL = torch.arange(ids_BL.shape[1])[None] < batch.lengths()[:, None]
    logits_BLV = model(input_ids=ids_BL, attention_mask=mask_BL.long()).logits
    logits_TV = logits_BLV[mask_BL]
    return logits_TV[batch["loss_mask_T"].nonzero()[:, 0] - 1]


def packed_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    layout = PackedLayout(batch.lengths())
    index_M = batch["loss_mask_T"].nonzero()[:, 0]
    return model(
        input_ids=batch["input_ids_T"][None],
        position_ids=layout.position_ids,
        use_cache=False,
        logits_to_keep=index_M - 1,
        layout=layout,
    ).logits[0]


def repacked(model: PreTrainedModel) -> PreTrainedModel:
    model = copy.deepcopy(model)
    model.set_attn_implementation(ATTENTION)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_equal_the_padded_model(kind: str) -> None:
    plain, batch = plain_model(kind), ragged_batch(LENGTHS)
    packed = repacked(plain)
    plain.set_attn_implementation("eager")  # SDPA would leave out Gemma's soft-cap
    expected, found = padded_logits(plain, batch), packed_logits(packed, batch)
    assert expected.abs().max() > 1  # there is something to compare
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)) / len(expected)
    for logits in (expected, found):
        (logits * direction).sum().backward()
    for (name, a), b in zip(plain.named_parameters(), packed.parameters()):
        assert a.grad is not None and a.grad.abs().max() > 0, name
        torch.testing.assert_close(b.grad, a.grad, atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_scores_are_those_of_the_padded_logits(kind: str, temperature: float) -> None:
    plain, batch = plain_model(kind), ragged_batch(LENGTHS)
    plain.set_attn_implementation("eager")
    logp_MV = (padded_logits(plain, batch) / temperature).log_softmax(-1)
    index_M = batch["loss_mask_T"].nonzero()[:, 0]
    scores = score_tokens(repacked(plain), batch, temperature=temperature, entropy="detached")
    assert torch.equal(scores.index_M, index_M)
    expected = logp_MV[torch.arange(len(index_M)), batch["input_ids_T"][index_M]]
    torch.testing.assert_close(scores.logp_M, expected, atol=1e-5, rtol=0)
    assert scores.entropy_M is not None and not scores.entropy_M.requires_grad
    entropy_M = torch.distributions.Categorical(logits=logp_MV).entropy()
    torch.testing.assert_close(scores.entropy_M, entropy_M, atol=1e-5, rtol=0)


@settings(max_examples=15)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_the_order_of_packing_does_not_matter(lengths: list[int], random: object) -> None:
    model, batch = packed_model(dtype=torch.float64), ragged_batch(lengths)
    order = list(range(len(lengths)))
    random.shuffle(order)  # type: ignore[attr-defined]
    batch["logp_T"] = torch.zeros(batch.total(), dtype=torch.float64)
    shuffled = batch.take(order)
    with torch.no_grad():
        for b in (batch, shuffled):
            scores = score_tokens(model, b, temperature=1.0, entropy="no")
            b["logp_T"][scores.index_M] = scores.logp_M
    torch.testing.assert_close(shuffled["logp_T"], batch.take(order)["logp_T"], atol=1e-12, rtol=0)


def test_a_sequence_sees_nothing_of_its_neighbours() -> None:
    model, batch = packed_model(dtype=torch.float64), ragged_batch(LENGTHS)
    other = batch.select(list(batch))
    changed_T = batch.sequence_of() != 2
    other["input_ids_T"] = torch.where(changed_T, (batch["input_ids_T"] + 1) % VOCAB, batch["input_ids_T"])
    with torch.no_grad():
        a, b = (score_tokens(model, x, temperature=1.0, entropy="no").logp_M for x in (batch, other))
    kept_M = ~changed_T[batch["loss_mask_T"]]
    torch.testing.assert_close(a[kept_M], b[kept_M], atol=1e-12, rtol=0)
    assert (a[~kept_M] - b[~kept_M]).abs().max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_answers_that_share_their_prompt_score_as_if_they_did_not(kind: str) -> None:
    """Scores and gradients are the same, and every prompt goes through the model once."""
    model, batch = packed_model(kind, dtype=torch.float64), group_batch().take([5, 0, 11, 2, 7, 1, 4, 3, 9, 6, 8, 10])
    apart = batch.select([n for n in batch if n != "group_B"])
    found = []
    for b in (batch, apart):
        seen: list[int] = []
        hook = trunk(model).register_forward_pre_hook(
            lambda _module, _args, kwargs, seen=seen: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
        )
        scores = score_tokens(model, b, temperature=0.8, entropy="with gradient")
        hook.remove()
        assert scores.entropy_M is not None
        model.zero_grad()
        (scores.logp_M * scores.entropy_M).sum().backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        found.append((sum(seen), [scores.logp_M.detach(), scores.entropy_M.detach(), *gradients]))
    (tokens, shared), (tokens_apart, unshared) = found
    # Two scored answers of each group share the 6, 9 and 1 tokens of their prompt.
    assert tokens_apart == batch.total() and tokens == batch.total() - (6 + 9 + 1)
    for a, b in zip(shared, unshared):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def test_sequences_share_what_is_the_same_not_what_is_as_long() -> None:
    """In a group whose prompts have equal lengths, each goes through the model once, and no score changes."""
    batch = group_batch((6, 6), answers=8)
    starts = batch.offsets["T"][:-1]
    batch["input_ids_T"][starts[[3, 4, 5]] + 2] += VOCAB // 2  # of these three the same other prompt
    batch["input_ids_T"] %= VOCAB
    batch["input_ids_T"][int(starts[6]) : int(starts[6]) + 6] = batch["input_ids_T"][:6].flip(0)  # of this one alone
    model, apart = packed_model(dtype=torch.float64), batch.select([n for n in batch if n != "group_B"])
    seen: list[int] = []
    hook = trunk(model).register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    with torch.no_grad():
        found, plain = (score_tokens(model, b, temperature=1.0, entropy="no").logp_M for b in (batch, apart))
    hook.remove()
    torch.testing.assert_close(found, plain, atol=1e-10, rtol=0)
    # Of the first group 0 and 7 begin alike, and 3, 4, 5; of the other six; two of each have no beginning.
    assert seen == [batch.total() - 6 * (1 + 2 + 5), batch.total()]


class Types(TorchDispatchMode):
    """Sees the type of every result that has a fraction."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[torch.dtype, str] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor) and x.is_floating_point():
                self.seen[x.dtype] = str(func)
        return out


@pytest.mark.parametrize("kind", KINDS | HEADS)
def test_in_float64_nothing_is_rounded_to_less(kind: str) -> None:
    """What every test rests on that holds two ways of computing to 1e-10: rounding differs between processors."""
    model, batch = packed_model(kind, dtype=torch.float64), ragged_batch()
    with Types() as types:
        scores = score_tokens(model, batch, temperature=0.8, entropy="with gradient")
        assert scores.entropy_M is not None
        (scores.logp_M * scores.entropy_M).sum().backward()
    assert types.seen.keys() == {torch.float64}, types.seen


@pytest.mark.parametrize("window", [None, 5, 40])
def test_soft_capped_attention_is_the_same_in_pieces(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long sequences are computed a few queries at a time, and again in the backward pass."""
    rng = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, heads, 70, size, generator=rng).requires_grad_() for heads, size in ((4, 8), (2, 8), (2, 6))
    )
    scores = 3.0 * torch.tanh((q * 0.4) @ k.repeat_interleave(2, 1).transpose(-1, -2) / 3.0)
    steps = torch.arange(70)
    seen = (steps[None] <= steps[:, None]) & (steps[None] > steps[:, None] - (window or 70))
    expected = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v.repeat_interleave(2, 1)
    direction = torch.randn(expected.shape, generator=rng)
    wanted = torch.autograd.grad((expected * direction).sum(), (q, k, v))
    for piece in (2**22, 1):  # at once, and by 16 queries
        monkeypatch.setattr(softcap, "PIECE", piece)
        found = softcap.softcapped_attention(q, k, v, scale=0.4, softcap=3.0, window=window)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        gradients = torch.autograd.grad((found * direction).sum(), (q, k, v))
        for a, b in zip(gradients, wanted):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_a_first_token_with_loss_is_refused() -> None:
    batch = ragged_batch([4, 5])
    batch["loss_mask_T"][4] = True
    with pytest.raises(ValueError, match="first token of a sequence"):
        score_tokens(packed_model(), batch, temperature=1.0, entropy="no")


@pytest.mark.parametrize(
    ("model_dtype", "score_dtype"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_scores_are_at_least_float32(model_dtype: torch.dtype, score_dtype: torch.dtype) -> None:
    scores = score_tokens(packed_model(dtype=model_dtype), ragged_batch(), temperature=0.9, entropy="with gradient")
    assert scores.entropy_M is not None
    assert scores.logp_M.dtype == scores.entropy_M.dtype == score_dtype
