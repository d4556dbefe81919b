"""Shared by all tests: one thread, no network, the same hypothesis examples every time, and the recipe's tiny model.

What takes seconds to import is imported by the processes that run tests, not by the one that only deals them out.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import copy
import gc
from typing import TYPE_CHECKING

import hypothesis
import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

hypothesis.settings.register_profile("hybridflow", deadline=None, derandomize=True, max_examples=40)
hypothesis.settings.load_profile("hybridflow")


def pytest_collection() -> None:
    """Sets one thread, unless the tests themselves are tried on several."""
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def pytest_collection_finish() -> None:
    """Takes what was imported out of the collector's sight: it would look through a million objects again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def tiny_model() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A fresh Qwen3 of 0.8 M random parameters with ragged attention, and its character tokenizer."""
    from hybridflow.models.load import load_model

    from tiny import CARRY

    return load_model(f"{CARRY}:tiny_qwen3", seed=0)


@pytest.fixture(scope="session")
def _sft() -> PreTrainedModel:
    from tiny import sft_model

    return sft_model()


@pytest.fixture
def trained_model(_sft: PreTrainedModel) -> PreTrainedModel:
    """The tiny model after a short supervised warm-up, made once per session; every test gets its own copy."""
    return copy.deepcopy(_sft)
