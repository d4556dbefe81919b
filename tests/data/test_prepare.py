"""`hybridflow prepare`: rows as they are published become rows of one schema; what is wrong with a source is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hybridflow.config.locate import load_function
from hybridflow.data.prepare.schema import Published
from hybridflow.data.prepare.sets import SETS
from hybridflow.rewards.verifiable.gsm8k import strict

from runs import mistake, succeed
from tiny import CARRY

SHARED = Path(__file__).resolve().parents[2].parent / "shared/data"
PNG = b"\x89PNG not really"

# Rows in the form in which each set is published, what its file is called there, and what must come out.
ROWS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gsm8k": (
        "train",
        {"question": "How many?", "answer": "500*2=<<500*2=1000>>1,000\n#### 1,000"},
        {"source": "openai/gsm8k", "starts": "How many? ", "truth": "1000", "extra": {"question": "How many?"}},
    ),
    "math": (
        "test",
        {"problem": "Half?", "level": "Level 2", "type": "Algebra", "solution": r"So $x=\boxed{\frac{1}{2}}$."},
        {"source": "DigitalLearningGmbH/MATH-lighteval", "starts": "Half? ", "truth": r"\frac{1}{2}",
         "extra": {"level": "Level 2"}},
    ),
    "aime24": (
        "train",
        {"id": 60, "problem": "Every morning", "solution": "Then", "answer": "073", "url": "u", "year": "2024"},
        {"source": "HuggingFaceH4/aime_2024", "starts": "Every morning ", "truth": "73", "extra": {"url": "u"}},
    ),
    "hellaswag": (
        "validation",
        {"ind": 24, "activity_label": "Roof shingle removal", "ctx_a": "A man is sitting.", "ctx_b": "he",
         "ctx": "A man is sitting. he", "endings": ["one", "two", "three", "four"], "source_id": "x",
         "split": "val", "split_type": "indomain", "label": "3"},
        {"source": "Rowan/hellaswag", "starts": "Which ending", "truth": "D", "extra": {},
         "contains": "Roof shingle removal: A man is sitting. he\nA. one\nB. two\nC. three\nD. four"},
    ),
    "full-hh-rlhf": (
        "train",
        {"prompt": "\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: Bye.\n\nAssistant:", "response": " See you.",
         "chosen": " See you.", "rejected": " Go."},
        {"source": "Dahoas/full-hh-rlhf", "starts": "Bye.", "truth": "See you.", "extra": {"rejected": "Go."}},
    ),
    "geo3k": (
        "test",
        {"images": [{"bytes": PNG, "path": None}], "problem": "<image>Find x.", "answer": "12"},
        {"source": "hiyouga/geometry3k", "starts": "<image>Find x. ", "truth": "12", "extra": {}},
    ),
    "svamp": (
        "test",
        {"ID": "chal-1", "Body": "Dave has 5 apples. If he eats 2", "Question": "How many are left?",
         "Equation": "( 5.0 - 2.0 )", "Answer": 3.0, "Type": "Subtraction"},
        {"source": "ChilleD/SVAMP", "starts": "Dave has 5 apples. If he eats 2, How many are left? ", "truth": "3",
         "extra": {"id": "chal-1"}},
    ),
}  # fmt: skip


def written(folder: Path, split: str) -> list[dict[str, Any]]:
    return pq.read_table(folder / f"{split}.parquet").to_pylist()


def test_every_published_set_is_tried_here() -> None:
    assert set(ROWS) == {name for name, known in SETS.items() if isinstance(known, Published)}


@pytest.mark.parametrize("name", ROWS)
def test_published_rows_become_rows_of_the_schema(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    published, row, expected = ROWS[name]
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    pq.write_table(pa.Table.from_pylist([row, row]), source / f"{published}-00000-of-00001.parquet")
    said = succeed(capsys, "prepare", name, "--from", source, "--out", out)
    split = "test" if published != "train" or name == "aime24" else "train"
    assert f"wrote {out / split}.parquet: 2 rows" in said and "first row: {" in said
    assert [p.name for p in out.iterdir()] == [f"{split}.parquet"]
    made = written(out, split)[1]
    assert {"data_source", "prompt", "ability", "reward_model", "extra_info"} <= set(made)
    assert made["data_source"] == expected["source"]
    assert made["prompt"][-1]["role"] == "user" and made["prompt"][-1]["content"].startswith(expected["starts"])
    assert expected.get("contains", "") in made["prompt"][-1]["content"]
    style = "model" if name == "full-hh-rlhf" else "rule"
    assert made["reward_model"] == {"style": style, "ground_truth": expected["truth"]}
    assert made["extra_info"].items() >= {"split": split, "index": 1, **expected["extra"]}.items()
    if name == "geo3k":
        assert made["images"] == row["images"]


def test_a_dialogue_becomes_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.jsonl").write_text(json.dumps(ROWS["full-hh-rlhf"][1]))
    succeed(capsys, "prepare", "full-hh-rlhf", "--from", tmp_path, "--out", tmp_path / "out")
    assert written(tmp_path / "out", "train")[0]["prompt"] == [
        {"role": "user", "content": "Hi."},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Bye."},
    ]


def test_rows_without_label_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = ROWS["hellaswag"][1]
    (tmp_path / "val.jsonl").write_text("\n".join(json.dumps({**row, "label": x}) for x in ("1", "", "0")))
    succeed(capsys, "prepare", "hellaswag", "--from", tmp_path, "--out", tmp_path / "out")
    made = written(tmp_path / "out", "test")
    assert [(r["reward_model"]["ground_truth"], r["extra_info"]["index"]) for r in made] == [("B", 0), ("A", 2)]


def test_some_rows_are_chosen_at_random_and_always_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [json.dumps({"question": str(i), "answer": f"#### {i}"}) for i in range(50)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))

    def chosen(out: str, *more: str) -> list[int]:
        succeed(capsys, "prepare", "gsm8k", "--from", tmp_path, "--out", tmp_path / out, "--rows", "20", *more)
        return [r["extra_info"]["index"] for r in written(tmp_path / out, "train")]

    first = chosen("a")
    assert len(set(first)) == 20 and first == sorted(first) and first == chosen("b") != chosen("c", "--seed", "1")


def test_countdown_problems_can_be_solved_and_do_not_overlap(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    succeed(capsys, "prepare", "countdown", "--out", tmp_path, "--rows", "300", "--seed", "3")
    rows = {split: written(tmp_path, split) for split in ("train", "test")}
    assert [len(found) for found in rows.values()] == [300, 300]
    for row in rows["train"] + rows["test"]:
        truth, solution = row["reward_model"]["ground_truth"], row["extra_info"]["solution"]
        assert eval(solution) == truth["target"]
        used = "".join(c if c.isdigit() else " " for c in solution).split()
        assert sorted(map(int, used)) == sorted(truth["numbers"])
        assert str(truth["target"]) in row["prompt"][0]["content"]
    kept = [{tuple(sorted(r["reward_model"]["ground_truth"]["numbers"])) for r in found} for found in rows.values()]
    assert not kept[0] & kept[1]


def test_carry_problems_are_those_of_the_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    succeed(capsys, "prepare", "carry", "--out", tmp_path, "--seed", "3")
    for split, function, arguments in [("train", "problems", {"seed": 3}), ("test", "held_out_problems", {})]:
        recipe = load_function(f"{CARRY}:{function}")(**arguments)
        made = written(tmp_path, split)
        assert [(r["prompt"][0]["content"], r["reward_model"]["ground_truth"]) for r in made] == [
            (r["prompt"], r["ground_truth"]) for r in recipe
        ]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["gsmk"], ["there is no data set 'gsmk' to prepare", "did you mean 'gsm8k'?"]),
        (["gsm8k", "--from", "{folder}/gone"], ["no folder", "gone"]),
        (["gsm8k", "--from", "{folder}"], ["no files of gsm8k in", "name it train.jsonl or test.jsonl"]),
        (["math", "--from", "{folder}/gsm8k"],
         ["the train split of", "has no column 'problem'", "prepare math expects problem, solution, level, type; there "
          "is question, answer"]),
        (["gsm8k", "--from", "{folder}/bad"],
         ["row 0 of the train split of", "bad: no '####' in the answer '7'", "fix: check that this is the data set"]),
        (["gsm8k", "--from", "{folder}/number"],
         ["row 0 of the train split of", "is not as published: AttributeError", 'it is {"question": "?", "answer": 7']),
        (["gsm8k", "--from", "some/other:main/test"], ["names one split", "all splits are read"]),
        (["gsm8k", "--from", "{folder}/gsm8k", "--rows", "0"], ["--rows is 0, it must be at least 1"]),
        (["carry", "--from", "{folder}/gsm8k"], ["carry is made here, it has no source"]),
    ],
)  # fmt: skip
def test_what_cannot_be_prepared_is_told(
    arguments: list[str], expected: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, answer in (("gsm8k", "#### 7"), ("bad", "7"), ("number", 7)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train.jsonl").write_text(json.dumps({"question": "?", "answer": answer}))
    filled = [a.format(folder=tmp_path) for a in arguments]
    said = mistake(capsys, "prepare", *filled, "--out", tmp_path / "out")
    assert [e for e in expected if e not in said] == [], said
    assert not (tmp_path / "out").exists()


def test_a_hub_that_cannot_be_reached_is_told_with_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Tests run without network, and without the extra that reads the hub: either way this is what a user sees.
    said = mistake(capsys, "prepare", "gsm8k", "--out", tmp_path)
    assert "openai/gsm8k:main" in said and "Hugging Face hub" in said
    assert "give the folder of its files: hybridflow prepare gsm8k --from FOLDER" in said
    said = mistake(capsys, "prepare", "gsm8k", "--from", "some/other:main", "--out", tmp_path)
    assert "some/other:main" in said and "--from FOLDER" in said


@pytest.mark.parametrize(("name", "counts"), [("gsm8k", {"train": 7473, "test": 1319}), ("svamp", {"test": 1000})])
def test_the_real_files_are_prepared(
    name: str, counts: dict[str, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not (SHARED / name).is_dir():
        pytest.skip(f"no copy of {name} beside the repository")
    succeed(capsys, "prepare", name, "--from", SHARED / name, "--out", tmp_path)
    for split, count in counts.items():
        rows = written(tmp_path, split)
        assert len(rows) == count
        assert all(float(r["reward_model"]["ground_truth"]) is not None for r in rows)
        if name == "gsm8k":  # every worked answer earns the reward of its own row
            assert all(strict(r["extra_info"]["answer"], r["reward_model"]["ground_truth"]) == 1 for r in rows)
