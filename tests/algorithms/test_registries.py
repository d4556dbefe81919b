"""The configuration's tables and the code's registries name the same pieces."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch

from hybridflow.algorithms.advantage import ADVANTAGES, advantage_columns
from hybridflow.algorithms.aggregation import AGGREGATIONS
from hybridflow.algorithms.kl import KL_ESTIMATORS
from hybridflow.algorithms.policy_loss import POLICY_LOSSES
from hybridflow.config import algorithms as tables
from hybridflow.config.sections import AlgorithmSection

from golden import golden_batch


def test_tables_and_registries_have_the_same_keys() -> None:
    assert tables.ADVANTAGES.keys() == ADVANTAGES.keys()
    assert tables.POLICY_LOSSES.keys() == POLICY_LOSSES.keys()
    assert tables.AGGREGATIONS.keys() == AGGREGATIONS.keys()
    assert set(tables.KL_ESTIMATORS) == KL_ESTIMATORS.keys()


@pytest.mark.parametrize("preset", tables.PRESETS)
def test_every_preset_is_a_valid_section_of_known_pieces(preset: str) -> None:
    section = AlgorithmSection.model_validate({"preset": preset})
    for key, value in tables.PRESETS[preset].items():
        assert getattr(section, key) == value


def parameters(function: Callable[..., object], kind: object) -> list[str]:
    return [p.name for p in inspect.signature(function).parameters.values() if p.kind is kind]


@pytest.mark.parametrize("kind", ["ADVANTAGES", "POLICY_LOSSES"])
def test_the_tables_say_what_the_signatures_ask_for(kind: str) -> None:
    table: dict[str, tables.Needs] = getattr(tables, kind)
    for name, function in {"ADVANTAGES": ADVANTAGES, "POLICY_LOSSES": POLICY_LOSSES}[kind].items():
        own = parameters(function, inspect.Parameter.KEYWORD_ONLY)
        assert table[name].values == tuple(own) and own, name
        assert set(own) <= set(AlgorithmSection.model_fields), name
        for value in own:  # the configuration and the function agree on what is not given
            default = inspect.signature(function).parameters[value].default
            assert default == AlgorithmSection.model_fields[value].default, (name, value)
        given = parameters(function, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        assert table[name].needs_critic == ("value_T" in given), name
        assert not table[name].needs_group or "group_N" in given, name


def test_estimators_that_need_a_critic_give_it_something_to_learn() -> None:
    batch = golden_batch()
    batch["reward_T"] = batch["value_T"] = torch.zeros(batch.total())
    for name, needs in tables.ADVANTAGES.items():
        columns = advantage_columns(name, batch, AlgorithmSection.model_validate({}).model_dump())
        assert ("return_T" in columns) == needs.needs_critic
        assert columns["advantage_T"].shape == (batch.total(),)
