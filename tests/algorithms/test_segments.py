"""Sums and means over ragged segments."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybridflow.algorithms.segments import segment_count, segment_mean, segment_sum


@given(st.lists(st.tuples(st.integers(0, 5), st.floats(-1e3, 1e3)), max_size=20))
def test_sums_and_means_against_a_loop(values: list[tuple[int, float]]) -> None:
    index = torch.tensor([i for i, _ in values], dtype=torch.int64)
    value = torch.tensor([v for _, v in values], dtype=torch.float64)
    count = segment_count(index)
    assert count == max((i + 1 for i, _ in values), default=0)
    for s, (total, mean) in enumerate(zip(segment_sum(value, index, count), segment_mean(value, index, count))):
        mine = [v for i, v in values if i == s]
        assert float(total) == pytest.approx(sum(mine), abs=1e-9)
        assert float(mean) == pytest.approx(sum(mine) / max(len(mine), 1), abs=1e-9)


def test_a_mean_passes_its_gradient_in_equal_parts() -> None:
    value = torch.tensor([1.0, 2.0, 3.0, 4.0], requires_grad=True)
    mean = segment_mean(value, torch.tensor([2, 0, 2, 2]), 3)
    (mean * torch.tensor([5.0, 7.0, 6.0])).sum().backward()
    assert value.grad is not None
    assert value.grad.tolist() == [2, 5, 2, 2]
