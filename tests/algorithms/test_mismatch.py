"""The gap between sampler and trainer: against plain loops in float64, however the tokens are cut."""

from __future__ import annotations

import math
import random

import pytest
import torch

from hybridflow.algorithms.mismatch import ACCURACY, QUANTILES, gap_metrics, gap_sums, measured_gap, token_ages
from hybridflow.batch import Batch


def tokens(count: int = 3000, seed: int = 0) -> tuple[list[float], list[float], list[int], list[float]]:
    """Log-probabilities of policy and sampler with gaps over many sizes, ages, and log masses of supports."""
    rng = random.Random(seed)
    logps, rollout, ages, masses = [], [], [], []
    for _ in range(count):
        ages.append(rng.choice([0, 0, 0, 1, 2]))
        logps.append(-rng.expovariate(0.7))
        gap = rng.gauss(0, 1) * 10 ** rng.uniform(-8, -1) * (1 + 5 * ages[-1])
        rollout.append(min(0.0, logps[-1] + gap))
        masses.append(-rng.expovariate(20) if rng.random() < 0.6 else 0.0)
    return logps, rollout, ages, masses


def expected(logps: list[float], rollout: list[float], ages: list[int], masses: list[float]) -> dict[str, float]:
    """Every number, token by token, as the head of `mismatch` defines it."""
    n = len(logps)
    d = [r - p for p, r in zip(logps, rollout)]
    value = {"k1": d, "k3": [math.exp(-x) - 1 + x for x in d]}
    support = sum(-m for m in masses) / n
    found = {"mismatch/stale_tokens": sum(age > 0 for age in ages) / n}
    for kind, values in value.items():
        fresh = [v for v, age in zip(values, ages) if age == 0]
        numerics = sum(fresh) / len(fresh) if fresh else 0.0
        mean = sum(values) / n
        found |= {
            f"mismatch/{kind}/numerics": numerics,
            f"mismatch/{kind}/staleness": mean - numerics,
            f"mismatch/{kind}/support": support,
            f"mismatch/{kind}/total": mean + support,
        }
    found |= {"rollout_corr/kl": sum(d) / n, "rollout_corr/k3_kl": sum(value["k3"]) / n}
    sizes = sorted(map(abs, d))
    for name, share in QUANTILES.items():
        found[f"mismatch/abs_logp_diff/{name}"] = sizes[math.ceil(share * n) - 1]
    found["mismatch/abs_logp_diff/max"] = sizes[-1]
    p, q = [math.exp(x) for x in logps], [math.exp(x) for x in rollout]
    differences = [abs(a - b) for a, b in zip(p, q)]
    mean = sum(differences) / n
    found["training/rollout_probs_diff_mean"] = mean
    found["training/rollout_probs_diff_std"] = math.sqrt(sum((x - mean) ** 2 for x in differences) / n)
    found["training/rollout_probs_diff_max"] = max(differences)
    mean_p, mean_q = sum(p) / n, sum(q) / n
    shared = sum((a - mean_p) * (b - mean_q) for a, b in zip(p, q))
    spread = math.sqrt(sum((a - mean_p) ** 2 for a in p) * sum((b - mean_q) ** 2 for b in q))
    found["training/rollout_actor_probs_pearson_corr"] = shared / spread
    return found


def columns(parts: tuple[list[float], list[float], list[int], list[float]]) -> tuple[torch.Tensor, ...]:
    logps, rollout, ages, masses = parts
    wide = torch.float64
    return torch.tensor(logps, dtype=wide), torch.tensor(rollout, dtype=wide), torch.tensor(ages), torch.tensor(masses)


@pytest.mark.parametrize("seed", range(3))
def test_every_number_is_that_of_plain_loops(seed: int) -> None:
    parts = tokens(seed=seed)
    found, wanted = measured_gap(*columns(parts)), expected(*parts)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        close = ACCURACY * 1.001 if name.startswith("mismatch/abs_logp_diff/p") else 1e-6
        assert found[name] == pytest.approx(value, rel=close, abs=1e-9), name


@pytest.mark.parametrize("cut", [1, 7, 1000])
def test_parts_of_a_batch_add_up(cut: int) -> None:
    whole = columns(tokens(1001))
    parts = [gap_sums(*(column[i : i + cut] for column in whole)) for i in range(0, 1001, cut)]
    assert gap_metrics(torch.stack(parts).sum(0)) == pytest.approx(gap_metrics(gap_sums(*whole)), rel=1e-10, abs=1e-12)


def test_the_three_parts_are_the_whole() -> None:
    """Numerics alone where all is fresh and drawn from everything; the other parts come in where they are."""
    logp_M, rollout_M, age_M, mass_M = columns(tokens())
    for ages, masses in [(None, None), (age_M, None), (None, mass_M), (age_M, mass_M), (age_M * 0 + 1, mass_M)]:
        found = gap_metrics(gap_sums(logp_M, rollout_M, ages, masses))
        for kind in ("k1", "k3"):
            parts = {part: found[f"mismatch/{kind}/{part}"] for part in ("numerics", "staleness", "support")}
            assert sum(parts.values()) == found[f"mismatch/{kind}/total"]
            assert (parts["staleness"] == 0) == (ages is None)
            assert (parts["support"] == 0) == (masses is None)
    assert found["mismatch/stale_tokens"] == 1 and found["mismatch/k3/numerics"] == 0  # cannot be told apart


def test_a_known_divergence_is_estimated() -> None:
    """Tokens drawn from a cut distribution q: both totals are KL(q | p) of the whole vocabulary, k3 more closely."""
    rng = torch.Generator().manual_seed(0)
    p_V = torch.randn(50, generator=rng).double().softmax(0)
    kept_V = p_V >= p_V.sort(descending=True).values[20]
    q_V = (p_V.log() + 0.2 * torch.randn(50, generator=rng).double()).exp().where(kept_V, 0)
    q_V = q_V / q_V.sum()
    true = float((q_V[kept_V] * (q_V[kept_V] / p_V[kept_V]).log()).sum())
    drawn = q_V.float().multinomial(40_000, replacement=True, generator=rng)
    mass = p_V[kept_V].sum().log()
    found = measured_gap((p_V.log() - mass)[drawn], q_V.log()[drawn], None, mass.expand(len(drawn)))
    assert found["mismatch/k3/total"] == pytest.approx(true, abs=1e-3)
    assert found["mismatch/k1/total"] == pytest.approx(true, abs=5e-3)
    assert found["mismatch/k3/support"] == pytest.approx(-float(mass)) and true > -float(mass) > 0.1


def test_numbers_that_are_not_finite_and_no_numbers_at_all() -> None:
    found = gap_metrics(gap_sums(torch.tensor([-1.0, -math.inf, math.nan, -1.0]), torch.full((4,), -1.0)))
    assert found["mismatch/abs_logp_diff/p50"] == 0 and found["mismatch/abs_logp_diff/p99"] == math.inf
    none = torch.zeros(0)
    assert measured_gap(none, none) == gap_metrics(gap_sums(none, none)) == {}


def test_ages_of_tokens_follow_their_spans() -> None:
    batch = Batch.from_rows(
        {
            "loss_mask_T": [[False, True, True, True], [False, False], [False, False, True, True]],
            "span_version_S": [[3, 5], [], [4]],
            "span_start_S": [[0, 2], [], [0]],
            "span_end_S": [[2, 3], [], [2]],
        }
    )
    version_S, start_S, end_S = (batch[f"span_{name}_S"] for name in ("version", "start", "end"))
    assert token_ages(version_S, start_S, end_S, batch["loss_mask_T"], 5).tolist() == [0, 2, 2, 0, 0, 0, 0, 0, 1, 1]
