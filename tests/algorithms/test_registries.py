"""The configuration's tables and the code's registries name the same pieces."""

from __future__ import annotations

import inspect

import pytest

from hybridflow.algorithms.advantage import ADVANTAGES
from hybridflow.algorithms.aggregation import AGGREGATIONS
from hybridflow.algorithms.policy_loss import POLICY_LOSSES
from hybridflow.config import algorithms as tables
from hybridflow.config.sections import AlgorithmSection


def test_tables_and_registries_have_the_same_keys() -> None:
    assert tables.ADVANTAGES.keys() == ADVANTAGES.keys()
    assert tables.POLICY_LOSSES.keys() == POLICY_LOSSES.keys()
    assert tables.AGGREGATIONS.keys() == AGGREGATIONS.keys()


@pytest.mark.parametrize("preset", tables.PRESETS)
def test_every_preset_is_a_valid_section_of_known_pieces(preset: str) -> None:
    section = AlgorithmSection.model_validate({"preset": preset})
    for key, value in tables.PRESETS[preset].items():
        assert getattr(section, key) == value


def test_own_values_of_the_pieces_have_a_key_in_the_configuration() -> None:
    for function in (*ADVANTAGES.values(), *POLICY_LOSSES.values()):
        own = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
        assert own and set(own) <= set(AlgorithmSection.model_fields)
