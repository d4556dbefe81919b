"""From token losses to one number."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybridflow.algorithms.aggregation import AGGREGATIONS, token_weights
from hybridflow.batch import Batch

from golden import golden_batch

# Masks of sequences, and the trajectory that each belongs to.
batches = st.lists(
    st.tuples(st.lists(st.booleans(), min_size=1, max_size=6), st.integers(0, 3)), min_size=1, max_size=6
)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("token-mean", 0.1977231), ("seq-mean-token-mean", 0.2135667), ("seq-mean-token-sum-norm", 0.16065)],
)
def test_golden_numbers(mode: str, expected: float) -> None:
    batch = golden_batch()
    loss_T = batch["change_T"].square() + 0.1
    assert float((loss_T * token_weights(batch, mode, norm=4)).sum()) == pytest.approx(expected, abs=1e-7)


def reference(losses: dict[int, list[float]], mode: str, norm: float) -> float:
    """The mode's definition; `losses` holds the masked-in token losses of each trajectory."""
    everything = [x for trajectory in losses.values() for x in trajectory]
    if mode == "token-mean":
        return sum(everything) / max(len(everything), 1)
    if mode == "seq-mean-token-mean":
        return sum(sum(x) / max(len(x), 1) for x in losses.values()) / len(losses)
    return sum(sum(x) / norm for x in losses.values()) / len(losses)


@pytest.mark.parametrize("mode", AGGREGATIONS)
@given(rows=batches, norm=st.floats(1, 100))
def test_against_the_definition(mode: str, rows: list[tuple[list[bool], int]], norm: float) -> None:
    batch = Batch.from_rows({"loss_mask_T": [m for m, _ in rows], "trajectory_B": [t * 3 + 10 for _, t in rows]})
    loss_T = torch.linspace(-3, 5, batch.total(), dtype=torch.float64)
    losses: dict[int, list[float]] = {t: [] for _, t in rows}
    for (mask, trajectory), part in zip(rows, torch.split(loss_T, batch.lengths().tolist())):
        losses[trajectory] += part[torch.tensor(mask)].tolist()
    weight_T = token_weights(batch, mode, norm=norm)
    assert float((loss_T * weight_T).sum()) == pytest.approx(reference(losses, mode, norm), rel=1e-6, abs=1e-6)
    assert weight_T[~batch["loss_mask_T"]].eq(0).all()


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_an_empty_batch_has_no_weights(mode: str) -> None:
    batch = Batch.from_rows({"loss_mask_T": [], "trajectory_B": torch.zeros(0, dtype=torch.int64)})
    assert token_weights(batch, mode, norm=4).shape == (0,)
