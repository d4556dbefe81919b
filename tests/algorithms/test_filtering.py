"""What is left out or punished before anything is learnt."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridflow.algorithms.filtering import drop_reason, overlong_penalty_N


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([0.1] * 3, "equal"),  # whose sum is not three times a tenth
        ([0.5], "equal"),
        ([0.0, 0.0], "too hard"),
        ([1.0, 1.0], "too easy"),
        ([0.0, 0.1], "too hard"),
        ([1.0, 0.9], "too easy"),
        ([0.0, 0.2], None),  # the bounds themselves pass
        ([0.8, 1.0], None),
        ([0.0, 1.0], None),
    ],
)
def test_why_a_group_is_dropped(values: list[float], reason: str | None) -> None:
    assert drop_reason(values, equal_rewards=True, min_mean=0.1, max_mean=0.9) == reason


def test_what_is_not_asked_for_drops_nothing() -> None:
    assert drop_reason([1.0, 1.0], equal_rewards=False, min_mean=None, max_mean=None) is None
    assert drop_reason([1.0, 1.0], equal_rewards=True, min_mean=None, max_mean=None) == "equal"
    assert drop_reason([1.0, 1.0 + 1e-12], equal_rewards=True, min_mean=None, max_mean=None) is None


@given(st.floats(-3, 3), st.integers(1, 9))
def test_equal_values_at_a_bound_pass_it(value: float, count: int) -> None:
    assert drop_reason([value] * count, equal_rewards=False, min_mean=value, max_mean=None) is None
    assert drop_reason([value] * count, equal_rewards=False, min_mean=None, max_mean=value) is None


def test_the_penalty_of_dapo() -> None:
    """Its own numbers: 16,384 tokens without punishment, and 4,096 more until it is whole."""
    length_N = torch.tensor([0, 16_384, 16_385, 18_432, 20_480])
    expected = [0, 0, -1 / 4096, -0.5, -1]
    assert overlong_penalty_N(length_N, 20_480, 4096, 1.0).tolist() == expected
    assert overlong_penalty_N(length_N.double(), 20_480, 4096, 0.3).tolist() == pytest.approx(
        [0.3 * x for x in expected]
    )


@given(st.lists(st.integers(0, 60), min_size=1), st.integers(1, 50), st.integers(1, 60), st.floats(0.1, 5))
@settings(max_examples=30, deadline=None)
def test_the_penalty_against_equation_13(lengths: list[int], limit: int, buffer: int, penalty: float) -> None:
    def reference(length: int) -> float:
        if length <= limit - buffer:
            return 0.0
        return -penalty if length > limit else penalty * ((limit - buffer) - length) / buffer

    found_N = overlong_penalty_N(torch.tensor(lengths, dtype=torch.float64), limit, buffer, penalty)
    assert found_N.tolist() == pytest.approx([reference(length) for length in lengths], abs=1e-12)
