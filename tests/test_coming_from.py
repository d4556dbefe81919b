"""The pages for users of TRL and verl: what stands on them runs, and what those users bring works or is told ours."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import hybridflow as hf
from hybridflow.cli.main import main
from hybridflow.config.load import validate
from test_docs import blocks, written_files

from runs import metrics
from tiny import CARRY

DOCS = CARRY.parents[2] / "docs"
MODEL = f"{CARRY}:tiny_qwen3"
QUICK: dict[str, Any] = {
    "run": {"threads": 1, "device": "cpu"},
    "rollout": {"max_response_tokens": 8},
    "data": {"max_prompt_tokens": 128},
    "train": {"steps": 1, "prompts_per_step": 2, "samples_per_prompt": 2},
    "eval": {"before_training": False},
    "track": {"console": False},
}
CHAT = [{"prompt": [{"role": "user", "content": f"{i}+1="}], "answer": str(i + 1), "level": i} for i in range(4)]
PLAIN = [{"prompt": f"{i}+1=", "solution": str(i + 1)} for i in range(4)]
VERL = [
    {
        "data_source": "sums",
        "prompt": [{"role": "user", "content": f"{i}+1="}],
        "reward_model": {"style": "rule", "ground_truth": str(i + 1)},
        "extra_info": {"index": i},
    }
    for i in range(4)
]


def pages_commands(page: str, folder: Path) -> None:
    """Runs every command of a page, with the files that it tells the reader to write."""
    written_files(DOCS / page, folder)
    (folder / "recipes").symlink_to(CARRY.parents[1])
    for line in "".join(blocks(DOCS / page, "sh")).splitlines():
        program, *words = shlex.split(line)
        assert program == "hybridflow"
        quick = ["track.console=false", "run.threads=1", "run.device=cpu"] if words[0] == "train" else []
        assert main([*words, *quick]) == 0, line


def test_the_commands_for_users_of_trl_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pages_commands("coming-from-trl.md", tmp_path)
    assert len(metrics(tmp_path / "runs/exact")) >= 2
    (program,) = [block for block in blocks(DOCS / "coming-from-trl.md", "python") if "hf.train(" in block]
    program = program.replace("Qwen/Qwen2.5-0.5B-Instruct", MODEL).replace("runs/exact", "runs/program")
    program = program.replace('"steps": 100, "prompts_per_step": 8, "samples_per_prompt": 8', '"steps": 1')
    program = re.sub(r"\n\)$", f"\n    config={QUICK!r},\n)", program.rstrip())
    exec(compile(program, "page", "exec"), {"__name__": "page"})
    assert len(metrics(tmp_path / "runs/program")) == 1


def test_the_commands_for_users_of_verl_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    pages_commands("coming-from-verl.md", tmp_path)
    said = capsys.readouterr().out
    assert "ground truth '5' given as the response scores 1 (components: long)" in said
    assert "train.sequences_per_update counts responses (verl's ppo_mini_batch_size: prompts)" in said
    assert len(metrics(tmp_path / "runs/from-verl")) >= 1


def exact(completions: Any, answer: list[str], **columns: Any) -> list[float]:
    assert columns["level"][0] == int(answer[0]) - 1
    assert all(columns["completion_ids"]), "an empty response has its end token, where the reward is tried too"
    return [float(a in c[0]["content"]) for c, a in zip(completions, answer)]


def some(completions: Any, **columns: Any) -> list[float | None]:
    """Judges every second response alone."""
    return [None if i % 2 else 1.0 for i, _ in enumerate(completions)]


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> dict[str, float]:
    assert data_source == "sums" and int(ground_truth) == extra_info["index"] + 1
    return {"score": len(solution_str) / 100, "acc": float(ground_truth in solution_str)}


def compute_batch(data_sources: Any, solution_strs: Any, ground_truths: Any, extra_infos: Any) -> list[float]:
    return [float(truth in text) for text, truth in zip(solution_strs, ground_truths)]


def test_rewards_and_rows_of_trl_and_verl_train_as_they_are(tmp_path: Path) -> None:
    def train(name: str, rows: Any, reward: Any, **sections: Any) -> dict[str, float]:
        given = {"model": MODEL, "data": rows, "reward": reward, "folder": tmp_path / name, "config": QUICK}
        return hf.train(**given | sections).metrics[-1]

    found = train("trl", CHAT, [exact, some])
    assert found["reward/some/min"] == found["reward/some/max"] == 1.0, "of those that it judges"
    assert found["critic/score/mean"] == pytest.approx(found["reward/exact/mean"] + 0.5)
    assert train("text", PLAIN, some)["critic/score/mean"] == 0.5
    assert "reward/acc/mean" in train("verl", VERL, compute_score)
    assert "critic/score/mean" in train("batch", VERL, compute_batch)


CALLS: list[tuple[Callable[..., Any] | None, dict[str, Any], str]] = [
    (None, {"learning_rate": 1e-5}, 'here it is optim={"lr": ...}'),
    (None, {"reward_funcs": [exact]}, "here it is reward=function"),
    (None, {"train_dataset": CHAT}, "here it is data=rows"),
    (None, {"args": object()}, "sections as dicts"),
    (None, {"processing_class": object()}, "here it is tokenizer=tokenizer"),
    (None, {"num_generations": 4}, 'here it is train={"samples_per_prompt": ...}'),
    (None, {"peft_config": object()}, '"lora": {"rank": 16'),
    (lambda completions, trainer_state: [0.0], {}, "wants 'trainer_state', which TRL's trainer alone has"),
    (lambda completions, anwser: [0.0], {}, "wants 'anwser', which is no column of the row: did you mean 'answer'?"),
    (lambda completion, answer: 0.0, {}, "wants 'completion' (here it is 'response'"),
    (None, {"actor_rollout_ref": {"rollout": {"n": 8}}}, "its parts are sections of their own here"),
    (None, {"trainer": {"total_epochs": 1}}, "its parts are sections of their own here"),
    (lambda solution_str, ground_truth, reward_model: 0.0, {}, "wants 'reward_model'"),
]


@pytest.mark.parametrize(("reward", "given", "told"), CALLS, ids=[told[:40] for _, _, told in CALLS])
def test_a_call_in_the_words_of_others_is_told_ours(
    tmp_path: Path, reward: Callable[..., Any] | None, given: dict[str, Any], told: str
) -> None:
    with pytest.raises(hf.UserError) as error:
        hf.train(MODEL, CHAT, reward or exact, folder=tmp_path / "run", config=QUICK, **given)
    assert told in str(error.value)
    assert not (tmp_path / "run/metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("section", "values", "told"),
    [
        ("algorithm", {"adv_estimator": "grpo"}, "here it is algorithm.preset"),
        ("algorithm", {"preset": "dpo"}, "a loss on pairs"),
        ("algorithm", {"kl_loss_estimator": "low_var_kl"}, "k3_clamped"),
        ("algorithm", {"use_kl_in_reward": True}, "here it is algorithm.kl_reward_coef"),
        ("data", {"train_batch_size": 256}, "here it is train.prompts_per_step"),
        ("train", {"ppo_mini_batch_size": 64}, "here it is train.sequences_per_update"),
        ("rollout", {"tensor_model_parallel_size": 2}, "here it is rollout.tensor_parallel"),
        ("rollout", {"top_k": -1}, "for never, none or all use 0"),
        ("checkpoint", {"save_freq": 20}, "here it is checkpoint.every"),
        ("eval", {"test_freq": 5}, "here it is eval.every"),
    ],
)
def test_keys_and_values_of_verl_are_told_ours(section: str, values: dict[str, Any], told: str) -> None:
    base: dict[str, Any] = QUICK | {"model": {"path": MODEL}, "run": {"folder": "x"}, "reward": {"function": "gsm8k"}}
    base |= {"data": {"train": "rows.jsonl"}}
    with pytest.raises(hf.UserError) as error:
        validate(hf.RlConfig, base | {section: base.get(section, {}) | values})
    assert told in str(error.value)


def test_a_ground_truth_that_no_row_has_is_asked_for_by_name(tmp_path: Path) -> None:
    with pytest.raises(hf.UserError) as error:
        hf.train(MODEL, PLAIN, compute_score, folder=tmp_path / "run", config=QUICK)
    assert "data.ground_truth_key=solution" in str(error.value) and "data.ground_truth_key=null" in str(error.value)
    with pytest.raises(hf.UserError, match="the reward gsm8k compares with a ground truth"):
        hf.train(MODEL, {"train": PLAIN, "ground_truth_key": None}, "gsm8k", folder=tmp_path / "run", config=QUICK)
