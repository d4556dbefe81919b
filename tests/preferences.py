"""Preferences and small classifiers for tests; a configuration names functions in here."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import (
    AutoModelForSequenceClassification,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen3Config,
)

from hybridflow.config.kinds.reward_model import RewardModelConfig
from hybridflow.config.load import validate
from hybridflow.config.locate import load_function

from tiny import CARRY, SIZES

WORDS = 100  # of the carry tokenizer
FAMILIES = {
    "qwen2": Qwen2Config(**SIZES | {"vocab_size": WORDS}),
    "qwen3": Qwen3Config(**SIZES | {"vocab_size": WORDS}, head_dim=8),
    "llama": LlamaConfig(**SIZES | {"vocab_size": WORDS}),
    "mistral": MistralConfig(**SIZES | {"vocab_size": WORDS}, sliding_window=8),
    "gemma2": Gemma2Config(**SIZES | {"vocab_size": WORDS}, head_dim=8, sliding_window=8, query_pre_attn_scalar=16),
    "gpt2": GPT2Config(vocab_size=WORDS, n_embd=32, n_layer=2, n_head=4, n_positions=128),  # not known to pack
}


def tokenizer() -> PreTrainedTokenizerBase:
    found: PreTrainedTokenizerBase = load_function(f"{CARRY}:make_tokenizer")()
    return found


def classifier(kind: str = "qwen3", seed: int = 0, labels: int = 1) -> PreTrainedModel:
    """A classifier of about 20 thousand parameters; norms are random too."""
    config = copy.deepcopy(FAMILIES[kind])
    config.num_labels, config.pad_token_id, config.bos_token_id, config.eos_token_id = labels, 0, None, 1
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def saved_classifier(folder: Path, kind: str = "qwen3", **values: Any) -> Path:
    """The same in a folder, with the carry tokenizer."""
    classifier(kind, **values).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def small_classifier(seed: int = 0) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """For ``model.path``."""
    return classifier("qwen3", seed), tokenizer()


def pairs(seed: int = 0, count: int = 60) -> list[dict[str, Any]]:
    """Rows in which the answer with more 'a' than the other was preferred."""
    rng, rows = random.Random(seed), []
    while len(rows) < count:
        one, other = ("".join(rng.choices("abc", k=rng.randint(3, 12))) for _ in range(2))
        if one.count("a") > other.count("a"):
            rows.append({"prompt": f"row {len(rows)}", "chosen": one, "rejected": other})
    return rows


def config_of(folder: Path, **sections: dict[str, Any]) -> RewardModelConfig:
    """A small run in ``folder/run``; sections are laid over the small values."""
    return validate(RewardModelConfig, values_of(folder, sections))


def yaml_of(folder: Path, **sections: dict[str, Any]) -> str:
    """The same as a file."""
    path = folder / "reward-model.yaml"
    path.write_text(yaml.safe_dump(values_of(folder, sections)))
    return str(path)


def values_of(folder: Path, sections: dict[str, dict[str, Any]]) -> dict[str, Any]:
    values: dict[str, dict[str, Any]] = {
        "run": {"folder": str(folder / "run"), "seed": 3, "threads": 1, "device": "cpu"},
        "model": {"path": f"{__file__}:small_classifier"},
        "data": {"train": f"{__file__}:pairs", "eval": f"{__file__}:pairs", "max_tokens": 64},
        "train": {"steps": 4, "pairs_per_update": 6},
        "optim": {"lr": 3e-3},
        "track": {"console": False},
    }
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    return values
