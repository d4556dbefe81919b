"""Log-probabilities and entropies without all logits: values and gradients are those of `log_softmax`."""

from __future__ import annotations

import copy
import itertools
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hybridflow.batch import Batch
from hybridflow.config.sections.model import LoraSection
from hybridflow.models import log_probs
from hybridflow.models.forward import score_tokens
from hybridflow.models.head import Head, output_head
from hybridflow.models.log_probs import Entropy, SupportPairs, token_logps, token_moments
from hybridflow.models.lora import add_lora

from tiny import KINDS, VOCAB, in_double, packed_model, ragged_batch

ENTROPY = "with gradient"
M, D, V = 23, 12, 3001  # tiles of 2^12 logits: 1,024 words by 4 tokens, the last ones smaller


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_probs, "SMALL", 0)
    monkeypatch.setattr(log_probs, "SMALL_VOCABULARY", 0)
    monkeypatch.setattr(log_probs, "TILE_CPU", 2**12)
    monkeypatch.setattr(log_probs, "KEPT_CPU", 0)


HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "soft-cap": {"softcap": 4.0},
    "soft-cap and bias": {"softcap": 4.0, "bias": True},
    "scale": {"scale": 0.25, "bias": True},
    "scale and soft-cap": {"scale": 0.5, "softcap": 2.0},
}


def make(
    dtype: torch.dtype, *, bias: bool = False, scale: float = 1.0, softcap: float | None = None, words: int = V
) -> tuple[Tensor, Head, Tensor]:
    rng = torch.Generator().manual_seed(0)
    hidden_MD = torch.randn(M, D, generator=rng, dtype=dtype).requires_grad_()
    layer = torch.nn.Linear(D, words, bias=bias, dtype=dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng, dtype=dtype))
    return hidden_MD, Head(layer, scale, softcap), torch.randint(words, (M,), generator=rng)


def written_out(
    hidden_MD: Tensor, head: Head, target_M: Tensor, temperature: float, keep_MV: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The definition: softmax over all logits, or over those that are kept."""
    logits_MV = head.scale * head.layer(hidden_MD)
    if head.softcap is not None:
        logits_MV = head.softcap * torch.tanh(logits_MV / head.softcap)
    logits_MV = logits_MV / temperature
    if keep_MV is not None:
        logits_MV = logits_MV.masked_fill(~keep_MV, -torch.inf)
    logp_MV = torch.log_softmax(logits_MV, -1)
    plogp_MV = logp_MV.exp() * logp_MV.masked_fill(torch.isinf(logp_MV), 0.0)
    return logp_MV.gather(-1, target_M[:, None])[:, 0], -plogp_MV.sum(-1)


def gradients(head: Head, hidden_MD: Tensor, logp_M: Tensor, entropy_M: Tensor | None) -> list[Tensor]:
    """Of a loss with another weight on every token's log-probability and entropy."""
    rng = torch.Generator().manual_seed(3)
    loss = (logp_M * torch.randn(M, generator=rng)).sum()
    weight_M = torch.randn(M, generator=rng)
    if entropy_M is not None:
        loss = loss + (entropy_M * weight_M).sum()
    return list(torch.autograd.grad(loss, [hidden_MD, *head.layer.parameters()]))


def assert_as_near(found: Tensor, plain: Tensor, exact: Tensor) -> None:
    """Ours is about as near to float64 as the definition is in float32, or within a few roundings of the largest.

    How near that is depends on the order of sums, which is a processor's own. A mistake is thousands of times further.
    """
    assert found.dtype == plain.dtype == torch.float32
    rounding = torch.finfo(torch.float32).eps * float(exact.detach().abs().max())
    near = max(float((plain - exact).abs().max()), 4 * rounding)
    assert float((found - exact).abs().max()) <= 4 * near


@pytest.mark.parametrize(
    ("entropy", "kept"),
    [("no", 0), ("no", 2**26), ("detached", 0), ("detached", 2**26), ("with gradient", 0), ("with gradient", 2**26)],
)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_are_those_of_log_softmax(
    dtype: torch.dtype, kind: str, temperature: float, entropy: Entropy, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_probs, "KEPT_CPU", kept)
    hidden_MD, head, target_M = make(dtype, **HEADS[kind])
    learns = entropy == "with gradient"

    def sides(logp_M: Tensor, entropy_M: Tensor | None, hidden_MD: Tensor, head: Head) -> list[Tensor]:
        own = [logp_M] if entropy_M is None else [logp_M, entropy_M]
        return own + gradients(head, hidden_MD, logp_M, entropy_M if learns else None)

    def defined(hidden_MD: Tensor, head: Head) -> list[Tensor]:
        logp_M, entropy_M = written_out(hidden_MD, head, target_M, temperature)
        return sides(logp_M, None if entropy == "no" else entropy_M, hidden_MD, head)

    logp_M, entropy_M = token_logps(hidden_MD, head, target_M, temperature=temperature, entropy=entropy)
    assert (entropy_M is None) == (entropy == "no") and (entropy_M is None or entropy_M.requires_grad == learns)
    found, plain = sides(logp_M, entropy_M, hidden_MD, head), defined(hidden_MD, head)
    if dtype == torch.float64:
        for a, b in zip(found, plain, strict=True):
            torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)
        return
    exact = defined(
        hidden_MD.detach().double().requires_grad_(), replace(head, layer=copy.deepcopy(head.layer).double())
    )
    for a, b, c in zip(found, plain, exact, strict=True):
        assert_as_near(a, b, c)


@pytest.mark.parametrize("path", ["tiles", "at once", "in turns"])
@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("kind", HEADS)
def test_sums_of_squared_probabilities_are_those_of_the_softmax(
    kind: str, limited: bool, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden_MD, head, target_M = make(torch.float64, **HEADS[kind])
    keep_MV = torch.rand(M, V, generator=torch.Generator().manual_seed(5)) < 0.01
    keep_MV[torch.arange(M), target_M] = True
    size_M = keep_MV.sum(-1)
    keep_MV[7], size_M[7] = True, 0  # the whole vocabulary
    ids = torch.cat([keep_MV[m].nonzero()[:, 0] for m in range(M) if size_M[m]])
    support = SupportPairs.of(size_M, ids) if limited else None
    keep_MV = keep_MV if limited else torch.ones_like(keep_MV)
    logits_MV = head.scale * head.layer(hidden_MD)
    if head.softcap is not None:
        logits_MV = head.softcap * torch.tanh(logits_MV / head.softcap)
    p_MV = torch.softmax((logits_MV / 0.7).masked_fill(~keep_MV, -torch.inf), -1)
    if path == "at once":
        monkeypatch.setattr(log_probs, "SMALL", 2**30)
    if path == "in turns":

        class Wrapped(torch.nn.Linear):
            """Any other output layer than a plain one, such as one with adapters."""

        head.layer.__class__ = Wrapped
    found = token_moments(hidden_MD, head, target_M, temperature=0.7, support=support)
    expected_M, entropy_M = written_out(hidden_MD, head, target_M, 0.7, keep_MV)
    for a, b in zip(found, (expected_M, entropy_M, p_MV.square().sum(-1)), strict=True):
        assert not a.requires_grad
        torch.testing.assert_close(a, b.detach(), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_backward_pass_is_the_derivative(softcap: float | None) -> None:
    words, few = 1030, 9  # numerical derivatives take a pass for each number: of few weights here
    hidden_MD, head, target_M = make(torch.float64, bias=True, softcap=softcap, words=words)
    rest_VD, bias_V = head.layer.weight[few:].detach(), head.layer.bias.detach()

    def scores(hidden_MD: Tensor, few_VD: Tensor) -> tuple[Tensor, Tensor]:
        weight_VD = torch.cat([few_VD, rest_VD])
        return log_probs._Tiled.apply(
            hidden_MD, weight_VD, bias_V, target_M[:3] % few, 0.7, softcap, 0.8, ENTROPY, None
        )

    arguments = hidden_MD[:3].detach().requires_grad_(), head.layer.weight[:few].detach().requires_grad_()
    assert torch.autograd.gradcheck(scores, arguments)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize(("way", "entropy"), [("at once", ENTROPY), ("again", ENTROPY), ("kept", "detached")])
def test_a_support_is_the_whole_vocabulary_of_its_token(
    kind: str, way: str, entropy: Entropy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes of 0 stand for no support; the softmax, its gradients and the entropy are those of the kept words."""
    monkeypatch.setattr(log_probs, "SMALL", 2**30 if way == "at once" else 0)
    monkeypatch.setattr(log_probs, "KEPT_CPU", 2**26 if way == "kept" else 0)
    hidden_MD, head, target_M = make(torch.float64, **HEADS[kind])
    rng = torch.Generator().manual_seed(5)
    keep_MV = torch.rand(M, V, generator=rng) < 0.003
    keep_MV[torch.arange(M), target_M] = True
    keep_MV[3] = keep_MV[9] = True
    keep_MV[4] = torch.arange(V) == target_M[4]  # nothing else was possible
    size_M = keep_MV.sum(-1)
    size_M[[3, 9]] = 0
    ids = torch.cat([keep_MV[m].nonzero()[:, 0] for m in range(M) if size_M[m]])
    support = SupportPairs.of(size_M, ids)
    logp_M, entropy_M = token_logps(hidden_MD, head, target_M, temperature=0.7, entropy=entropy, support=support)
    expected_M, expected_entropy_M = written_out(hidden_MD, head, target_M, 0.7, keep_MV)
    torch.testing.assert_close(logp_M, expected_M, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(entropy_M, expected_entropy_M, atol=1e-10, rtol=1e-10)
    assert logp_M[4] == 0.0
    learns = entropy == "with gradient"
    found = gradients(head, hidden_MD, logp_M, entropy_M if learns else None)
    wanted = gradients(head, hidden_MD, expected_M, expected_entropy_M if learns else None)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def test_supports_travel_with_their_tokens_through_a_batch() -> None:
    """Columns ``support_size_T`` and ``support_ids_K``: whatever is taken, each token keeps its own words."""
    model, batch = packed_model(), ragged_batch()
    rng = torch.Generator().manual_seed(1)
    keep_TV = torch.rand(batch.total(), VOCAB, generator=rng) < 0.2
    keep_TV[torch.arange(batch.total()), batch["input_ids_T"]] = True
    whole_T = torch.rand(batch.total(), generator=rng) < 0.3
    size_T = torch.where(whole_T, 0, keep_TV.sum(-1))
    cuts = batch.offsets["T"].tolist()
    words = [keep_V.nonzero()[:, 0] if size else keep_V.nonzero()[:0, 0] for keep_V, size in zip(keep_TV, size_T)]
    rows: dict[str, list[Any]] = {name: batch.rows(name) for name in batch}
    rows["support_size_T"] = list(size_T.split(batch.lengths().tolist()))
    rows["support_ids_K"] = [torch.cat(words[a:b]) for a, b in itertools.pairwise(cuts)]
    supported = Batch.from_rows(rows)

    plain = copy.deepcopy(model)
    plain.set_attn_implementation("eager")
    with torch.no_grad():
        logits_TV = torch.cat([plain(input_ids=ids[None]).logits[0] for ids in batch.rows("input_ids_T")])
    logits_TV = logits_TV.roll(1, dims=0).masked_fill(~(keep_TV | whole_T[:, None]), -torch.inf)
    supported["expected_T"] = logits_TV.log_softmax(-1)[torch.arange(batch.total()), batch["input_ids_T"]]
    for order in (range(6), (5, 0, 3), (2, 2, 4, 1)):
        part = supported.take(list(order))
        found = score_tokens(model, part, temperature=1.0, entropy="no")
        torch.testing.assert_close(found.logp_M, part["expected_T"][found.index_M], atol=1e-5, rtol=0)


def test_a_token_outside_of_its_support_is_an_error() -> None:
    hidden_MD, head, target_M = make(torch.float32)
    size_M = torch.zeros(M, dtype=torch.int64)
    size_M[7] = 2
    ids = (target_M[7] + torch.tensor([1, 2])) % V
    with pytest.raises(ValueError, match="outside of the support"):
        token_logps(hidden_MD, head, target_M, support=SupportPairs.of(size_M, ids))


@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_every_family_are_the_same_in_tiles_and_at_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tied heads, Gemma's soft-cap; weights' gradients too."""
    found = []
    for small in (0, 2**30):
        monkeypatch.setattr(log_probs, "SMALL", small)
        model = packed_model(kind, dtype=torch.float64)
        scores = score_tokens(model, ragged_batch(), temperature=0.8, entropy="with gradient")
        assert scores.entropy_M is not None
        (scores.logp_M * scores.entropy_M).sum().backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        found.append([scores.logp_M, scores.entropy_M, *gradients])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def test_an_output_layer_with_adapters_learns_through_them() -> None:
    found = []
    for small in (0, 2**30):
        log_probs.SMALL = small  # the fixture puts it back
        lora = LoraSection(rank=2, target_modules=["q_proj", "lm_head"])
        model = in_double(add_lora(packed_model("llama"), lora, seed=0))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(0.05)
        assert type(output_head(model).layer) is not torch.nn.Linear
        scores = score_tokens(model, ragged_batch(), temperature=0.8, entropy="with gradient")
        assert scores.entropy_M is not None
        (scores.logp_M * scores.entropy_M).sum().backward()
        trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        assert any("lm_head" in n and g is not None and g.abs().max() > 1e-4 for n, g in trained.items())
        found.append([scores.logp_M, scores.entropy_M, *trained.values()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def test_frozen_weights_get_no_gradient_and_none_is_made() -> None:
    hidden_MD, head, target_M = make(torch.float32)
    head.layer.requires_grad_(False)
    logp_M, _ = token_logps(hidden_MD, head, target_M)
    logp_M.sum().backward()
    assert hidden_MD.grad is not None and head.layer.weight.grad is None


MEMORY = """
import torch
from hybridflow.models.head import Head
from hybridflow.models.log_probs import token_logps

def resident(key):
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(key))

torch.manual_seed(0)
words, size, tokens = 151_936, 16, 1_024
layer = torch.nn.Linear(size, words, bias=False)
layer.weight.grad = torch.zeros_like(layer.weight)
hidden = torch.randn(tokens, size, requires_grad=True)
target = torch.randint(words, (tokens,))
with open("/proc/self/clear_refs", "w") as f:
    f.write("5")
before = resident("VmRSS")
logp, entropy = token_logps(hidden, Head(layer), target, temperature=0.9, entropy="with gradient")
(logp.sum() + entropy.sum()).backward()
print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_1024_tokens_of_a_vocabulary_of_152_thousand_take_less_than_200_mb() -> None:
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 200
