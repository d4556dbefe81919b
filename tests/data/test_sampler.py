"""The order of rows: every epoch a permutation, the same from any point on, and each source its share."""

from __future__ import annotations

from math import isqrt
from typing import Any, Literal

from hypothesis import given
from hypothesis import strategies as st

from hybridflow.data.sampler import Sampler
from hybridflow.noise import NoiseKey

Order = Literal["shuffled", "sequential"]
counts = st.lists(st.integers(0, 9), max_size=6)
orders: Any = st.sampled_from(["shuffled", "sequential"])
# Sizes and weights of one to four sources.
sources = st.lists(st.tuples(st.integers(1, 9), st.floats(0.1, 10)), min_size=1, max_size=4)


def ranges(sizes: list[int]) -> list[range]:
    return [range(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]


def mixed(found: list[tuple[int, float]], **values: Any) -> Sampler:
    return Sampler(ranges([n for n, _ in found]), weights=[w for _, w in found], **values)


@given(st.integers(1, 12), st.integers(0, 99), orders, counts)
def test_every_epoch_is_a_permutation_however_draws_are_grouped(
    rows: int, seed: int, order: Order, counts: list[int]
) -> None:
    sampler = Sampler(rows, seed=seed, order=order)
    taken = [pair for count in [*counts, 3 * rows] for pair in sampler.take(count)]
    assert [draw for draw, _ in taken] == list(range(sum(counts) + 3 * rows))
    assert sampler.drawn == len(taken)
    for epoch in range(len(taken) // rows):
        drawn = [row for _, row in taken[epoch * rows : (epoch + 1) * rows]]
        assert sorted(drawn) == list(range(rows))
        assert order == "shuffled" or drawn == list(range(rows))
    assert taken == Sampler(rows, seed=seed, order=order).take(len(taken))


@given(sources, st.integers(0, 99), orders, st.integers(0, 40))
def test_a_sampler_resumes_at_any_draw(sources: list[tuple[int, float]], seed: int, order: Order, drawn: int) -> None:
    straight = mixed(sources, seed=seed, order=order).take(drawn + 20)
    assert mixed(sources, seed=seed, order=order, drawn=drawn).take(20) == straight[drawn:]
    again = mixed(sources, seed=seed, order=order)
    again.take(drawn + 3)
    again.drawn = drawn  # as when a step is undone
    assert again.take(20) == straight[drawn:]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [tuple(row for _, row in Sampler(30, seed=s, drawn=30 * e).take(30)) for s in range(5) for e in range(5)]
    assert len(set(orders)) == 25


@given(sources, st.integers(0, 99))
def test_every_source_has_its_share_and_its_own_epochs(sources: list[tuple[int, float]], seed: int) -> None:
    parts, total = ranges([n for n, _ in sources]), sum(w for _, w in sources)
    rows = [row for _, row in mixed(sources, seed=seed).take(500)]
    for part, (size, weight) in zip(parts, sources):
        drawn = [row for row in rows if row in part]
        # The discrepancy of the golden-ratio sequence: a few draws, where random choices would be off by tens.
        assert abs(len(drawn) - 500 * weight / total) <= 4
        for epoch in range(len(drawn) // size):
            assert sorted(drawn[epoch * size : (epoch + 1) * size]) == list(part)


def test_sources_of_equal_weight_alternate_and_shuffle_apart() -> None:
    sampler = mixed([(50, 1.0), (50, 1.0)], seed=3)
    rows = [row for _, row in sampler.take(100)]
    for i in range(0, 100, 10):
        assert 4 <= sum(row < 50 for row in rows[i : i + 10]) <= 6
    assert [row for row in rows if row < 50] != [row - 50 for row in rows if row >= 50]


def test_a_far_draw_is_where_counting_one_by_one_leads() -> None:
    drawn, seed = 2**20 + 3, 5  # more than one chunk of counting
    start = NoiseKey(seed, "source").bits()
    step, end = (isqrt(5 * 2**128) - 2**64) // 2, 2**65 // 3  # golden ratio; the share of the first source
    first = [(start + i * step) % 2**64 < end for i in range(drawn + 1)]
    count = sum(first[:-1])
    row = count % 7 if first[-1] else 7 + (drawn - count) % 3
    sampler = Sampler([range(7), range(7, 10)], weights=[2.0, 1.0], seed=seed, order="sequential", drawn=drawn)
    assert sampler.take(1) == [(drawn, row)]
