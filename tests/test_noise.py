"""Noise depends on what it is for and on nothing else, and it has the distribution it should have."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hybridflow.noise import NoiseKey, fork_stream, gumbel, permutation, uniform

KEY = NoiseKey(seed=3, stream="train", draw=5, sample=2)
EULER = 0.5772156649


def noise_of(keys: list[NoiseKey], positions: list[int], vocab: int = 11) -> Tensor:
    return gumbel(torch.tensor([k.bits() for k in keys]), torch.tensor(positions), vocab)


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    expected = probabilities.double() * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


@given(st.permutations(range(12)), st.integers(0, 12))
def test_same_bits_in_any_order_and_any_split(order: list[int], cut: int) -> None:
    keys, positions = [replace(KEY, sample=i % 4, draw=i // 4) for i in range(12)], [i * 7 % 5 for i in range(12)]
    whole = noise_of(keys, positions)
    parts = [part for part in (order[:cut], order[cut:]) if part]
    again = torch.cat([noise_of([keys[i] for i in p], [positions[i] for i in p]) for p in parts])
    assert torch.equal(again, whole[order])


def test_a_larger_vocabulary_only_adds_entries() -> None:
    assert torch.equal(noise_of([KEY], [1], vocab=50)[:, :20], noise_of([KEY], [1], vocab=20))


@pytest.mark.parametrize(
    "other", [{"seed": 4}, {"stream": "eval"}, {"draw": 6}, {"sample": 3}, {"stream": "train/5", "draw": 2}]
)
def test_every_part_of_the_key_makes_other_noise(other: dict[str, int | str]) -> None:
    a, b = noise_of([KEY], [0], 5000), noise_of([replace(KEY, **other)], [0], 5000)
    assert int((a == b).sum()) < 5
    assert abs(float(torch.corrcoef(torch.cat([a, b]))[0, 1])) < 0.06


def test_positions_and_neighbouring_samples_are_independent() -> None:
    noise = torch.cat([noise_of([replace(KEY, sample=s)] * 10, list(range(10)), 2000) for s in range(4)])
    correlation = torch.corrcoef(noise) - torch.eye(40)
    assert float(correlation.abs().max()) < 0.1  # 780 pairs, each with a deviation of 0.022
    assert len(noise.unique()) > 0.99 * noise.numel()


def test_a_fork_draws_anew_whenever_it_comes_to_the_same_context() -> None:
    """Sequences of one trajectory, by the context that they begin with and how many began with it before."""
    contexts = [([5, 6, 7], 0), ([5, 6, 7], 1), ([5, 6, 7], 2), ([5, 67], 0), ([56, 7], 0), ([5, 6], 7), ([5, 6], 0)]
    keys = [KEY, *(replace(KEY, stream=fork_stream(KEY.stream, ids, n)) for ids, n in contexts)]
    keys += [replace(key, sample=9) for key in keys]
    noise = torch.stack([noise_of([key], [4], 2000)[0] for key in keys])
    assert float((torch.corrcoef(noise) - torch.eye(16)).abs().max()) < 0.1  # 120 pairs, deviation 0.022
    assert len({tuple(noise_of([key] * 12, [*range(12)], 50).argmax(-1).tolist()) for key in keys}) == 16
    assert fork_stream("train", [5, 6, 7], 1) == fork_stream("train", (5, 6, 7), 1) == "train/fork/af6405d0ef20c951/1"


def test_mean_and_variance_are_those_of_the_gumbel_distribution() -> None:
    noise = noise_of([KEY] * 100, list(range(100)), 10_000).double()
    assert torch.isfinite(noise).all()
    assert float(noise.mean()) == pytest.approx(EULER, abs=4 * math.sqrt(math.pi**2 / 6 / noise.numel()))
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.01)
    # P(noise <= x) = exp(-exp(-x)), in both tails too
    for x in (-1.5, 0.0, 2.0, 6.0, 9.0):
        p = math.exp(-math.exp(-x))
        deviation = math.sqrt(p * (1 - p) / noise.numel())
        assert float((noise <= x).double().mean()) == pytest.approx(p, abs=4 * deviation)


def test_argmax_of_logits_plus_noise_samples_softmax() -> None:
    rows = 20_000
    logits_V = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, -3.0, 1.5, -2.0])
    for keys, positions in [
        ([replace(KEY, draw=i) for i in range(rows)], [0] * rows),
        ([KEY] * rows, list(range(rows))),
    ]:
        token_R = (logits_V + noise_of(keys, positions, len(logits_V))).argmax(-1)
        counts = torch.bincount(token_R, minlength=len(logits_V))
        assert chi_square(counts, logits_V.softmax(-1)) < 24.3  # 7 degrees of freedom, p = 0.001


@given(st.integers(0, 200), st.integers(0, 2**40), st.integers(0, 99))
def test_permutation_is_one_and_repeats(count: int, seed: int, draw: int) -> None:
    order = permutation(NoiseKey(seed, "shuffle", draw), count)
    assert sorted(order) == list(range(count))
    assert order == permutation(NoiseKey(seed, "shuffle", draw), count)


def test_permutations_of_epochs_differ_and_every_place_is_as_likely() -> None:
    orders = [permutation(NoiseKey(0, "shuffle", epoch), 6) for epoch in range(3000)]
    assert len({tuple(o) for o in orders}) > 690  # of 720
    for place in range(6):
        counts = torch.bincount(torch.tensor([o[place] for o in orders]), minlength=6)
        assert chi_square(counts, torch.full((6,), 1 / 6)) < 22.5  # 5 degrees of freedom, p = 0.0004


@given(st.permutations(range(12)), st.integers(0, 12))
def test_uniform_numbers_go_by_identity_and_not_by_place(order: list[int], cut: int) -> None:
    ids = torch.tensor([[i // 4 - 1, i % 4 * 2**40] for i in range(12)])
    whole = uniform(KEY, *ids.T)
    parts = [ids[part].T for part in (order[:cut], order[cut:])]
    assert torch.equal(torch.cat([uniform(KEY, *part) for part in parts]), whole[order])
    assert len(whole.unique()) == 12


def test_uniform_numbers_are_uniform_in_every_id_and_key() -> None:
    ids = torch.arange(20_000)
    for values in (
        uniform(KEY, ids),
        uniform(KEY, ids, torch.zeros_like(ids)),
        uniform(KEY, torch.zeros_like(ids), ids),
        torch.stack([uniform(replace(KEY, draw=d), ids[:1])[0] for d in range(4_000)]),
    ):
        assert 0 < float(values.min()) < 2e-3 and 1 - 2e-3 < float(values.max()) < 1
        counts = (values * 16).long().bincount(minlength=16)
        assert chi_square(counts, torch.full((16,), 1 / 16)) < 37.7  # 15 degrees of freedom, p = 0.001
        assert abs(float(torch.corrcoef(torch.stack([values[:-1], values[1:]]))[0, 1])) < 0.05


def test_the_largest_values_which_decide_samples_are_precise() -> None:
    noise = noise_of([KEY] * 100, list(range(100)), 10_000)
    for place in noise.flatten().topk(20).indices.tolist():
        position, token = divmod(place, 10_000)
        assert float(noise[position, token]) == pytest.approx(_reference(KEY, position, token), abs=5e-6)


def test_known_values() -> None:
    """A change of the hash would silently change every run: it must be a decision."""
    keys, positions = [KEY, NoiseKey(0, "eval")], [0, 1000]
    noise = noise_of(keys, positions, 4).flatten().tolist()
    assert keys[0].bits() == -3258771834810777517
    assert noise == pytest.approx(
        [-1.0132989, -0.1273191, 0.7857570, -0.0586442, -0.0891732, 1.5767459, 0.3864743, -0.4558830], abs=1e-6
    )
    assert permutation(NoiseKey(0, "shuffle", 1), 8) == [1, 5, 7, 2, 3, 0, 6, 4]
    ids = [(0, 0), (3, -5)]
    assert uniform(KEY, *torch.tensor(ids).T).tolist() == [_uniform_reference(KEY, pair) for pair in ids]
    assert noise == pytest.approx([_reference(k, p, v) for k, p in zip(keys, positions) for v in range(4)], abs=2e-6)


def _reference(key: NoiseKey, position: int, token: int) -> float:
    """The same in Python's integers and double precision."""
    row = _splitmix(key.bits() - position * 0x3C6EF372FE94F82B)
    uniform = ((_splitmix(row + token * 0x9E3779B97F4A7C15) >> 32) + 0.5) / 2**32
    return -math.log(-math.log1p(-uniform))


def _uniform_reference(key: NoiseKey, ids: tuple[int, ...]) -> float:
    value = key.bits()
    for i in ids:
        value = _splitmix(value + i * 0x9E3779B97F4A7C15)
    return ((value >> 12) + 0.5) / 2**52


def _splitmix(x: int) -> int:
    x %= 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)
