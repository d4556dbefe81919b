"""The value head on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hybridflow.errors import UserError
from hybridflow.models.value import ValueHead, read_value_head, write_value_head


def test_a_head_is_read_as_it_was_written(tmp_path: Path) -> None:
    head, other = ValueHead(5), ValueHead(5)
    with torch.no_grad():
        head.weight.copy_(torch.randn(5))
        head.bias.fill_(0.1)
    write_value_head(head, tmp_path)
    read_value_head(other, tmp_path)
    assert other.weight.equal(head.weight) and other.bias.equal(head.bias)


def test_a_checkpoint_without_a_head_or_with_one_of_another_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no value head of this size"):
        read_value_head(ValueHead(5), tmp_path)
    write_value_head(ValueHead(4), tmp_path)
    with pytest.raises(UserError, match="has no value head of this size"):
        read_value_head(ValueHead(5), tmp_path)
