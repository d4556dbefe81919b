"""A commented configuration to begin with: `hybridflow init`."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from hybridflow.config.describe import COMMANDS, keys_of
from hybridflow.config.explain import as_yaml
from hybridflow.config.load import validate
from hybridflow.config.overrides import apply_override
from hybridflow.config.paths import home
from hybridflow.errors import UserError, typed

# What a starter sets, and what it shows commented out because many will want it next.
BEGIN: dict[str, dict[str, Any]] = {
    "train": {
        "run.seed": 0,
        "data.max_prompt_tokens": 512,
        "rollout.temperature": 1.0,
        "rollout.max_response_tokens": 512,
        "algorithm.preset": "grpo",
        "train.steps": 100,
        "train.prompts_per_step": 16,
        "train.samples_per_prompt": 8,
        "optim.lr": 1e-6,
        "checkpoint.every": 25,
    },
    "sft": {
        "run.seed": 0,
        "data.max_tokens": 1024,
        "train.steps": 100,
        "train.sequences_per_update": 16,
        "optim.lr": 1e-5,
        "checkpoint.every": 50,
    },
    "reward-model": {
        "run.seed": 0,
        "data.max_tokens": 1024,
        "train.epochs": 1,
        "train.pairs_per_update": 64,
        "optim.lr": 1e-5,
        "checkpoint.every": 50,
    },
    "eval": {
        "run.seed": 0,
        "data.max_prompt_tokens": 512,
        "rollout.max_response_tokens": 512,
        "eval.samples_per_prompt": 1,
        "eval.temperature": 0.0,
    },
}
SHOW: dict[str, dict[str, Any]] = {
    "train": {
        "model.lora": {"rank": 16, "alpha": 32},
        "data.eval": "rows-for-evaluation.jsonl",
        "data.prompt_key": "prompt",
        "data.ground_truth_key": "ground_truth",
        "train.sequences_per_update": 32,
        "optim.warmup_steps": 10,
        "eval.every": 10,
        "checkpoint.keep": 2,
        "track.tensorboard": True,
    },
    "sft": {
        "model.lora": {"rank": 16, "alpha": 32},
        "data.messages_key": "messages",
        "train.stop_below_loss": 0.1,
        "optim.schedule": "linear",
        "optim.warmup_steps": 10,
        "checkpoint.keep": 2,
        "track.tensorboard": True,
    },
    "reward-model": {
        "data.eval": "pairs-for-evaluation.jsonl",
        "data.prompt_key": "prompt",
        "data.chosen_key": "chosen",
        "data.rejected_key": "rejected",
        "optim.schedule": "linear",
        "optim.warmup_steps": 10,
        "checkpoint.keep": 2,
        "track.tensorboard": True,
    },
    "eval": {"data.prompt_key": "prompt", "data.ground_truth_key": "ground_truth", "eval.max_rows": 200},
}
WHAT = {
    "train": "Reinforcement learning",
    "sft": "Supervised fine-tuning",
    "reward-model": "A reward model",
    "eval": "An evaluation",
}
WIDTH = 100


def _limits(model: str, begin: dict[str, Any]) -> dict[str, Any]:
    """Lengths that fit a model whose folder tells its context: a prompt and its answer get half of it each."""
    for folder in (home(model), home(model) / "model"):
        with suppress(OSError, ValueError, AttributeError):  # `hybridflow check` says what is wrong with it
            values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            context = values.get("max_position_embeddings")
            if isinstance(context, int):
                share = {"data.max_tokens": context}
                return {k: min(v, share.get(k, context // 2)) for k, v in begin.items() if k.endswith("_tokens")}
    return {}


def starter(
    kind: str, *, file: str, folder: str, model: str, data: str, reward: str | None, overrides: Sequence[str] = ()
) -> str:
    """The text of a YAML file; it is a valid configuration.

    Args:
        kind: "train", "sft", "reward-model" or "eval".
        file: where it will be written, for the commands in its head.
        folder: ``run.folder``.
        model: ``model.path``.
        data: ``data.train``, or ``data.eval`` for an evaluation.
        reward: ``reward.function``; None for supervised fine-tuning and reward models.
        overrides: ``dotted.key=value``, instead of what a starter has or besides.

    Raises:
        UserError: no reward where one is needed, or an override that does not fit.
    """
    if (reward is None) != (kind in ("sft", "reward-model")):
        need = "needs none" if reward else "needs a reward"
        raise UserError(
            f"a configuration for {kind} {need}",
            fix="leave --reward out" if reward else "give --reward file.py:function, or the name of a built-in one",
        )
    named = {"run.folder": folder, "model.path": model, f"data.{'eval' if kind == 'eval' else 'train'}": data}
    values: dict[str, Any] = {}
    begin = {**BEGIN[kind], **_limits(model, BEGIN[kind])}
    for key, value in {**named, **({"reward.function": reward} if reward else {}), **begin}.items():
        section, _, name = key.partition(".")
        values.setdefault(section, {})[name] = value
    for text in overrides:
        apply_override(values, text)
    values = {section: {k: v for k, v in inner.items() if v is not None} for section, inner in values.items()}
    validate(COMMANDS[kind], values, source="the new configuration")
    return "\n".join([*_head(kind, file), *_sections(kind, values)]) + "\n"


def _head(kind: str, file: str) -> Iterator[str]:
    yield f"# {WHAT[kind]}, begun with `hybridflow init`. What is commented out is a choice, not a default."
    yield "#"
    yield f"#     {typed('check', file)}                  finds what is wrong, and shows the first row as tokens"
    yield f"#     {typed(kind, file)}"
    yield f"#     {typed('check', file)} --explain KEY    a key or a section, such as optim"
    yield "#"
    yield "# Your editor completes keys with a schema, and a first line that names it:"
    yield f"#     hybridflow schema {kind} > {kind}.schema.json"
    yield f"#     # yaml-language-server: $schema={kind}.schema.json"


def _sections(command: str, values: dict[str, Any]) -> Iterator[str]:
    shown = SHOW[command]
    for section in COMMANDS[command].model_fields:
        known = [key for key in keys_of(COMMANDS[command]) if key.name.startswith(f"{section}.")]
        lines = []
        for key in known:
            name = key.name.removeprefix(f"{section}.")
            live = name in values.get(section, {})
            if "." in name or not (live or key.name in shown):
                continue
            lines += [f"  # {line}" for line in textwrap.wrap(key.description, WIDTH - 4)]
            value = values[section][name] if live else shown[key.name]
            lines.append(f"  {'' if live else '# '}{name}: {as_yaml(value)}")
        if lines:
            yield from (f"\n{section}:", *lines)
