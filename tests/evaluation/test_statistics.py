"""pass@k, maj@k, intervals and paired tests, against brute force over all subsets, published numbers and coverage."""

from __future__ import annotations

import math
import random
from itertools import combinations, product

import pytest
import torch

from hybridflow.evaluation.statistics import (
    bootstrap,
    maj_at_k,
    mean_interval,
    pass_at_k,
    permutation_test,
    sign_test,
    wilson,
)
from hybridflow.noise import NoiseKey

KEY = NoiseKey(0, "test")


def majority(votes: list[str], rewards: list[float]) -> float:
    """By the definition: the mean reward of each winning answer, and the mean over those that tie."""
    most = max(votes.count(v) for v in votes)
    winners = [v for v in dict.fromkeys(votes) if votes.count(v) == most]
    worth = [[r for v, r in zip(votes, rewards) if v == w] for w in winners]
    return sum(sum(w) / len(w) for w in worth) / len(worth)


def test_pass_at_k_is_the_mean_over_all_subsets() -> None:
    for n in range(1, 8):
        for c in range(n + 1):
            right = [True] * c + [False] * (n - c)
            for k in range(1, n + 1):
                subsets = list(combinations(right, k))
                assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-15)


def test_pass_at_k_of_many_samples_is_exact() -> None:
    expected = 1 - math.prod((200 - 30 - i) / (200 - i) for i in range(100))
    assert pass_at_k(200, 30, 100) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 1, 5), (4, 5, 2), (4, 1, 0), (0, 0, 1)])
def test_pass_at_more_than_there_are_is_refused(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match="pass@"):
        pass_at_k(n, c, k)


def test_majority_is_the_mean_over_all_subsets() -> None:
    rng = random.Random(0)
    for _ in range(150):
        n = rng.randint(1, 8)
        votes = [rng.choice("abcd"[: rng.randint(1, 4)]) for _ in range(n)]
        rewards = [rng.choice([0.0, 1.0, 0.25]) for _ in range(n)]
        for k in range(1, n + 1):
            subsets = list(combinations(range(n), k))
            expected = sum(majority([votes[i] for i in s], [rewards[i] for i in s]) for s in subsets) / len(subsets)
            assert maj_at_k(votes, rewards, k) == pytest.approx(expected, abs=1e-12), (votes, rewards, k)


def test_majority_of_one_is_the_mean_and_many_answers_take_no_time() -> None:
    rng = random.Random(1)
    votes, rewards = [str(rng.randint(0, 20)) for _ in range(128)], [rng.random() for _ in range(128)]
    assert maj_at_k(votes, rewards, 1) == pytest.approx(sum(rewards) / 128)
    assert 0 <= maj_at_k(votes, rewards, 64) <= 1
    assert maj_at_k(list(map(str, range(128))), rewards, 64) == pytest.approx(sum(rewards) / 128)
    with pytest.raises(ValueError, match="maj@3 of 2 responses"):
        maj_at_k(["a", "b"], [0.0, 1.0], 3)


@pytest.mark.parametrize(
    ("successes", "count", "expected"),
    # R. G. Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    [(81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)), (0, 20, (0.0, 0.1611)), (1, 29, (0.0061, 0.1718))],
)
def test_wilson_gives_the_published_intervals(successes: int, count: int, expected: tuple[float, float]) -> None:
    assert wilson(successes, count) == pytest.approx(expected, abs=5e-5)
    low, high = wilson(count - successes, count)
    assert (1 - high, 1 - low) == pytest.approx(expected, abs=5e-5)


def test_the_kind_of_interval_follows_the_values() -> None:
    assert mean_interval([1.0, 0.0, 1.0], KEY) == (wilson(2, 3), "wilson")
    (low, high), name = mean_interval([0.25, 0.5, 1.0, 0.0], KEY)
    assert name == "bootstrap" and 0 <= low < 0.4375 < high <= 1


def test_a_bootstrap_is_its_keys_alone_and_leaves_other_noise_alone() -> None:
    values = [0.1, 0.9, 0.4, 0.7, 0.2]
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    assert bootstrap(values, KEY) == bootstrap(values, KEY) != bootstrap(values, NoiseKey(1, "test"))
    assert torch.random.get_rng_state().equal(before)


def test_a_bootstrap_interval_is_that_of_all_resamples() -> None:
    values = [0.0, 0.1, 0.5, 0.9]
    means = torch.tensor([sum(s) / 4 for s in product(values, repeat=4)], dtype=torch.float64)
    exact = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    assert bootstrap(values, KEY) == pytest.approx(exact, abs=0.026)  # the next possible means are 0.025 away


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    rng = random.Random(5)
    hits = 0
    for i in range(200):
        values = [rng.choice([0.0, 0.25, 0.5, 0.75, 1.0]) for _ in range(50)]  # a mean of 0.5
        (low, high), _ = mean_interval(values, NoiseKey(i, "test"))
        hits += low <= 0.5 <= high
    assert 180 <= hits <= 199  # 190 expected, a standard deviation of 3.1


def test_the_sign_test_is_the_binomial_tail() -> None:
    for n in range(1, 12):
        for first in range(n + 1):
            outcomes = [sum(flips) for flips in product((0, 1), repeat=n)]
            extreme = sum(abs(heads - n / 2) >= abs(first - n / 2) for heads in outcomes)
            assert sign_test(first, n - first) == pytest.approx(extreme / 2**n)
    assert sign_test(0, 0) == 1


def test_the_permutation_test_of_few_is_exact_and_agrees_with_the_sign_test() -> None:
    assert permutation_test([1.0] * 6 + [-1.0] + [0.0] * 9, KEY) == (sign_test(6, 1), "exact")
    differences = [0.3, -0.1, 0.2, 0.4, 0.25]
    sums = [abs(sum(s * d for s, d in zip(signs, differences))) for signs in product((1, -1), repeat=5)]
    expected = sum(s >= abs(sum(differences)) - 1e-12 for s in sums) / 32
    assert permutation_test(differences, KEY) == (expected, "exact")
    assert permutation_test([0.0, 0.0], KEY) == (1.0, "exact")


def test_the_permutation_test_of_many_is_near_the_exact_one() -> None:
    p, how = permutation_test([1.0] * 24 + [-1.0] * 11, KEY)
    assert how == "sampled" and p == pytest.approx(sign_test(24, 11), abs=0.006)  # three standard deviations
    assert permutation_test([1.0] * 60, KEY) == (1 / 10_001, "sampled")
