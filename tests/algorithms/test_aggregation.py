"""From token losses to one number."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridflow.algorithms.aggregation import AGGREGATIONS, token_weights
from hybridflow.batch import Batch
from hybridflow.errors import UserError

from golden import golden_batch

# Masks of sequences, and the trajectory that each belongs to; two trajectories of the four make a group.
batches = st.lists(
    st.tuples(st.lists(st.booleans(), min_size=1, max_size=6), st.integers(0, 3)), min_size=1, max_size=6
)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token-mean", 0.1977231),
        ("token-sum", 2.5704),
        ("seq-mean-token-sum", 0.6426),
        ("seq-mean-token-mean", 0.2135667),
        ("seq-mean-token-sum-norm", 0.16065),
    ],
)
def test_golden_numbers(mode: str, expected: float) -> None:
    batch = golden_batch()
    loss_T = batch["change_T"].square() + 0.1
    assert float((loss_T * token_weights(batch, mode, norm=4)).sum()) == pytest.approx(expected, abs=5e-7)


def batch_of(rows: list[tuple[list[bool], int]]) -> Batch:
    return Batch.from_rows(
        {
            "loss_mask_T": [mask for mask, _ in rows],
            "trajectory_B": [t * 3 + 10 for _, t in rows],
            "group_B": [7 - t // 2 for _, t in rows],
        }
    )


def reference(losses: dict[int, list[float]], mode: str, norm: float) -> float:
    """The mode's definition; `losses` holds the masked-in token losses of each trajectory."""
    everything = [x for trajectory in losses.values() for x in trajectory]
    prompts: dict[int, list[float]] = {}
    for t, trajectory in losses.items():
        prompts[t // 2] = prompts.get(t // 2, []) + trajectory
    count = len(losses)
    return {
        "token-mean": sum(everything) / max(len(everything), 1),
        "token-sum": sum(everything),
        "seq-mean-token-sum": sum(everything) / count,
        "seq-mean-token-mean": sum(sum(x) / max(len(x), 1) for x in losses.values()) / count,
        "seq-mean-token-sum-norm": sum(sum(x) / norm for x in losses.values()) / count,
        "prompt-mean": sum(sum(x) / max(len(x), 1) for x in prompts.values()) / len(prompts),
    }[mode]


@pytest.mark.parametrize("mode", AGGREGATIONS)
@given(rows=batches, norm=st.floats(1, 100))
@settings(max_examples=30, deadline=None)
def test_against_the_definition(mode: str, rows: list[tuple[list[bool], int]], norm: float) -> None:
    batch = batch_of(rows)
    loss_T = torch.linspace(-3, 5, batch.total(), dtype=torch.float64)
    losses: dict[int, list[float]] = {t: [] for _, t in rows}
    for (mask, trajectory), part in zip(rows, torch.split(loss_T, batch.lengths().tolist())):
        losses[trajectory] += part[torch.tensor(mask)].tolist()
    weight_T = token_weights(batch, mode, norm=norm)
    assert float((loss_T * weight_T).sum()) == pytest.approx(reference(losses, mode, norm), rel=1e-12, abs=1e-12)
    assert weight_T[~batch["loss_mask_T"]].eq(0).all()


def test_an_answer_without_loss_tokens_counts_as_one_without_loss() -> None:
    batch = batch_of([([True, True], 0), ([False], 1), ([False], 2)])
    assert token_weights(batch, "seq-mean-token-mean", norm=4).tolist() == pytest.approx([1 / 6, 1 / 6, 0, 0])
    assert token_weights(batch, "prompt-mean", norm=4).tolist() == pytest.approx([1 / 4, 1 / 4, 0, 0])


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_an_empty_batch_has_no_weights(mode: str) -> None:
    nothing = torch.zeros(0, dtype=torch.int64)
    batch = Batch.from_rows({"loss_mask_T": [], "trajectory_B": nothing, "group_B": nothing})
    assert token_weights(batch, mode, norm=4).shape == (0,)


def test_a_batch_without_groups_has_no_mean_over_prompts() -> None:
    batch = batch_of([([True], 0)]).select(["loss_mask_T", "trajectory_B"])
    with pytest.raises(UserError, match="prompt-mean has the parameter group_N, and no value of that name exists"):
        token_weights(batch, "prompt-mean", norm=4)


OWN = """
import torch

def shorter_counts_more(length_N, group_N, *, norm, power=2.0):
    assert group_N.tolist() == [7, 6, 6]
    return norm / length_N ** power

def curious(length_N, reward_N): return length_N
def eager(length_N, *, power): return length_N
def short(length_N): return length_N[:1]
def number(length_N): return 1.0
"""


def test_an_aggregation_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(OWN)
    batch = batch_of([([True, True], 0), ([True, False], 2), ([False], 3), ([True, True, True], 2)])
    weight_T = token_weights(batch, f"{file}:shorter_counts_more", norm=8)
    assert weight_T.tolist() == [2, 2, 0.5, 0, 0, 0.5, 0.5, 0.5]  # not even that of no tokens is infinite
    for name, said in [
        ("curious", "has the parameter reward_N, and no value of that name exists"),
        ("eager", "has the parameter power, and no value of that name exists"),
        ("short", r"returned a tensor \[1\] for 3 trajectories"),
        ("number", "returned 1.0 for 3 trajectories"),
    ]:
        with pytest.raises(UserError, match=said) as raised:
            token_weights(batch, f"{file}:{name}", norm=8)
        assert "weights(length_N, group_N, *, norm)" in raised.value.fix
