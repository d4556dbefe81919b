"""The recipe on real rows: its configurations are valid, and the whole path can be walked."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import yaml

from hybridflow.cli.main import _kind_of
from hybridflow.config.load import load_config

from runs import metrics, mistake, succeed

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
CONFIGURATIONS = sorted(RECIPES.glob("*/*.yaml"))


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_recipe_configuration_is_valid(path: Path) -> None:
    config = load_config(path, kind=_kind_of(path).config).model_dump()
    assert config["run"]["folder"].startswith("runs/")


def test_the_page_has_the_numbers_of_the_configuration() -> None:
    page = (RECIPES / "gsm8k/README.md").read_text()
    config = load_config(RECIPES / "gsm8k/qwen2.5-0.5b-grpo.yaml")
    t = config.train
    assert t.sequences_per_update is not None
    updates = t.prompts_per_step * t.samples_per_prompt // t.sequences_per_update
    for words in (
        f"{t.prompts_per_step:,} prompts x {t.samples_per_prompt} responses, {updates} updates on "
        f"{t.sequences_per_update:,} responses each",
        f"prompts up to {config.data.max_prompt_tokens} tokens, responses up to {config.rollout.max_response_tokens:,}",
        f"| Steps | {t.steps}, about {round((t.steps or 0) * t.prompts_per_step / 7473)} passes",
        f"lr {yaml.safe_load((RECIPES / 'gsm8k/qwen2.5-0.5b-grpo.yaml').read_text())['optim']['lr']}",
        f"weight {config.algorithm.kl_loss_coef}",
    ):
        assert words in page, words


def published_rows(folder: Path) -> None:
    """Files in GSM8K's own format: sums that are told as stories."""
    rng = random.Random(0)
    for split, count in (("train", 120), ("test", 20)):
        rows = []
        for _ in range(count):
            who, what = rng.choice(["Ann", "Bob", "Carol", "Dave"]), rng.choice(["apples", "books", "coins"])
            a, b = rng.randint(2, 60), rng.randint(2, 60)
            question = f"{who} has {a} {what}. Then {who} finds {b} more {what}. How many {what} does {who} have now?"
            answer = f"{who} has {a}+{b}=<<{a}+{b}={a + b}>>{a + b} {what}.\n#### {a + b}"
            rows.append(json.dumps({"question": question, "answer": answer}))
        (folder / f"{split}.jsonl").write_text("\n".join(rows))


def test_the_tokenizer_says_what_to_run_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    said = mistake(capsys, "check", RECIPES / "gsm8k/sft.yaml")
    assert "no data/gsm8k/train.parquet to make a tokenizer from" in said
    assert "fix: run: hybridflow prepare gsm8k" in said


@pytest.mark.slow
def test_the_whole_path_from_published_rows_to_an_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "published").mkdir()
    published_rows(tmp_path / "published")
    shutil.copytree(RECIPES / "gsm8k", tmp_path / "recipes/gsm8k")
    monkeypatch.chdir(tmp_path)
    quiet = ["track.console=false", "run.device=cpu"]
    succeed(capsys, "prepare", "gsm8k", "--from", "published", "--out", "data/gsm8k")
    said = succeed(capsys, "sft", "recipes/gsm8k/sft.yaml", *quiet, "train.steps=60")
    assert "120 conversations" in said and "tokens, left out: 0" in said
    losses = [m["train/loss"] for m in metrics(tmp_path / "runs/gsm8k-sft")]
    assert losses[-1] < 0.4 * losses[0]
    said = succeed(capsys, "train", "recipes/gsm8k/grpo.yaml", *quiet, "train.steps=2", "eval.max_rows=4")
    assert "reward gsm8k_flexible: the first row's ground truth" in said
    assert [m["step"] for m in metrics(tmp_path / "runs/gsm8k-grpo")] == [0, 1, 2]
    said = succeed(capsys, "eval", "recipes/gsm8k/eval.yaml", "run.device=cpu", "eval.max_rows=4")
    assert "val-core/openai/gsm8k/reward/mean@1" in said
