"""What `hybridflow check` says of a model's vocabulary, of an evaluation, and to a script."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hybridflow.config.locate import load_function

from runs import configuration, mistake, succeed
from tiny import CARRY

Output = pytest.CaptureFixture[str]


def model_folder(folder: Path, *, rows: int) -> str:
    """The recipe's model with so many rows in its embedding; its tokenizer has 100 ids."""
    model, tokenizer = load_function(f"{CARRY}:tiny_qwen3")()
    model.resize_token_embeddings(rows)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("command", ["train", "sft", "eval"])
def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(command: str, tmp_path: Path, capsys: Output) -> None:
    model = model_folder(tmp_path / "small", rows=90)
    said = mistake(capsys, "check", configuration(tmp_path, command, model={"path": model}))
    assert f"the tokenizer of {model} has ids up to 99 ('~'), the model's vocabulary ends at 89" in said
    assert "why: a token without a row" in said and "model.resize_token_embeddings(100)" in said


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused_of_a_function_too(tmp_path: Path, capsys: Output) -> None:
    (tmp_path / "mine.py").write_text(
        "import sys\nfrom hybridflow.config.locate import load_function\n"
        f"def small():\n    model, tokenizer = load_function('{CARRY}:tiny_qwen3')()\n"
        "    model.resize_token_embeddings(99)\n    return model, tokenizer\n"
    )
    said = mistake(capsys, "train", configuration(tmp_path, model={"path": f"{tmp_path}/mine.py:small"}))
    assert "ids up to 99 ('~'), the model's vocabulary ends at 98" in said and not (tmp_path / "run").exists()


def test_a_padded_vocabulary_is_noted_and_trains(tmp_path: Path, capsys: Output) -> None:
    config = configuration(tmp_path, model={"path": model_folder(tmp_path / "padded", rows=128)})
    assert "its vocabulary has 128 rows, 28 more than the tokenizer has ids" in succeed(capsys, "check", config)
    succeed(capsys, "train", config, "train.steps=1")


def test_check_says_what_an_evaluation_does_and_measures(tmp_path: Path, capsys: Output) -> None:
    (tmp_path / "task.py").write_text("def last(response):\n    return response[-2:]\n")
    said = succeed(capsys, "check", configuration(
        tmp_path, "eval", eval={"samples_per_prompt": 2, "temperature": 0.5, "answer": "task.py:last"}
    ))  # fmt: skip
    assert "an evaluation: 4 prompts, 2 sampled at temperature 0.5 answers to each" in said
    name = "val-core/carry/reward"
    assert f"it measures {name}/mean@2, {name}/pass@1, {name}/pass@2, {name}/maj@2/mean\n" in said
    assert "eval.answer: the answer in '1639' is '39'" in said


def test_a_script_reads_what_check_found(tmp_path: Path, capsys: Output) -> None:
    config = configuration(tmp_path)
    found = json.loads(succeed(capsys, "check", config, "optim.lr=0.25", "--json"))
    assert found["command"] == "train" and found["config"]["optim"]["lr"] == 0.25
    assert any(line.startswith("training data ") for line in found["checks"])
    assert "train.steps" in mistake(capsys, "check", config, "train.steps=0", "--json")
