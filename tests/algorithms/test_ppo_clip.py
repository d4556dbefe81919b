"""The clipped surrogate."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from hybridflow.algorithms.advantage.grpo import grpo
from hybridflow.algorithms.aggregation import token_weights
from hybridflow.algorithms.policy_loss.ppo_clip import ppo_clip

from golden import golden_batch

settings = st.fixed_dictionaries(
    {"clip_low": st.floats(0, 0.9), "clip_high": st.floats(0, 2)},
    optional={"clip_dual": st.floats(1.1, 5)},
)
tokens = st.lists(st.tuples(st.floats(-40, 40), st.floats(-5, 5)), min_size=1, max_size=20)


@pytest.mark.parametrize(
    ("values", "loss"), [({}, 0.215922), ({"clip_dual": 3.0}, 0.215922), ({"clip_high": 0.28}, 0.2072192)]
)
def test_golden_numbers_of_the_token_mean(values: dict[str, float], loss: float) -> None:
    batch = golden_batch()
    advantage_T = grpo(batch["reward_B"], batch["group_B"])[batch.sequence_of()]
    loss_T, metrics = ppo_clip(batch["new_T"], batch["old_T"], advantage_T, **values)
    weight_T = token_weights(batch, "token-mean", norm=4)
    assert float((loss_T * weight_T).sum()) == pytest.approx(loss, abs=5e-7)
    assert float((metrics["ppo_kl"] * weight_T).sum()) == pytest.approx(-0.047692, abs=5e-7)
    if "clip_high" not in values:
        assert float((metrics["pg_clipfrac"] * weight_T).sum()) == pytest.approx(0.230769, abs=5e-7)


def reference(
    d: float, advantage: float, clip_low: float, clip_high: float, clip_dual: float | None
) -> tuple[float, float]:
    """Loss of one token and its derivative by the log-probability, worked out by hand."""
    ratio = math.exp(max(-20.0, min(20.0, d)))
    slope = ratio if -20 <= d <= 20 else 0.0  # d ratio / d logp
    clipped = max(1 - clip_low, min(1 + clip_high, ratio))
    loss = max(-advantage * ratio, -advantage * clipped)
    # The gradient flows unless the clip has taken over: upwards for good tokens, downwards for bad ones.
    flows = ratio <= 1 + clip_high if advantage >= 0 else ratio >= 1 - clip_low
    if clip_dual is not None and advantage < 0 and loss > -advantage * clip_dual:
        return -advantage * clip_dual, 0.0
    return loss, -advantage * slope if flows else 0.0


@given(tokens, settings)
def test_loss_and_gradient_against_a_derivation_by_hand(
    tokens: list[tuple[float, float]], values: dict[str, float]
) -> None:
    bounds = [math.log(1 - values["clip_low"]), math.log(1 + values["clip_high"]), math.log(values.get("clip_dual", 9))]
    for d, _ in tokens:  # at the kinks themselves there is no derivative
        assume(all(abs(d - b) > 1e-6 for b in [*bounds, -20.0, 20.0]))
    old = torch.linspace(-30, -0.1, len(tokens), dtype=torch.float64)
    change, advantage = (torch.tensor(x, dtype=torch.float64) for x in zip(*tokens))
    logp = (old + change).requires_grad_()
    loss, _ = ppo_clip(logp, old, advantage, **values)
    loss.sum().backward()
    assert logp.grad is not None
    for i, (d, a) in enumerate(tokens):
        expected = reference(d, a, values["clip_low"], values["clip_high"], values.get("clip_dual"))
        assert float(loss[i].detach()) == pytest.approx(expected[0], rel=1e-9, abs=1e-12)
        assert float(logp.grad[i]) == pytest.approx(expected[1], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dual", [None, 3.0])
def test_ratios_from_e_minus_40_to_e_40_are_finite(dtype: torch.dtype, dual: float | None) -> None:
    change = torch.linspace(-40, 40, 161, dtype=dtype)
    for advantage in (-1e4, -1.0, 0.0, 1.0, 1e4):
        logp = change.clone().requires_grad_()
        loss, metrics = ppo_clip(logp, torch.zeros_like(change), torch.full_like(change, advantage), clip_dual=dual)
        loss.sum().backward()
        assert logp.grad is not None
        for value in (loss, logp.grad, *metrics.values()):
            assert torch.isfinite(value).all()


def test_diagnostics_count_what_was_clipped() -> None:
    logp = torch.tensor([0.5, -0.5, 0.5, -0.5, 0.0, 2.0])
    advantage = torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0, -1.0])
    _, metrics = ppo_clip(logp, torch.zeros(6), advantage, clip_dual=3.0)
    assert metrics["pg_clipfrac"].tolist() == [1, 0, 0, 1, 0, 0]
    assert metrics["pg_clipfrac_lower"].tolist() == [0, 0, 0, 0, 0, 1]
    assert metrics["ppo_kl"].tolist() == (-logp).tolist()
