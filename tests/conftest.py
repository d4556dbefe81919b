"""Shared by all tests: one thread, no network, the same hypothesis examples every time, and the recipe's tiny model."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import copy

import hypothesis
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hybridflow.models.load import load_model

from tiny import CARRY, sft_model

# One thread, unless the tests themselves are tried on several.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
hypothesis.settings.register_profile("hybridflow", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("hybridflow")


@pytest.fixture
def tiny_model() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A fresh Qwen3 of 0.8 M random parameters with ragged attention, and its character tokenizer."""
    return load_model(f"{CARRY}:tiny_qwen3", seed=0)


@pytest.fixture(scope="session")
def _sft() -> PreTrainedModel:
    return sft_model()


@pytest.fixture
def trained_model(_sft: PreTrainedModel) -> PreTrainedModel:
    """The tiny model after a short supervised warm-up, made once per session; every test gets its own copy."""
    return copy.deepcopy(_sft)
