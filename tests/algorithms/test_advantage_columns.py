"""Estimators are given what their signature asks for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hybridflow.algorithms.advantage import registry as advantage
from hybridflow.algorithms.advantage.gae import gae
from hybridflow.algorithms.advantage.registry import ADVANTAGES, advantage_columns
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


# A group of equal rewards (and components) has an advantage of exactly 0 with these; docs/algorithms.md says so.
ZERO_AT_EQUAL = {"grpo", "grpo_passk", "rloo", "opo", "gpg", "maxrl", "gdpo", "gigpo"}


def equal_beside_others(seed: int, worth: float) -> Batch:
    """Three groups of three answers of random lengths; those of group 0 are all worth the same."""
    random = torch.Generator().manual_seed(seed)
    lengths = (torch.randint(1, 6, (9,), generator=random) + 1).tolist()
    rewards = [worth] * 3 + torch.rand(6, generator=random).tolist()
    columns = {
        name: [torch.rand(n, generator=random).tolist() for n in lengths] for name in ("value_T", "sum_pi_squared_T")
    }
    columns |= {
        name: [(-torch.rand(n, generator=random)).tolist() for n in lengths] for name in ("old_logp_T", "ref_logp_T")
    }
    return Batch.from_rows(
        columns
        | {
            "loss_mask_T": [[False] + [True] * (n - 1) for n in lengths],
            "reward_T": [[0.0] * (n - 1) + [r] for n, r in zip(lengths, rewards)],
            "components_BK": [[r, 2 * r] for r in rewards],
            "baseline_B": [0.25] * 9,
            "group_B": [g for g in range(3) for _ in range(3)],
            "trajectory_B": list(range(9)),
        }
    )


@pytest.mark.parametrize("name", sorted(ADVANTAGES))
def test_which_estimators_give_a_group_of_equal_rewards_exactly_nothing(name: str) -> None:
    values = {"normalize_by_std": True, "gamma": 1.0, "lam": 0.95, "lam_critic": 1.0, "length_alpha": 0.05}
    values |= {"reward_weights": None, "step_weight": 1.0}
    largest = []
    for seed in range(20):
        batch = equal_beside_others(seed, [0.0, 0.1, 1.0][seed % 3])
        advantage_T = advantage_columns(name, batch, values)["advantage_T"]
        largest.append(float(advantage_T[: sum(batch.lengths()[:3])].abs().max()))
        assert float(advantage_T.abs().max()) > 0
    assert (max(largest) == 0) == (name in ZERO_AT_EQUAL), largest


def test_the_page_names_the_same_estimators() -> None:
    page = (Path(__file__).parents[2] / "docs/algorithms.md").read_text()
    (sentence,) = re.findall(
        r"Members of a group of equal rewards have an advantage of\s+exactly 0 with([^.]*)\.", page
    )
    assert set(re.findall(r"`(\w+)`", sentence)) == ZERO_AT_EQUAL
