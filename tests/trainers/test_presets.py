"""Every preset runs: three steps of a tiny run end to end, alone, with corrections of the rollout, and with filters."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from hybridflow.config.load import load_config
from hybridflow.config.locate import load_function
from hybridflow.config.pieces.presets import PRESETS
from hybridflow.config.pieces.tables import ADVANTAGES
from hybridflow.trainers.rl.loop import train

from runs import configuration, metrics
from tiny import CARRY

MODEL = f"""
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM
from hybridflow.config.locate import load_function

def model(seed=0):
    tokenizer = load_function("{CARRY}:make_tokenizer")()
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=128, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config), tokenizer

def teacher(seed=0):
    return model(seed + 1)
"""

# Values differ between almost all answers; `halves` takes two values only, so that some groups are all alike.
REWARD = """
def score(response, ground_truth):
    size = sum(map(ord, response))
    return {"score": size % 101 / 101, "digits": sum(c.isdigit() for c in response), "odd": size % 2}

def halves(response, ground_truth):
    return float(sum(map(ord, response)) % 2)
"""


def sections_of(preset: str, folder: Path, algorithm: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A run of two updates a step, with what the preset needs."""
    needs = ADVANTAGES[PRESETS[preset]["advantage"]]
    sections: dict[str, dict[str, Any]] = {
        "model": {"path": f"{folder}/model.py:model"},
        "reward": {"function": f"{folder}/rewards.py:score"},
        "data": {"eval": None},
        "train": {"steps": 3, "prompts_per_step": 2, "samples_per_prompt": 4, "sequences_per_update": 4},
        "optim": {"lr": 1e-2},
        "track": {"rollouts_every": 0},
        "algorithm": {"preset": preset, **algorithm},
    }
    if needs.needs_critic:
        sections["critic"] = {}
    if needs.needs_reference:
        sections["model"]["reference"] = f"{folder}/model.py:teacher"
    return sections


def run(
    folder: Path, preset: str, algorithm: dict[str, Any] | None = None, learns: bool = True, **more: dict[str, Any]
) -> list[dict[str, Any]]:
    """Trains, holds metrics to be finite and weights to have moved, or not; returns the metrics of each step."""
    (folder / "model.py").write_text(MODEL)
    (folder / "rewards.py").write_text(REWARD)
    sections = sections_of(preset, folder, algorithm or {})
    for name, section in more.items():
        sections[name] = sections.get(name, {}) | section
    train(load_config(configuration(folder, **sections)))
    lines = metrics(folder / "run")[1:]
    assert len(lines) == 3
    for line in lines:
        assert [name for name, value in line.items() if not math.isfinite(value)] == []
    trained = [line for line in lines if "actor/grad_norm" in line]  # a filter may leave a step nothing to learn from
    assert bool(trained) == learns
    assert all(line["actor/grad_norm"] > 0 and line["actor/skipped_nonfinite"] == 0 for line in trained)
    start = load_function(f"{folder}/model.py:model")(seed=sections.get("run", {}).get("seed", 3))[0].state_dict()
    moved = {n: float((t - start[n]).abs().max()) for n, t in load_file(folder / "run/model/model.safetensors").items()}
    assert moved and (max(moved.values()) > 1e-3) == learns and all(math.isfinite(size) for size in moved.values())
    return lines


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_runs(preset: str, tmp_path: Path) -> None:
    lines = run(tmp_path, preset)
    # The second update of a step is no longer on-policy, which every loss of a ratio or a change shows.
    if "actor/ppo_kl" in lines[0]:
        assert any(line["actor/ppo_kl"] != 0 for line in lines)
    if PRESETS[preset]["advantage"] == "distillation":
        assert lines[0]["critic/advantages/mean"] != 0


CORRECTIONS: dict[str, dict[str, Any]] = {
    "decoupled": {"preset": "decoupled_token_is"},
    "decoupled, all levels": {
        "preset": "decoupled_geo_rs_token_tis",
        "normalize": True,
        "reject": {"seq_mean_k1": [0.5, 2.0], "token_k2": [3.0], "seq_max_k3": [9.0]},
    },
    "bypass": {"preset": "bypass_ppo_clip"},
    "bypass, rejected": {"preset": "bypass_ppo_clip_k3_rs"},
    "bypass, weighted": {"preset": "bypass_pg_is"},
}


@pytest.mark.parametrize(
    ("preset", "correction"),
    [
        ("grpo", "decoupled"),
        ("grpo", "bypass"),
        ("grpo", "bypass, rejected"),
        ("rloo", "bypass, weighted"),
        ("clip_cov", "bypass, rejected"),
        ("otb", "decoupled, all levels"),
        *[
            pytest.param(preset, correction, marks=pytest.mark.slow)
            for preset in ("ppo", "gspo", "kl_cov", "gigpo", "dapo", "dro")
            for correction in ("decoupled", "decoupled, all levels", "bypass", "bypass, rejected")
        ],
    ],
)
def test_presets_run_with_corrections(preset: str, correction: str, tmp_path: Path) -> None:
    lines = run(tmp_path, preset, {"correction": CORRECTIONS[correction]})
    for line in lines:
        if "weight" in correction or correction.startswith("decoupled"):
            # The inline engine samples with the very weights that train: the first update's ratios are 1.
            assert line["rollout_corr/rollout_is_mean"] == pytest.approx(1.0, abs=0.5)
        if "rejected" in correction or "levels" in correction:
            assert 0 <= line["rollout_corr/rollout_rs_masked_fraction"] < 1


EXTRAS: dict[str, dict[str, dict[str, Any]]] = {
    "equal rewards": {"filter": {"equal_rewards": True}, "train": {"samples_per_prompt": 2}},
    "overlong": {"filter": {"overlong": True}, "rollout": {"max_response_tokens": 80}},
    "reweighted": {"reweight": {"method": "pow"}},
    "best and worst": {"reweight": {"method": "max_min"}},
    "best and another": {"reweight": {"method": "max_random"}},
}


@pytest.mark.parametrize(
    ("preset", "extra"),
    [
        ("grpo", "equal rewards"),
        ("dapo", "overlong"),
        ("grpo", "reweighted"),
        ("gspo", "best and worst"),
        *[
            pytest.param(preset, extra, marks=pytest.mark.slow)
            for preset in ("ppo", "rloo", "remax", "clip_cov", "gigpo", "gdpo")
            for extra in EXTRAS
        ],
    ],
)
def test_presets_run_with_filters_and_reweighting(preset: str, extra: str, tmp_path: Path) -> None:
    more = {name: dict(section) for name, section in EXTRAS[extra].items()}
    if extra == "equal rewards" and preset != "gdpo":  # gdpo needs the components
        more["reward"] = {"function": f"{tmp_path}/rewards.py:halves"}
    lines = run(tmp_path, preset, **more)
    if "reward" in more:
        assert sum(line["training/filtered_groups/equal"] for line in lines if "training/filtered_groups/equal" in line)
        assert all(line["training/equal_reward_groups"] == 0 for line in lines)


@pytest.mark.parametrize(
    ("preset", "correction"),
    [
        ("ppo", "disabled"),
        ("otb", "decoupled_token_is"),
        ("clip_cov", "bypass_ppo_clip_k3_rs"),
        *[
            pytest.param(preset, correction, marks=pytest.mark.slow)
            for preset in ("vapo", "gdpo", "remax", "gigpo", "distillation", "reinforce_plus_plus", "sppo")
            for correction in ("disabled", "decoupled_geo_rs_seq_tis", "bypass_ppo_clip_geo_rs")
        ],
    ],
)
def test_a_step_without_a_whole_answer_changes_nothing(preset: str, correction: str, tmp_path: Path) -> None:
    """All answers are cut at their first token, none is left by the filter."""
    run(
        tmp_path,
        preset,
        {"correction": {"preset": correction}},
        learns=False,
        run={"seed": 5},
        filter={"overlong": True},
        rollout={"max_response_tokens": 1},
    )
