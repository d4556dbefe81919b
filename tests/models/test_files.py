"""A model's weights on disk: only those of the same model are taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hybridflow.errors import UserError
from hybridflow.models.files import assign_weights


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"bias": None}, "it lacks bias"),
        ({"scale": torch.ones(1)}, "it has scale, which the model lacks"),
        ({"weight": torch.ones(3, 2)}, "weight is (3, 2) there and (2, 3) here"),
        ({"bias": None, "weight": torch.ones(1)}, "it lacks bias; weight is (1,) there and (2, 3) here"),
    ],
)
def test_weights_of_another_model_are_refused_whole(change: dict[str, Any], expected: str, tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    tensors = {n: torch.zeros_like(t) for n, t in model.state_dict().items()} | change
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(UserError) as caught:
        assign_weights(model, {n: t for n, t in tensors.items() if t is not None}, source=tmp_path)
    assert caught.value.what == f"the checkpoint {tmp_path} is from another model: {expected}"
    assert all(t.equal(before[n]) for n, t in model.state_dict().items())
    assign_weights(model, {n: t + 1 for n, t in before.items()}, source=tmp_path)
    assert all(t.equal(before[n] + 1) for n, t in model.state_dict().items())
