"""The order of rows: every epoch a permutation, the same from any point on."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hybridflow.data.sampler import Sampler

counts = st.lists(st.integers(0, 9), max_size=6)


@given(st.integers(1, 12), st.integers(0, 99), st.booleans(), counts)
def test_every_epoch_is_a_permutation_however_draws_are_grouped(
    rows: int, seed: int, shuffle: bool, counts: list[int]
) -> None:
    sampler = Sampler(rows, seed=seed, shuffle=shuffle)
    taken = [pair for count in [*counts, 3 * rows] for pair in sampler.take(count)]
    assert [draw for draw, _ in taken] == list(range(sum(counts) + 3 * rows))
    assert sampler.drawn == len(taken)
    for epoch in range(len(taken) // rows):
        order = [row for _, row in taken[epoch * rows : (epoch + 1) * rows]]
        assert sorted(order) == list(range(rows))
        assert shuffle or order == list(range(rows))
    assert taken == Sampler(rows, seed=seed, shuffle=shuffle).take(len(taken))


@given(st.integers(1, 12), st.integers(0, 99), st.booleans(), st.integers(0, 40))
def test_a_sampler_resumes_at_any_draw(rows: int, seed: int, shuffle: bool, drawn: int) -> None:
    straight = Sampler(rows, seed=seed, shuffle=shuffle).take(drawn + 20)
    assert Sampler(rows, seed=seed, shuffle=shuffle, drawn=drawn).take(20) == straight[drawn:]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [tuple(row for _, row in Sampler(30, seed=s, drawn=30 * e).take(30)) for s in range(5) for e in range(5)]
    assert len(set(orders)) == 25
