"""Liger's kernels are refused where they cannot run, before a model is loaded."""

from __future__ import annotations

import importlib.machinery
import sys
import types

import pytest
import torch

from hybridflow.config.sections.model import ModelSection
from hybridflow.errors import UserError
from hybridflow.models.lora import load_trainable

NOWHERE = ModelSection(path="a-folder-that-is-not-there", liger=True)


def test_without_triton_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(UserError, match=r"model.liger needs triton.* not installed") as caught:
        load_trainable(NOWHERE, seed=0)
    assert "hybridflow[liger]" in str(caught.value) and "leave out model.liger" in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("triton", "liger_kernel"):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(UserError, match=r"model\.liger needs a GPU"):
        load_trainable(NOWHERE, seed=0)
