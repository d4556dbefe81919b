"""Which answers PF-PPO trains on."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridflow.algorithms.reweighting import pf_ppo_rows
from hybridflow.noise import NoiseKey

KEY = NoiseKey(seed=3, stream="reweight", draw=5)
Answer = tuple[int, int, float]  # group, sample, score

answers = st.lists(
    st.tuples(st.integers(-3, 3), st.integers(0, 99), st.sampled_from([-1.0, 0.0, 0.5, 1.0])),
    min_size=1,
    max_size=20,
    unique_by=lambda a: (a[0], a[1]),
)


def picks(rows: list[Answer], method: str, *, power: float = 2.0, key: NoiseKey = KEY) -> list[Answer]:
    group_B, sample_B, score_B = (torch.tensor(x) for x in zip(*rows))
    found_B = pf_ppo_rows(score_B, group_B, sample_B, key=key, method=method, power=power)  # type: ignore[arg-type]
    assert found_B.tolist() == sorted(found_B.tolist())
    return [rows[i] for i in found_B.tolist()]


@pytest.mark.parametrize("method", ["pow", "max_min", "max_random"])
@given(rows=answers, data=st.data())
@settings(max_examples=30, deadline=None)
def test_the_order_of_rows_does_not_matter(method: str, rows: list[Answer], data: st.DataObject) -> None:
    mixed = data.draw(st.permutations(rows))
    assert Counter(picks(mixed, method)) == Counter(picks(rows, method))


@given(rows=answers)
@settings(max_examples=30, deadline=None)
def test_of_every_group_the_best_and_the_worst_or_another_one(rows: list[Answer]) -> None:
    for method in ("max_min", "max_random"):
        found = picks(rows, method)
        for group in {g for g, _, _ in rows}:
            members = sorted((-score, sample) for g, sample, score in rows if g == group)
            chosen = [(-score, sample) for g, sample, score in found if g == group]
            assert len(set(chosen)) == len(chosen) == min(2, len(members))
            assert members[0] in chosen
            assert method == "max_random" or members[-1] in chosen


def test_the_other_one_is_any_but_the_best_with_the_same_chance() -> None:
    rows = [(g, s, float(s == 2)) for g in range(1000) for s in range(5)]
    counts = Counter(sample for _, sample, _ in picks(rows, "max_random"))
    assert counts[2] == 1000
    assert all(200 < counts[s] < 300 for s in (0, 1, 3, 4))  # 250 expected, with a deviation of 14
    later = picks(rows, "max_random", key=NoiseKey(3, "reweight", 6))
    assert len(set(later) & set(picks(rows, "max_random"))) < 1500  # of 2000; 1250 expected


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_answers_are_drawn_in_proportion_to_the_power_of_their_scores_size(power: float) -> None:
    scores = [-2.0, -1.0, 0.0, 0.5, 3.0]
    rows = [(g, s, score) for g in range(2000) for s, score in enumerate(scores)]
    found = picks(rows, "pow", power=power)
    assert len(found) == len(rows)
    counts, weights = Counter(score for _, _, score in found), {x: abs(x) ** power for x in scores}
    for score, weight in weights.items():
        share = weight / sum(weights.values())
        deviation = (len(rows) * share * (1 - share)) ** 0.5
        assert abs(counts[score] - len(rows) * share) <= 4 * deviation
    assert len(set(found)) < len(found)  # with replacement


def test_where_no_answer_has_a_score_all_are_kept_once() -> None:
    rows = [(0, s, 0.0) for s in range(5)]
    assert picks(rows, "pow") == rows
    assert len(pf_ppo_rows(*(torch.zeros(0, dtype=torch.int64),) * 3, key=KEY, method="pow", power=2.0)) == 0
