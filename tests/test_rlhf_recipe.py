"""The recipe of learning from preferences, with few steps: it runs from end to end, and its pieces fit."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification

from hybridflow.config.locate import load_function

from runs import metrics

RECIPE = Path(__file__).resolve().parents[1] / "recipes/rlhf"
FEW = {
    "sft": ["train.steps=4"],
    "samples": ["eval.samples_per_prompt=2", "rollout.max_response_tokens=6"],
    "reward-model": ["train.epochs=1", "train.pairs_per_update=8", "eval.every=0"],
    "ppo": ["train.steps=2", "train.prompts_per_step=4", "critic.warmup_steps=0", "eval.samples_per_prompt=2"],
    "eval": ["eval.samples_per_prompt=2"],
}


def test_preferences_follow_the_true_one_with_the_noise_of_a_bradley_terry_model() -> None:
    liking, preferences = (load_function(f"{RECIPE / 'task.py'}:{name}") for name in ("liking", "preferences"))
    good, bad = "the fox is kind, wise and rude.", "the fox is kind, rude and rude."
    assert (liking(good, "fox"), liking(bad, "fox"), liking("fox", "fox")) == (3.0, 1.0, -4.0)
    answers = [{"prompt": f"{i}", "response": text} for i in range(4000) for text in (good, bad)]
    rows = preferences(answers, 0)  # of an animal that neither names: 1 and -1
    share = sum(row["chosen"] == good for row in rows) / len(rows)
    assert share == pytest.approx(1 / (1 + 2.718281828**-2), abs=0.016)  # three standard errors


@pytest.mark.slow
def test_it_runs_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(RECIPE), *sys.path])
    for name in ("task", "prefer"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    result = runpy.run_path(str(RECIPE / "rlhf.py"))["run_rlhf"](tmp_path, 0, live=False, more=FEW)
    assert result["pairs"] == 30 and {"before", "after"} <= result.keys()
    assert list(result["learned_reward"]) == [0, 2]
    scorer = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward-model/model")
    assert scorer.config.num_labels == 1
    assert all("critic/vf_loss" in line for line in metrics(tmp_path / "ppo")[1:])
