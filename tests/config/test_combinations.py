"""Pieces of an algorithm that do not go together are refused, in words, before torch is imported."""

from __future__ import annotations

from typing import Any

import pytest

from hybridflow.config.kinds.rl import RlConfig
from hybridflow.config.load import validate
from hybridflow.errors import UserError

PPO: dict[str, Any] = {
    "run": {"folder": "runs/x"},
    "model": {"path": "m"},
    "data": {"train": "t.jsonl", "max_prompt_tokens": 100},
    "reward": {"function": "r.py:score"},
    "rollout": {"max_response_tokens": 200},
    "algorithm": {"preset": "ppo"},
    "critic": {},
    "train": {"steps": 30, "prompts_per_step": 4, "samples_per_prompt": 1},
}
ADAPTIVE = {"kl_reward_coef": 0.1, "kl_controller": "adaptive", "kl_target": 0.05}


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"critic": {"shared_trunk": True}, "algorithm": {"preset": "ppo", "value_coef": 0.5}},
        {"critic": {"path": "c", "lora": {}, "optim": {"lr": 1e-5}, "warmup_steps": 29}},
        {"algorithm": {"preset": "ppo", "kl_horizon": 50, **ADAPTIVE}, "model": {"path": "m", "reference": "r"}},
        {"algorithm": {"preset": "ppo", "kl_loss_coef": 0.1, "kl_loss_estimator": "k2", "gamma": 0.9, "lam": 0.5}},
        {"algorithm": {"preset": "dr_grpo", "kl_loss_coef": 0.1}, "critic": None,
         "train": {"steps": 3, "prompts_per_step": 4, "samples_per_prompt": 2}},
        {"algorithm": {"preset": "ppo", "advantage": "grpo"}, "critic": None,
         "train": {"steps": 3, "prompts_per_step": 4, "samples_per_prompt": 2}},
    ],
)  # fmt: skip
def test_what_goes_together(changed: dict[str, Any]) -> None:
    config = validate(RlConfig, PPO | changed)
    # What a run writes down of itself can be read again.
    assert validate(RlConfig, config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"critic": None}, "the gae advantage needs a critic: give a critic section (`critic: {}` is enough)"),
        ({"algorithm": {"preset": "ppo", "advantage": "grpo"},
          "train": {"steps": 3, "prompts_per_step": 4, "samples_per_prompt": 2}},
         "there is a critic section, but the grpo advantage uses no critic (these do: gae, vapo_gae)"),
        ({"critic": {"shared_trunk": True, "path": "c"}}, "critic.path is set, but with critic.shared_trunk"),
        ({"critic": {"shared_trunk": True, "optim": {}}}, "critic.optim is set, but with critic.shared_trunk"),
        ({"critic": {"shared_trunk": True, "warmup_steps": 2}}, "critic.warmup_steps needs a critic of its own"),
        ({"critic": {"shared_trunk": True}, "algorithm": {"preset": "ppo", "value_coef": 0}},
         "algorithm.value_coef is 0"),
        ({"critic": {"warmup_steps": 30}}, "critic.warmup_steps is 30, but train.steps is 30: no actor is trained"),
        ({"algorithm": {"preset": "ppo", "value_coef": 0.7}}, "algorithm.value_coef is for a critic that shares"),
        ({"algorithm": {"preset": "ppo", "normalize_by_std": False}},
         "algorithm.normalize_by_std is False, but neither the gae advantage nor the ppo_clip policy loss uses it"),
        ({"algorithm": {"preset": "ppo", "kl_reward_estimator": "k3"}}, "algorithm.kl_reward_coef is 0"),
        ({"algorithm": {"preset": "ppo", "kl_loss_estimator": "k2"}}, "algorithm.kl_loss_coef is 0"),
        ({"algorithm": {"preset": "ppo", "kl_controller": "adaptive", "kl_target": 1}},
         "algorithm.kl_controller is adaptive, but algorithm.kl_reward_coef is 0"),
        ({"algorithm": {"preset": "ppo", "kl_reward_coef": 1, "kl_controller": "adaptive"}},
         "algorithm.kl_controller adaptive needs algorithm.kl_target"),
        ({"algorithm": {"preset": "ppo", "kl_reward_coef": 1, "kl_target": 1}}, "it is fixed"),
        ({"algorithm": {"preset": "ppo", "kl_loss_coef": 1, "kl_loss_estimator": "k4"}},
         "unknown kl_loss_estimator 'k4'; known: abs, abs+, k1, k1+, k2, k3, k3+, "),
        ({"model": {"path": "m", "reference": "r"}}, "model.reference is set, but"),
    ],
)  # fmt: skip
def test_what_does_not(changed: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        validate(RlConfig, PPO | changed)
    assert expected in caught.value.what
