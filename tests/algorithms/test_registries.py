"""The configuration's tables and the code's registries name the same pieces."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from hybridflow.algorithms.advantage.registry import ADVANTAGES, advantage_columns
from hybridflow.algorithms.aggregation import AGGREGATIONS
from hybridflow.algorithms.kl import KL_ESTIMATORS
from hybridflow.algorithms.pieces import ABSENT, call, columns_read
from hybridflow.algorithms.policy_loss.registry import POLICY_LOSSES, STATISTICS
from hybridflow.config.pieces import tables
from hybridflow.config.pieces.needs import needs_from
from hybridflow.config.pieces.presets import PRESETS
from hybridflow.config.sections.algorithm import AlgorithmSection

from golden import ALGORITHM, golden_batch


def test_tables_and_registries_have_the_same_keys() -> None:
    assert tables.ADVANTAGES.keys() == ADVANTAGES.keys()
    assert tables.POLICY_LOSSES.keys() == POLICY_LOSSES.keys()
    assert tables.AGGREGATIONS.keys() == AGGREGATIONS.keys()
    assert set(tables.KL_ESTIMATORS) == KL_ESTIMATORS.keys()


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_valid_section_of_known_pieces(preset: str) -> None:
    section = AlgorithmSection.model_validate({"preset": preset})
    for key, value in PRESETS[preset].items():
        assert getattr(section, key) == value


def test_a_default_stands_in_for_what_there_is_not_and_for_no_failure() -> None:
    """A lookup that fails inside is a fault of ours, or of the user's function, and must not pass as a default."""

    def lost(name: str) -> object:
        return {}[f"{name} of a table"] if name == "depth" else ABSENT

    assert call(lambda width=2: width, lost) == 2
    with pytest.raises(KeyError, match="depth of a table"):
        call(lambda depth=2: depth, lost)
    with pytest.raises(KeyError, match="in the function"):
        call(lambda width=2: {}["in the function"], lost)
    with pytest.raises(KeyError, match="width"):
        call(lambda width: width, lost)


def parameters(function: Callable[..., object], kind: object) -> list[str]:
    return [p.name for p in inspect.signature(function).parameters.values() if p.kind is kind]


def needs(function: Callable[..., object]) -> tables.Needs:
    """What the signature asks for, by the rule for functions of the user's own."""
    given = parameters(function, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return needs_from(given, parameters(function, inspect.Parameter.KEYWORD_ONLY))


def assert_defaults_agree(function: Callable[..., object], name: str) -> None:
    """The configuration and the function agree on what is not given; a function without a default leaves it to the
    configuration."""
    for value in parameters(function, inspect.Parameter.KEYWORD_ONLY):
        default = inspect.signature(function).parameters[value].default
        if default is not inspect.Parameter.empty:
            assert default == AlgorithmSection.model_fields[value].default, (name, value)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_the_table_says_what_an_estimator_asks_for(name: str) -> None:
    function, table = ADVANTAGES[name], tables.ADVANTAGES[name]
    assert needs(function) == replace(table, needs_rollout_logp=False)
    assert set(table.values) <= set(AlgorithmSection.model_fields)
    assert_defaults_agree(function, name)


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_the_table_says_what_a_loss_asks_for(name: str) -> None:
    function, table = POLICY_LOSSES[name], tables.POLICY_LOSSES[name]
    found = needs(function)
    assert (found.values, found.needs_rollout_logp) == (table.values, table.needs_rollout_logp)
    assert set(table.values) <= set(AlgorithmSection.model_fields)
    assert_defaults_agree(function, name)
    made = {column for column in columns_read(function) if column.startswith("cov_")}
    assert bool(made) == table.statistics == (name in STATISTICS)


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_answers_without_an_advantage_have_no_loss_unless_the_table_says_so(name: str) -> None:
    """Those are left out before the forward pass."""
    values = ALGORITHM
    logp_M = torch.tensor([-1.0, -0.5, -2.0], requires_grad=True)
    columns = {"old_logp_M": logp_M.detach() + torch.tensor([0.3, -0.4, 0.1]), "advantage_M": torch.zeros(3)}
    columns |= {"rollout_logp_M": columns["old_logp_M"] + 0.1, "sequence_M": torch.tensor([0, 0, 1])}
    columns |= {"cov_keep_M": torch.ones(3), "cov_penalty_M": torch.ones(3), "logp_M": logp_M}
    loss_M, _ = call(POLICY_LOSSES[name], lambda p: columns[p] if p in columns else values[p])
    loss_M.sum().backward()
    assert logp_M.grad is not None
    assert bool(logp_M.grad.abs().sum() > 0) == tables.POLICY_LOSSES[name].every_answer


def test_the_tables_say_which_values_the_statistics_take() -> None:
    assert tables.STATISTICS.keys() == STATISTICS.keys()
    for name, function in STATISTICS.items():
        assert tables.STATISTICS[name] == tuple(parameters(function, inspect.Parameter.KEYWORD_ONLY))
        assert_defaults_agree(function, name)


def test_estimators_that_need_a_critic_give_it_something_to_learn() -> None:
    batch = golden_batch()
    batch["components_BK"] = torch.arange(8.0).reshape(4, 2)
    batch["baseline_B"] = torch.zeros(4)
    for name in ("reward_T", "value_T", "old_logp_T", "ref_logp_T", "sum_pi_squared_T"):
        batch[name] = torch.linspace(0, 1, batch.total())
    for name, table in tables.ADVANTAGES.items():
        columns = advantage_columns(name, batch, ALGORITHM)
        assert ("return_T" in columns) == table.needs_critic
        assert columns["advantage_T"].shape == (batch.total(),)
        assert not columns["advantage_T"][~batch["loss_mask_T"]].any()
