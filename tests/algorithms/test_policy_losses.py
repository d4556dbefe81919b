"""Every policy loss: published numbers, references written from the papers in plain floats, and the edges."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hybridflow.algorithms.advantage.grpo import grpo
from hybridflow.algorithms.aggregation import token_weights
from hybridflow.algorithms.policy_loss.registry import POLICY_LOSSES

from golden import golden_batch

# --- numbers that another implementation gave ---


@pytest.mark.parametrize(
    ("name", "mode", "values", "loss"),
    [
        ("reinforce", "token-mean", {}, -0.0913798),
        ("gspo", "token-mean", {}, 0.1775656),
        ("gspo", "seq-mean-token-mean", {}, 0.00864),
        ("gspo_token", "token-mean", {}, 0.1775656),
        ("gspo_token", "seq-mean-token-mean", {}, 0.00864),
        ("gmpo", "seq-mean-token-mean", {}, 0.0481262),
        ("sapo", "seq-mean-token-mean", {}, -0.0386975),
        ("sapo", "token-mean", {}, 0.2966),
        ("cispo", "token-mean", {}, -0.0992209),
        ("dppo_tv", "token-mean", {}, -0.1299137),
        ("dppo_kl", "token-mean", {}, -0.1299137),
        ("dro", "token-mean", {"dro_beta": 0.1}, -0.0864936),
    ],
)
def test_golden_numbers(name: str, mode: str, values: dict[str, float], loss: float) -> None:
    batch = golden_batch()
    sequence_T = batch.sequence_of()
    advantage_T = grpo(batch["reward_B"], batch["group_B"])[sequence_T]
    columns = {"logp_M": batch["new_T"], "old_logp_M": batch["old_T"], "advantage_M": advantage_T}
    mask_T = batch["loss_mask_T"]  # a loss sees scored tokens alone
    loss_M, metrics = call(name, {k: v[mask_T] for k, v in {**columns, "sequence_M": sequence_T}.items()}, values)
    weight_M = token_weights(batch, mode, norm=4)[mask_T]
    digits = len(str(loss).split(".")[1])
    assert float((loss_M * weight_M).sum()) == pytest.approx(loss, abs=max(0.6 * 10**-digits, 5e-7))
    assert float(metrics["ppo_kl"].mean()) == pytest.approx(-0.047692, abs=5e-7)


# --- references ---


@dataclass(frozen=True)
class Token:
    """One scored token of a sequence, with the weight that the engine gives to its loss."""

    logp: float
    old: float
    rollout: float
    advantage: float
    column: float  # cov_keep or cov_penalty
    weight: float

    @property
    def change(self) -> float:
        return self.logp - self.old


Result = tuple[list[float], list[float]]  # losses, and the gradient of their weighted sum by the log-probabilities
Reference = Callable[..., Result]


def clear_of(x: float, *kinks: float) -> float:
    """The same number, of an example where no kink is so near that rounding decides about its side."""
    for kink in kinks:
        assume(abs(x - kink) > 1e-6)
    return x


def bounded(x: float) -> tuple[float, float]:
    """exp(x) with x within 20, and its derivative."""
    ratio = math.exp(max(-20.0, min(20.0, clear_of(x, -20.0, 20.0))))
    return ratio, ratio if abs(x) < 20 else 0.0


def per_token(loss: Callable[..., tuple[float, float]]) -> Reference:
    """The reference of a whole sequence from that of a token."""

    def reference(sequence: list[Token], **values: float) -> Result:
        pairs = [loss(t, **values) for t in sequence]
        return [value for value, _ in pairs], [t.weight * slope for t, (_, slope) in zip(sequence, pairs)]

    return reference


def surrogate(ratio: float, slope: float, advantage: float, low: float, high: float) -> tuple[float, float]:
    clear_of(ratio, 1 - low, 1 + high)
    clipped = max(1 - low, min(1 + high, ratio))
    flows = ratio < 1 + high if advantage >= 0 else ratio > 1 - low
    return -min(advantage * ratio, advantage * clipped), -advantage * slope if flows else 0.0


@per_token
def reinforce(t: Token) -> tuple[float, float]:
    return -t.advantage * t.logp, -t.advantage


def ppo(t: Token, clip_low: float, clip_high: float, clip_dual: float | None = None) -> tuple[float, float]:
    loss, slope = surrogate(*bounded(t.change), t.advantage, clip_low, clip_high)
    if clip_dual is not None and t.advantage < 0 and loss > -t.advantage * clear_of(clip_dual, bounded(t.change)[0]):
        return -t.advantage * clip_dual, 0.0
    return loss, slope


@per_token
def clip_cov(t: Token, clip_low: float, clip_high: float) -> tuple[float, float]:
    loss, slope = ppo(t, clip_low, clip_high)
    return t.column * loss, t.column * slope


@per_token
def kl_cov(t: Token, kl_cov_coef: float) -> tuple[float, float]:
    assume(t.change == 0 or abs(t.change) > 1e-4)  # smaller ones may be rounding: they have no gradient
    ratio, slope = bounded(t.change)
    sign = (t.change > 0) - (t.change < 0)
    penalty = kl_cov_coef * t.column
    return -t.advantage * ratio + penalty * abs(t.change), -t.advantage * slope + penalty * sign


@per_token
def decoupled_ppo(t: Token, behaviour_cap: float | None, **values: Any) -> tuple[float, float]:
    weight, _ = bounded(t.old - t.rollout)
    if behaviour_cap is not None and clear_of(weight, behaviour_cap) > behaviour_cap:
        weight = 0.0
    loss, slope = ppo(t, **values)
    return weight * loss, weight * slope


@per_token
def sapo(t: Token, tau_positive: float, tau_negative: float) -> tuple[float, float]:
    tau = tau_positive if t.advantage > 0 else tau_negative
    ratio, slope = bounded(t.change)
    x = min(tau * (ratio - 1), 500.0)
    gate = 1 / (1 + math.exp(-x))
    return -t.advantage * gate * 4 / tau, -t.advantage * 4 * gate * slope / (1 + math.exp(x))


@per_token
def cispo(t: Token, clip_low: float, clip_high: float) -> tuple[float, float]:
    weight = max(1 - clip_low, min(1 + clip_high, bounded(t.change)[0]))
    return -weight * t.advantage * t.logp, -weight * t.advantage


def dppo(t: Token, apart: float, low: float, high: float, cap: float) -> tuple[float, float]:
    outwards, bound = (t.change > 0, high) if t.advantage > 0 else (t.change < 0, low)
    keep = not (outwards and clear_of(apart, bound) > bound)
    slope = -t.advantage * min(bounded(t.change)[0], cap) * keep
    return slope * t.logp, slope


@per_token
def dppo_tv(t: Token, divergence_low: float, divergence_high: float, ratio_cap: float) -> tuple[float, float]:
    return dppo(t, abs(math.exp(t.logp) - math.exp(t.old)), divergence_low, divergence_high, ratio_cap)


@per_token
def dppo_kl(t: Token, divergence_low: float, divergence_high: float, ratio_cap: float) -> tuple[float, float]:
    p, q = math.exp(t.logp), math.exp(t.old)
    apart = q * (t.old - t.logp) + (1 - q) * math.log((1 - q) / (1 - p))
    return dppo(t, apart, divergence_low, divergence_high, ratio_cap)


@per_token
def dro(t: Token, dro_beta: float) -> tuple[float, float]:
    return -(t.advantage * t.logp - dro_beta / 2 * t.change**2), -t.advantage + dro_beta * t.change


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def whole(sequence: list[Token], loss: float, slopes: list[float]) -> Result:
    """One loss for all tokens, which reaches every log-probability as often as it is counted."""
    weight = math.fsum(t.weight for t in sequence)
    return [loss] * len(sequence), [weight * slope for slope in slopes]


def gspo(sequence: list[Token], clip_low: float, clip_high: float) -> Result:
    ratio, slope = bounded(mean([t.change for t in sequence]))
    loss, slope = surrogate(ratio, slope, clear_of(mean([t.advantage for t in sequence]), 0), clip_low, clip_high)
    return whole(sequence, loss, [slope / len(sequence)] * len(sequence))


def gspo_token(sequence: list[Token], clip_low: float, clip_high: float) -> Result:
    ratio, _ = bounded(mean([t.change for t in sequence]))
    pairs = [surrogate(ratio, ratio, t.advantage, clip_low, clip_high) for t in sequence]
    return [loss for loss, _ in pairs], [t.weight * slope for t, (_, slope) in zip(sequence, pairs)]


def gmpo(sequence: list[Token], clip_low: float, clip_high: float) -> Result:
    advantage = clear_of(mean([t.advantage for t in sequence]), 0)
    cut = [
        min(clear_of(t.change, clip_high), clip_high)
        if advantage > 0
        else max(clear_of(t.change, -clip_low), -clip_low)
        for t in sequence
    ]
    ratio, slope = bounded(mean(cut))
    free = [c == t.change for c, t in zip(cut, sequence)]
    return whole(sequence, -advantage * ratio, [-advantage * slope / len(sequence) * f for f in free])


def topr(sequence: list[Token], topr_cap: float) -> Result:
    ratio = min(math.exp(math.fsum(t.change for t in sequence)), topr_cap)
    slopes = [-t.advantage * (ratio if t.advantage < 0 else 1.0) for t in sequence]
    return [s * t.logp for s, t in zip(slopes, sequence)], [t.weight * s for s, t in zip(slopes, sequence)]


def sppo(sequence: list[Token], sppo_eta: float) -> Result:
    gap = math.fsum(t.change for t in sequence) - sppo_eta * mean([t.advantage for t in sequence])
    return whole(sequence, gap**2, [2 * gap] * len(sequence))


clips = {"clip_low": st.floats(0.05, 0.9), "clip_high": st.floats(0.05, 2)}
dual = st.none() | st.floats(1.1, 5)
divergences = {"divergence_low": st.floats(0.01, 0.5), "divergence_high": st.floats(0.01, 0.5)}
taus = {"tau_positive": st.floats(0.5, 2), "tau_negative": st.floats(0.5, 2)}
REFERENCES: dict[str, tuple[Reference, dict[str, st.SearchStrategy[Any]]]] = {
    "ppo_clip": (per_token(ppo), {**clips, "clip_dual": dual}),
    "reinforce": (reinforce, {}),
    "gspo": (gspo, clips),
    "gspo_token": (gspo_token, clips),
    "gmpo": (gmpo, clips),
    "sapo": (sapo, taus),
    "cispo": (cispo, clips),
    "clip_cov": (clip_cov, clips),
    "kl_cov": (kl_cov, {"kl_cov_coef": st.floats(0, 2)}),
    "dppo_tv": (dppo_tv, {**divergences, "ratio_cap": st.floats(1.1, 30)}),
    "dppo_kl": (dppo_kl, {**divergences, "ratio_cap": st.floats(1.1, 30)}),
    "dro": (dro, {"dro_beta": st.floats(0.01, 2)}),
    "topr": (topr, {"topr_cap": st.floats(0.5, 3)}),
    "decoupled_ppo": (decoupled_ppo, {**clips, "clip_dual": dual, "behaviour_cap": st.none() | st.floats(1.1, 5)}),
    "sppo": (sppo, {"sppo_eta": st.floats(0.1, 10)}),
}


def near(old: float) -> st.SearchStrategy[float]:
    """Log-probabilities, some about as large as the old one and some far from it."""
    return st.floats(max(old - 0.7, -40.0), min(old + 0.7, -1e-3)) | st.floats(-40, -1e-3)


def token(old: float) -> st.SearchStrategy[Token]:
    return st.builds(
        Token,
        logp=near(old),
        old=st.just(old),
        rollout=near(old),
        advantage=st.floats(-3, 3),
        column=st.sampled_from([0.0, 1.0]),
        weight=st.floats(0.1, 2),
    )


sequences = st.lists(st.lists(st.floats(-40, -1e-3).flatmap(token), min_size=1, max_size=5), min_size=1, max_size=4)


def columns_of(batch: list[list[Token]], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    tokens = [t for sequence in batch for t in sequence]
    names = {"logp_M": "logp", "old_logp_M": "old", "rollout_logp_M": "rollout", "advantage_M": "advantage"}
    names |= {"cov_keep_M": "column", "cov_penalty_M": "column", "weight_M": "weight"}
    columns = {name: torch.tensor([getattr(t, field) for t in tokens], dtype=dtype) for name, field in names.items()}
    return {**columns, "sequence_M": torch.tensor([i for i, sequence in enumerate(batch) for _ in sequence])}


def call(name: str, columns: dict[str, Tensor], values: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, given what its signature names."""
    wanted = inspect.signature(POLICY_LOSSES[name]).parameters
    return POLICY_LOSSES[name](**{k: v for k, v in columns.items() if k in wanted}, **values)


def loss_and_gradient(name: str, columns: dict[str, Tensor], values: dict[str, Any]) -> tuple[Tensor, Tensor]:
    logp_M = columns["logp_M"].clone().requires_grad_()
    loss_M, _ = call(name, {**columns, "logp_M": logp_M}, values)
    assert loss_M.dtype == logp_M.dtype and loss_M.shape == logp_M.shape
    (gradient_M,) = torch.autograd.grad((loss_M * columns["weight_M"]).sum(), logp_M)
    return loss_M.detach(), gradient_M


def test_every_loss_has_a_reference() -> None:
    assert REFERENCES.keys() == POLICY_LOSSES.keys()


@pytest.mark.parametrize("name", REFERENCES)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_losses_and_gradients_are_the_papers_in_plain_floats_in_any_company(name: str, data: st.DataObject) -> None:
    reference, strategies = REFERENCES[name]
    batch, values = data.draw(sequences), data.draw(st.fixed_dictionaries(strategies))
    loss_M, gradient_M = loss_and_gradient(name, columns_of(batch), values)
    expected = [reference(sequence, **values) for sequence in batch]
    assert loss_M.tolist() == pytest.approx([x for losses, _ in expected for x in losses], rel=1e-9, abs=1e-9)
    assert gradient_M.tolist() == pytest.approx([x for _, slopes in expected for x in slopes], rel=1e-9, abs=1e-9)
    order = data.draw(st.permutations(range(len(batch))))
    together = loss_and_gradient(name, columns_of([batch[i] for i in order]), values)
    apart = [loss_and_gradient(name, columns_of([batch[i]]), values) for i in order]
    for whole_M, parts in zip(together, zip(*apart)):
        # Elementwise functions round the ends of a vector otherwise than its middle: 1e-15 of the value.
        torch.testing.assert_close(whole_M, torch.cat(parts), rtol=1e-14, atol=1e-300)


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 7])
def test_log_ratios_of_40_leave_loss_gradient_and_diagnostics_finite(name: str, dtype: torch.dtype, size: int) -> None:
    changes = [-40.0, -20.0, -1e-3, 0.0, 1e-3, 20.0, 40.0]
    for advantage in (-1e4, -1.0, 0.0, 1.0, 1e4):
        # In turn: all tokens of a sequence alike, and sequences that have every change.
        rows = [[Token(min(c, 0.0), min(-c, 0.0), -c / 2 - 20, advantage, 1.0, 1.0)] * size for c in changes]
        mixed = [[row[0] for row in rows]]
        columns = columns_of(rows + mixed, dtype)
        loss_M, gradient_M = loss_and_gradient(name, columns, {})
        _, metrics = call(name, columns, {})
        for value in (loss_M, gradient_M, *metrics.values()):
            assert torch.isfinite(value).all()


@pytest.mark.parametrize("name", REFERENCES)
def test_without_advantage_only_the_regularised_losses_move(name: str) -> None:
    batch = [[Token(-1.0, -1.5, -1.2, 0.0, 1.0, 1.0), Token(-2.0, -1.9, -1.9, 0.0, 1.0, 1.0)]]
    _, gradient_M = loss_and_gradient(name, columns_of(batch), {})
    assert bool(gradient_M.any()) == (name in ("kl_cov", "dro", "sppo"))


@pytest.mark.parametrize("name", REFERENCES)
def test_nothing_scored_is_no_error(name: str) -> None:
    columns = columns_of([[Token(-1.0, -1.5, -1.2, 1.0, 1.0, 1.0)]])
    loss_M, _ = loss_and_gradient(name, {k: v[:0] for k, v in columns.items()}, {})
    assert loss_M.tolist() == []


# --- what ties losses together ---


def test_gspo_and_its_token_form_agree_where_an_answer_has_one_advantage() -> None:
    batch = [[Token(-1.0, -1.5, 0, a, 1, 0.3), Token(-2.0, -1.9, 0, a, 1, 0.3)] for a in (1.0, -0.5)]
    for clips in ({}, {"clip_low": 0.9, "clip_high": 2.0}):
        for one, other in zip(*(loss_and_gradient(n, columns_of(batch), clips) for n in ("gspo", "gspo_token"))):
            torch.testing.assert_close(one, other)


def test_on_policy_most_losses_have_the_gradient_of_reinforce() -> None:
    batch = [[Token(p, p, p, a, 1.0, 0.5) for p in (-1.0, -0.2, -3.0)] for a in (1.0, -0.5)]
    _, expected = loss_and_gradient("reinforce", columns_of(batch), {})
    for name in REFERENCES.keys() - {"kl_cov", "sppo"}:  # a penalty's kink, and a squared loss
        torch.testing.assert_close(loss_and_gradient(name, columns_of(batch), {})[1], expected)


def test_decoupled_ppo_is_ppo_where_the_sampler_is_the_proximal_policy() -> None:
    batch = [[Token(-1.0, -1.5, -1.5, 1.0, 1, 1), Token(-2.0, -1.4, -1.4, -2.0, 1, 1)]]
    values = {"behaviour_cap": 1.5, "clip_dual": 3.0}
    assert torch.equal(
        loss_and_gradient("decoupled_ppo", columns_of(batch), values)[0],
        loss_and_gradient("ppo_clip", columns_of(batch), {"clip_dual": 3.0})[0],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_divergence_of_certain_tokens_is_a_number(dtype: torch.dtype) -> None:
    # What was certain and is less so is 1 and 0.01 nats away; what became certain is further than any bound.
    rows = [(-1.0, 0.0, -1.0), (-0.01, 0.0, -1.0), (0.0, -0.5, 1.0), (0.0, 0.0, 1.0), (-1e-9, 0.0, -1.0)]
    columns = columns_of([[Token(logp, old, old, a, 1.0, 1.0) for logp, old, a in rows]], dtype)
    _, metrics = call("dppo_kl", columns, {})
    assert metrics["pg_clipfrac"].tolist() == [1, 0, 1, 0, 0]


def test_diagnostics_count_what_was_clipped_capped_or_dropped() -> None:
    rows = [(0.5, 1.0), (-0.5, 1.0), (0.5, -1.0), (-0.5, -1.0)]
    tokens = [Token(-1 + d, -1.0, -2.0 if d > 0 else -1.0, a, 0.0, 1.0) for d, a in rows]
    apart, together = columns_of([[t] for t in tokens]), columns_of([tokens])
    expected = {
        "gspo": {"pg_clipfrac": [1, 0, 0, 1]},
        "gspo_token": {"pg_clipfrac": [1, 0, 0, 1]},
        "gmpo": {"pg_clipfrac": [1, 0, 0, 0], "pg_clipfrac_lower": [0, 0, 0, 1]},
        "cispo": {"pg_clipfrac": [1, 1, 1, 1]},
        "clip_cov": {"pg_clipfrac": [1, 0, 0, 1], "cov_clipfrac": [1, 1, 1, 1]},
        "kl_cov": {"ppo_kl": [0.5, 0.5, 0.5, 0.5], "cov_penaltyfrac": [0, 0, 0, 0]},
        "dppo_tv": {"pg_clipfrac": [1, 0, 0, 0], "pg_clipfrac_lower": [0, 0, 0, 0]},
        "topr": {"pg_clipfrac": [0, 0, 1, 0]},
        "decoupled_ppo": {"pg_clipfrac": [1, 0, 0, 1], "behave_dropfrac": [1, 0, 1, 0]},
    }
    values: dict[str, dict[str, float]] = {"decoupled_ppo": {"behaviour_cap": 2.0}}
    for name, metrics in expected.items():
        _, found = call(name, apart, values.get(name, {}))
        assert {m: found[m].tolist() for m in metrics} == metrics, name
    _, capped = call("dppo_tv", together, {"ratio_cap": 1.5, "divergence_high": 0.9})
    assert capped["pg_clipfrac_lower"].tolist() == [1, 0, 1, 0]
