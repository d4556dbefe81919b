"""No number of a configuration is infinite or not a number, whatever its key."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel, ValidationError

from hybridflow.config.kinds.eval import EvalConfig
from hybridflow.config.kinds.reward_model import RewardModelConfig
from hybridflow.config.kinds.rl import RlConfig
from hybridflow.config.kinds.sft import SftConfig

from runs import configuration, mistake


def sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections in an annotation, whatever they stand in, and those in them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
        for field in annotation.model_fields.values():
            yield from sections_in(field.annotation)
    for part in get_args(annotation):
        yield from sections_in(part)


def holds_float(annotation: Any) -> bool:
    return annotation is float or any(map(holds_float, get_args(annotation)))


FLOATS = sorted(
    {
        (section, name)
        for config in (RlConfig, SftConfig, EvalConfig, RewardModelConfig)
        for section in sections_in(config)
        for name, field in section.model_fields.items()
        if holds_float(field.annotation)
    },
    key=str,
)


@pytest.mark.parametrize(("section", "name"), FLOATS, ids=[f"{s.__name__}.{n}" for s, n in FLOATS])
def test_no_number_of_a_configuration_is_without_end(section: type[BaseModel], name: str) -> None:
    shape = str(section.model_fields[name].annotation)
    for value in (math.inf, -math.inf, math.nan):
        given: Any = [value, value] if "tuple" in shape else value
        if "dict" in shape:
            given = {"1": [value] if "list" in shape else value}
        with pytest.raises(ValidationError) as caught:
            section.model_validate({name: given})
        found = {e["type"] for e in caught.value.errors() if e["loc"][0] == name}
        assert found & {"finite_number", "greater_than", "greater_than_equal", "less_than", "less_than_equal"}, found


def test_there_are_many() -> None:
    assert len(FLOATS) > 60


@pytest.mark.parametrize("text", [".inf", "-.inf", ".nan", "1e999"])
def test_the_message_names_the_key(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = mistake(capsys, "check", configuration(tmp_path), f"optim.weight_decay={text}")
    assert "optim.weight_decay: input should be" in said
