"""What `hybridflow check`, and the start of every run, say about rows: counts, advice, and mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runs import assert_same_tensors, configuration, metrics, mistake, succeed

Output = pytest.CaptureFixture[str]
ROWS = [{"prompt": f"{i}+1=", "ground_truth": str(i + 1)} for i in range(20)]


def written(folder: Path, name: str, rows: list[dict[str, Any]]) -> str:
    (folder / name).write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(folder / name)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "1"}, ["row 17 of", "has no column 'ground_truth', row 0 and 18 others have it"]),
        ({"prompt": [{"role": "user", "content": "1"}], "ground_truth": "1"},
         ["prompt of row 17 of", "is a list, in row 0 and 18 others it is a string", "fix: write the column alike"]),
        ({"prompt": "1", "ground_truth": 1}, ["ground_truth of row 17 of", "is a number, in row 0 and 18 others it"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", ["check", "train"])
def test_rows_of_mixed_schemas_are_refused_before_anything_starts(
    command: str, row: dict[str, Any], expected: list[str], tmp_path: Path, capsys: Output
) -> None:
    source = written(tmp_path, "rows.jsonl", [*ROWS[:17], row, *ROWS[18:]])
    said = mistake(capsys, command, configuration(tmp_path), f"data.train={source}")
    assert [e for e in expected if e not in said] == [] and source in said, said
    assert "Traceback" not in said and not (tmp_path / "run").exists()


def test_rows_of_mixed_schemas_for_supervised_training(tmp_path: Path, capsys: Output) -> None:
    talk = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    source = written(tmp_path, "rows.jsonl", [{"messages": talk}, {"messages": talk}, {"messages": "1"}])
    said = mistake(capsys, "sft", configuration(tmp_path, "sft"), f"data.train={source}")
    assert "messages of row 2 of" in said and "is a string, in row 0 and 1 others it is a list" in said


def test_evaluation_prompts_that_are_trained_on_are_counted(tmp_path: Path, capsys: Output) -> None:
    train = written(tmp_path, "train.jsonl", ROWS[:15])
    # The same prompts as chat messages: what the model sees counts, not how it is written down.
    chat = [{**r, "prompt": [{"role": "user", "content": r["prompt"]}]} for r in ROWS[12:]]
    overrides = [f"data.train={train}", f"data.eval={written(tmp_path, 'eval.jsonl', chat)}"]
    said = succeed(capsys, "check", configuration(tmp_path), *overrides)
    assert "advice: 3 of 8 evaluation prompts are training prompts too" in said
    said = succeed(capsys, "check", configuration(tmp_path), f"data.eval={written(tmp_path, 'e.jsonl', ROWS[15:])}")
    assert "training prompts too" not in said


def test_over_long_rows_are_counted_and_left_out_of_training(tmp_path: Path, capsys: Output) -> None:
    long = [{"prompt": "1" * 30, "ground_truth": "1"}]
    train = written(tmp_path, "train.jsonl", ROWS[:3] + long + ROWS[3:5])
    config = configuration(tmp_path, data={"train": train, "eval": None})
    said = mistake(capsys, "check", config)
    assert "row 3 of" in said and "has 33 tokens, data.max_prompt_tokens is 16" in said
    assert "data.over_long=filter" in said
    for command in ("check", "train"):
        said = succeed(capsys, command, config, "data.over_long=filter", "train.steps=3")
        assert "5 rows, longest prompt" in said and "prompts of more than 16 tokens, left out: 1" in said
    assert metrics(tmp_path / "run")[-1]["prompt_length/max"] <= 16
    assert "prompts of more than 16 tokens, cut at their beginning: 1" in succeed(
        capsys, "check", config, "data.over_long=truncate"
    )


def test_columns_that_only_some_rows_have_are_told(tmp_path: Path, capsys: Output) -> None:
    train = written(tmp_path, "train.jsonl", [*ROWS, {**ROWS[0], "level": 3}])
    said = succeed(capsys, "check", configuration(tmp_path), f"data.train={train}")
    assert "advice: 20 of 21 rows of" in said and "lack the column 'level'" in said


def test_weighted_sources_and_an_order_of_ones_own_train(tmp_path: Path, capsys: Output) -> None:
    (tmp_path / "order.py").write_text("def falling(rows): return range(len(rows))[::-1]\ndef none(rows): return []\n")
    sources = [written(tmp_path, "a.jsonl", ROWS[:5]), written(tmp_path, "b.jsonl", ROWS[5:])]
    train = [{"source": sources[0], "weight": 3}, sources[1]]
    config = configuration(tmp_path, data={"train": train, "eval": sources, "order": "order.py:falling"})
    said = succeed(capsys, "train", config)
    assert f"training data {sources[0]}, {sources[1]}: 20 rows" in said
    assert "20 of 20 evaluation prompts are training prompts too" in said
    assert "returned 0 places that are not an order of 5 rows" in mistake(
        capsys, "check", config, "data.order=order.py:none"
    )
    said = mistake(capsys, "check", config, "data.train=[{source: a.jsonl, wieght: 2}]")
    assert "data.train.0.wieght: unknown key; did you mean 'weight'?" in said
    said = mistake(capsys, "check", config, "data.eval=[{source: a.jsonl, weight: 2}]")
    assert "eval sources have no weight" in said
    said = mistake(capsys, "train", config, f"data.train=[{sources[1]}, {sources[0]}]")
    assert "data.train" in said and "choose another run.folder" in said


def test_a_folder_and_a_name_on_the_hub_are_told_what_to_do(tmp_path: Path, capsys: Output) -> None:
    written(tmp_path, "train.jsonl", ROWS)
    said = mistake(capsys, "check", configuration(tmp_path), f"data.train={tmp_path}")
    assert "is a folder, not a data file" in said and "train.jsonl" in said
    said = mistake(capsys, "check", configuration(tmp_path), "data.train=some/rows:main/train")
    assert "some/rows:main/train" in said and "Hugging Face hub" in said and "give a .jsonl or .parquet file" in said


def test_a_long_conversation_far_down_is_found_before_training(tmp_path: Path, capsys: Output) -> None:
    def row(question: str) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "1"}]}

    source = written(tmp_path, "rows.jsonl", [row("1")] * 3000 + [row("1" * 80)])
    config = configuration(tmp_path, "sft", data={"train": source, "max_tokens": 60})
    assert "row 3000 of" in mistake(capsys, "sft", config)
    assert "conversations of more than 60 tokens, left out: 1" in succeed(
        capsys, "check", config, "data.over_long=filter"
    )


def test_a_run_on_weighted_sources_goes_on_where_it_stopped(tmp_path: Path, capsys: Output) -> None:
    long = [{"prompt": "1" * 30, "ground_truth": "1"}]
    sources = [written(tmp_path, "a.jsonl", long + ROWS[:5]), written(tmp_path, "b.jsonl", ROWS[5:] + long)]
    train = [{"source": sources[0], "weight": 0.7}, {"source": sources[1], "weight": 0.3}]
    config = configuration(tmp_path, data={"train": train, "eval": None, "over_long": "filter"})
    succeed(capsys, "train", config, f"run.folder={tmp_path / 'straight'}", "train.steps=5")
    for steps in (2, 5):
        succeed(capsys, "train", config, f"run.folder={tmp_path / 'stopped'}", f"train.steps={steps}")
    assert_same_tensors(*(tmp_path / name / "model/model.safetensors" for name in ("straight", "stopped")))
