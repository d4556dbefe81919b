"""What `hybridflow init` sets for each kind of run, and what it shows beside, because many will want it next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Starter:
    """A configuration to begin with.

    Args:
        data: the key of the rows: what is given as ``--data``.
        begin: keys that are set.
        show: keys that are shown, commented out.
    """

    data: str = "data.train"
    begin: Mapping[str, Any] = field(default_factory=dict)
    show: Mapping[str, Any] = field(default_factory=dict)


RL = Starter(
    begin={
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
    show={
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
)
SFT = Starter(
    begin={
        "run.seed": 0,
        "data.max_tokens": 1024,
        "train.steps": 100,
        "train.sequences_per_update": 16,
        "optim.lr": 1e-5,
        "checkpoint.every": 50,
    },
    show={
        "model.lora": {"rank": 16, "alpha": 32},
        "data.messages_key": "messages",
        "train.stop_below_loss": 0.1,
        "optim.schedule": "linear",
        "optim.warmup_steps": 10,
        "checkpoint.keep": 2,
        "track.tensorboard": True,
    },
)
REWARD_MODEL = Starter(
    begin={
        "run.seed": 0,
        "data.max_tokens": 1024,
        "train.epochs": 1,
        "train.pairs_per_update": 64,
        "optim.lr": 1e-5,
        "checkpoint.every": 50,
    },
    show={
        "data.eval": "pairs-for-evaluation.jsonl",
        "data.prompt_key": "prompt",
        "data.chosen_key": "chosen",
        "data.rejected_key": "rejected",
        "optim.schedule": "linear",
        "optim.warmup_steps": 10,
        "checkpoint.keep": 2,
        "track.tensorboard": True,
    },
)
EVALUATION = Starter(
    data="data.eval",
    begin={
        "run.seed": 0,
        "data.max_prompt_tokens": 512,
        "rollout.max_response_tokens": 512,
        "eval.samples_per_prompt": 1,
        "eval.temperature": 0.0,
    },
    show={"data.prompt_key": "prompt", "data.ground_truth_key": "ground_truth", "eval.max_rows": 200},
)
