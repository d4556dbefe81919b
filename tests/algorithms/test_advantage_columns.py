"""Estimators are given what their signature asks for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hybridflow.algorithms import advantage
from hybridflow.algorithms.advantage import ADVANTAGES, advantage_columns
from hybridflow.algorithms.advantage.gae import gae
from hybridflow.batch import Batch


def batch_of_three() -> Batch:
    """Two trajectories; the first is two sequences."""
    return Batch.from_rows(
        {
            "loss_mask_T": [[False, True], [False, True, True], [False, True]],
            "reward_T": [[0.0, 0.25], [0.0, 0.0, 1.0], [0.0, -1.0]],
            "value_T": [[0.0, 0.5], [0.0, 0.5, 0.5], [0.0, 0.1]],
            "length_T": [[1, 1], [1, 1, 1], [1, 1]],
            "bonus_B": [3.0, 3.0, 5.0],
            "group_B": [8, 8, 8],
            "trajectory_B": [4, 4, 2],
        }
    )


def test_one_value_per_trajectory_goes_to_all_tokens_with_loss() -> None:
    columns = advantage_columns("grpo", batch_of_three(), {"normalize_by_std": False, "gamma": 0.5})
    assert columns.keys() == {"advantage_T"}
    assert columns["advantage_T"].tolist() == [0, 1.125, 0, 1.125, 1.125, 0, -1.125]


def test_one_value_per_token_and_a_return() -> None:
    batch = batch_of_three()
    columns = advantage_columns("gae", batch, {"gamma": 0.9, "lam": 0.8, "clip_low": 0.2})
    trajectory_T = torch.tensor([1, 1, 1, 1, 1, 0, 0])
    expected = gae(batch["reward_T"], batch["value_T"], batch["loss_mask_T"], trajectory_T, gamma=0.9, lam=0.8)
    assert columns["advantage_T"].equal(expected[0]) and columns["return_T"].equal(expected[1])


def test_any_column_and_any_key_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def mine(reward_N: Tensor, bonus_N: Tensor, length_T: Tensor, *, scale: float) -> Tensor:
        assert reward_N.tolist() == [-1.0, 1.25] and bonus_N.tolist() == [5.0, 3.0] and len(length_T) == 7
        return scale * bonus_N

    monkeypatch.setitem(advantage.ADVANTAGES, "mine", mine)
    assert ADVANTAGES["mine"] is mine
    columns = advantage_columns("mine", batch_of_three(), {"scale": 2.0})
    assert columns["advantage_T"].tolist() == [0, 6, 0, 6, 6, 0, 10]


def test_no_answers_are_no_error() -> None:
    none = torch.zeros(0)
    columns = {"loss_mask_T": none.bool(), "reward_T": none, "value_T": none}
    batch = Batch({**columns, "group_B": none.long(), "trajectory_B": none.long()}, lengths={"T": []})
    for name, values in [("grpo", {"normalize_by_std": True}), ("gae", {"gamma": 1.0, "lam": 1.0})]:
        assert all(len(column) == 0 for column in advantage_columns(name, batch, values).values())
