"""What a user can get wrong before training: each is told in words (what, why, fix) before any engine starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import BloomConfig, BloomForCausalLM

from hybridflow.cli.main import main
from hybridflow.config.locate import load_function

from runs import REWARD, configuration, metrics, mistake, succeed
from tiny import CARRY

ROWS = [{"prompt": f"1+{i}=", "ground_truth": str(i + 1)} for i in range(6)]
Output = pytest.CaptureFixture[str]


def untouched(folder: Path) -> bool:
    """Whether nothing was begun in the run's folder."""
    return not (folder / "run").exists()


def rows_file(folder: Path, rows: list[dict[str, Any]]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


# --- configuration ---


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["train.stepz=3"], ["has 1 mistake", "train.stepz: unknown key; did you mean 'steps'?"]),
        (["optimizer.lr=1"], ["optimizer: unknown key; did you mean 'optim'?"]),
        (["model.lora.rnak=4"], ["model.lora.rnak: unknown key; did you mean 'rank'?"]),
        (["train.steps=-1"], ["train.steps: input should be greater than 0 (it is -1)"]),
        (["rollout.max_response_tokens=0", "optim.lr=-1"], ["2 mistakes", "rollout.max_response_tokens", "optim.lr"]),
        (
            ["train.samples_per_prompt=1"],
            ["samples_per_prompt is 1", "grpo advantage compares responses", "at least 2"],
        ),
        (["train.sequences_per_update=3"], ["sequences_per_update 3 does not divide the 4 responses", "2 prompts x 2"]),
        (["train.tokens_per_microbatch=20"], ["tokens_per_microbatch is 20", "can have 24 tokens", "16 +", "8)"]),
        (["rollout.max_cache_tokens=23"], ["rollout.max_cache_tokens is 23", "can have 24 tokens"]),
        (["train.steps"], ["'train.steps' is not an override", "fix: write dotted.key=value"]),
        (["algorithm.preset=grop"], ["unknown preset 'grop'; did you mean 'grpo'?"]),
        (["run.device=gpu"], ["run.device: input should be 'auto', 'cpu', 'cuda' or 'npu' (it is 'gpu')"]),
    ],
)
def test_a_setting_that_is_none(overrides: list[str], expected: list[str], tmp_path: Path, capsys: Output) -> None:
    said = mistake(capsys, "train", configuration(tmp_path), *overrides)
    assert [e for e in expected if e not in said] == [], said
    assert untouched(tmp_path)


def test_an_unknown_key_in_the_file(tmp_path: Path, capsys: Output) -> None:
    config = configuration(tmp_path, train={"step": 3})
    said = mistake(capsys, "check", config)
    assert f"{config} has 1 mistake" in said and "train.step: unknown key; did you mean 'steps'?" in said


@pytest.mark.parametrize("command", ["train", "sft", "eval", "check"])
def test_a_configuration_file_that_is_none(command: str, tmp_path: Path, capsys: Output) -> None:
    said = mistake(capsys, command, tmp_path / "gone.yaml")
    (tmp_path / "mine.yaml").touch()
    assert f"did you mean {tmp_path / 'mine.yaml'}?" in mistake(capsys, "train", tmp_path / "mine.yml")
    assert "give the YAML file first" in mistake(capsys, "train", "algorithm.adv_estimator=grpo")
    assert f"no configuration file {tmp_path / 'gone.yaml'}" in said and "hybridflow recipes carry" in said
    (tmp_path / "bad.yaml").write_text("run: {folder: [x\nmodel: }")
    said = mistake(capsys, command, tmp_path / "bad.yaml")
    assert f"{tmp_path / 'bad.yaml'} is not valid YAML" in said and "line 2" in said
    (tmp_path / "list.yaml").write_text("- run\n")
    assert "must hold sections (run:, model:, ...), it holds a list" in mistake(capsys, command, tmp_path / "list.yaml")
    said = mistake(capsys, command, tmp_path)
    assert f"{tmp_path} is a folder" in said and f"give one of its files: {tmp_path / 'bad.yaml'}, " in said


# --- data ---


@pytest.mark.parametrize("key", ["data.train", "data.eval"])
@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("gone.jsonl", None, ["no data file", "gone.jsonl", "fix: give a .jsonl or .parquet file"]),
        ("latin.jsonl", '{"a": "ö"}\n'.encode("latin-1"), ["latin.jsonl is not UTF-8", "in line 1", "fix: convert it"]),
        ("rows.py:mine", b"def mine(): return 1 / 0", ["mine raised ZeroDivisionError", "fix: make it return a list"]),
        ("none.py:mine", b"def mine(): pass", ["none.py:mine raised TypeError"]),
        ("rows.py:mien", b"def mine(): pass", ["rows.py has no function 'mien'", "fix: did you mean 'mine'?"]),
    ],
)
def test_data_that_cannot_be_read(
    key: str, name: str, content: bytes | None, expected: list[str], tmp_path: Path, capsys: Output
) -> None:
    if content is not None:
        (tmp_path / name.partition(":")[0]).write_bytes(content)
    said = mistake(capsys, "train", configuration(tmp_path), f"{key}={tmp_path / name}")
    assert [e for e in expected if e not in said] == [], said
    assert untouched(tmp_path)


@pytest.mark.parametrize(
    ("row", "overrides", "expected"),
    [
        ({"prmpt": "1", "ground_truth": "1"}, [], ["has no column 'prompt'", "fix: did you mean 'prmpt'?"]),
        ({"prompt": "1"}, [], ["has no column 'ground_truth'", "fix: known: prompt"]),
        ({"prompt": "1", "truth": {"valeu": 1}}, ["data.ground_truth_key=truth.value"],
         ["has no column 'truth.value'", "fix: did you mean 'valeu'?"]),
        ({"prompt": "1+1=", "ground_truth": "2"}, ["data.max_prompt_tokens=6"],
         ["has 7 tokens, data.max_prompt_tokens is 6", "fix: raise the limit or leave the row out"]),
        ({"prompt": ["1+1="], "ground_truth": "2"}, [],
         ["prompt of", "is a list, in row 0 it is a string", "fix: write the column alike"]),
    ],
)  # fmt: skip
def test_a_row_that_does_not_fit(
    row: dict[str, Any], overrides: list[str], expected: list[str], tmp_path: Path, capsys: Output
) -> None:
    source = rows_file(tmp_path, [{"prompt": "1", "ground_truth": "1", "truth": {"value": 1}}, row])
    said = mistake(capsys, "train", configuration(tmp_path), f"data.train={source}", *overrides)
    assert f"row 1 of {source}" in said
    assert [e for e in expected if e not in said] == [], said
    assert untouched(tmp_path)


@pytest.mark.parametrize(
    ("row", "overrides", "expected"),
    [
        ({"mesages": []}, [], ["has no column 'messages'", "fix: did you mean 'mesages'?"]),
        ({"messages": [{"role": "user", "content": "1"}]}, [],
         ["holds no assistant message", "why: there is nothing to learn from", "fix: give a list of {role, content}"]),
        ({"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]},
         ["data.max_tokens=5"], ["has 6 tokens, data.max_tokens is 5", "fix: raise the limit"]),
    ],
)  # fmt: skip
def test_a_conversation_that_does_not_fit(
    row: dict[str, Any], overrides: list[str], expected: list[str], tmp_path: Path, capsys: Output
) -> None:
    source = rows_file(tmp_path, [row])
    said = mistake(capsys, "sft", configuration(tmp_path, "sft"), f"data.train={source}", *overrides)
    assert f"row 0 of {source}" in said
    assert [e for e in expected if e not in said] == [], said
    assert untouched(tmp_path)


# --- model ---


def model_folder(folder: Path, **tokenizer_changes: Any) -> str:
    model, tokenizer = load_function(f"{CARRY}:tiny_qwen3")()
    model.save_pretrained(folder)
    for name, value in tokenizer_changes.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("command", ["train", "sft", "eval"])
def test_a_tokenizer_that_cannot_do(command: str, tmp_path: Path, capsys: Output) -> None:
    config = configuration(tmp_path, command)
    path = model_folder(tmp_path / "untemplated", chat_template=None)
    said = mistake(capsys, command, config, f"model.path={path}")
    assert "the tokenizer has no chat template" in said and "why: prompts are rendered with it" in said
    assert "fix: set chat_template in its tokenizer_config.json" in said
    path = model_folder(tmp_path / "endless", eos_token=None)
    said = mistake(capsys, command, config, f"model.path={path}")
    assert f"the tokenizer of {path} has no end-of-sequence token" in said and "why: without one no response" in said
    assert "fix: set eos_token in its tokenizer_config.json" in said
    path = model_folder(tmp_path / "strict", chat_template="{{ raise_exception('a system message comes first') }}")
    said = mistake(capsys, command, config, f"model.path={path}")
    assert "the chat template refuses the messages [{" in said and "a system message comes first" in said
    assert command == "eval" or untouched(tmp_path)


def test_a_model_that_is_none(tmp_path: Path, capsys: Output) -> None:
    config = configuration(tmp_path, model={"path": str(tmp_path / "gone")})
    for arguments in (["train", config], ["generate", tmp_path / "gone", "1+1="]):
        said = mistake(capsys, *arguments)
        assert "no" in said and str(tmp_path / "gone") in said and "fix: " in said
    folder = tmp_path / "encoder"
    load_function(f"{CARRY}:make_tokenizer")().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "vit", "architectures": ["ViTModel"]}))
    said = mistake(capsys, "train", config, f"model.path={folder}")
    assert f"the model in {folder} is a ViTModel: it has no head" in said
    assert "fix: give a causal language model (LlamaForCausalLM, Qwen3ForCausalLM, ...)" in said
    path = model_folder(tmp_path / "whole")  # a failed start leaves nothing that the mended one would run into
    assert "tokens" in succeed(capsys, "train", config, f"model.path={path}", "train.steps=1")


def test_a_family_that_cannot_pack(tmp_path: Path, capsys: Output) -> None:
    config, folder = configuration(tmp_path), tmp_path / "bloom"
    tokenizer = load_function(f"{CARRY}:make_tokenizer")()
    BloomForCausalLM(BloomConfig(vocab_size=len(tokenizer), hidden_size=32, n_layer=1, n_head=4)).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)
    said = mistake(capsys, "train", config, f"model.path={folder}")
    assert "BloomForCausalLM (bloom) cannot run on packed sequences: it has an attention of its own" in said
    assert "why: training would silently score another model" in said and "fix: set model.packing=false" in said
    assert not (tmp_path / "run/metrics.jsonl").exists()
    succeed(capsys, "train", config, f"model.path={folder}", "model.packing=false", "train.steps=2")
    steps = metrics(tmp_path / "run")[1:]
    # Padded training scores what was sampled: both see the same model.
    assert len(steps) == 2 and all(s["training/rollout_probs_diff_max"] < 1e-5 for s in steps)


# --- reward ---


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def score(response, ground_truth): return int('x')",
         ["raised ValueError: invalid literal", "why: it was scoring '", "fix: make it return a number for every"]),
        ("def score(response): return float('nan')", ["returned nan (float), not a finite number", "fix: write def"]),
        ("def score(response): return '1.0'", ["returned '1.0' (str), not a finite number", "def score(response: str"]),
        ("def score(response): pass", ["returned None (NoneType), not a finite number"]),
        ("def score(responses): return [1.0] * (len(responses) + 1)",
         ["was given 1 responses and returned 2 scores", "fix: write def score(response: str"]),
        ("def score(responses): return 1.0", ["was given 1 responses and returned a float"]),
        ("def score(responses): return '1'", ["was given 1 responses and returned a str"]),
        ("def score(response, ground_thruth): return 1",
         ["wants 'ground_thruth' (did you mean 'ground_truth'?)", "fix: write def score(response: str"]),
        ("def score(ground_truth): return 1", ["does not take 'response'"]),
        ("def scoer(response): return 1", ["has no function 'score'", "fix: did you mean 'scoer'?"]),
        ("import nothing_of_this_name", ["cannot be imported", "ModuleNotFoundError: No module named 'nothing_of"]),
        ("def score(response) return 1", ["cannot be imported", "SyntaxError", "line 1"]),
    ],
)  # fmt: skip
def test_a_reward_that_cannot_score(source: str, expected: list[str], tmp_path: Path, capsys: Output) -> None:
    (tmp_path / "mine.py").write_text(source)
    config = configuration(tmp_path, reward={"function": str(tmp_path / "mine.py:score")})
    said = mistake(capsys, "train", config)
    assert str(tmp_path / "mine.py") in said
    assert [e for e in expected if e not in said] == [], said
    assert untouched(tmp_path)


def test_no_reward_file(tmp_path: Path, capsys: Output) -> None:
    said = mistake(capsys, "check", configuration(tmp_path), "reward.function=gone.py:score")
    assert "no file gone.py (for gone.py:score)" in said and "fix: give file.py:function" in said


def test_a_reward_that_fails_in_the_middle_names_the_row_and_loses_nothing(tmp_path: Path, capsys: Output) -> None:
    failing = (
        "    if (Path(__file__).parent / 'fail').exists() and ground_truth == '3':\n        raise OSError('no judge')\n"
    )
    (tmp_path / "mine.py").write_text(
        "from pathlib import Path\n" + REWARD.replace("    return", failing + "    return")
    )
    reward, run = {"function": str(tmp_path / "mine.py:score")}, tmp_path / "run"
    data = {"train": rows_file(tmp_path, ROWS), "eval": None, "order": "sequential"}
    config = configuration(tmp_path, data=data, reward=reward)
    arguments = ["train", config, "train.steps=3", "checkpoint.every=1"]
    (tmp_path / "fail").touch()
    said = mistake(capsys, *arguments)
    assert "row 2 of the training data: the reward" in said and "raised OSError: no judge" in said
    assert "why: it was scoring '" in said and "against '3'" in said
    assert [m["step"] for m in metrics(run)] == [0, 1]
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-000001"]
    (tmp_path / "fail").unlink()
    succeed(capsys, *arguments)
    assert [m["step"] for m in metrics(run)] == [0, 1, 2, 3]


def test_a_reward_that_fails_in_an_evaluation_names_the_row(tmp_path: Path, capsys: Output) -> None:
    (tmp_path / "mine.py").write_text("def score(response, ground_truth):\n    return 1 / (ground_truth != '2')\n")
    reward, data = {"function": str(tmp_path / "mine.py:score")}, {"eval": rows_file(tmp_path, ROWS)}
    said = mistake(capsys, "eval", configuration(tmp_path, "eval", reward=reward, data=data))
    assert "row 1 of the evaluation data: the reward" in said and "raised ZeroDivisionError" in said


# --- folders ---


@pytest.mark.parametrize("command", ["train", "sft", "eval"])
def test_a_folder_that_cannot_be_written(command: str, tmp_path: Path, capsys: Output) -> None:
    (tmp_path / "file").write_text("a file")
    config = configuration(tmp_path, command, run={"folder": str(tmp_path / "file/run")})
    said = mistake(capsys, command, config)
    assert f"the run's folder {tmp_path / 'file/run'} cannot be made: Not a directory" in said
    assert "fix: set run.folder" in said
    assert (tmp_path / "file").read_text() == "a file"


def test_a_run_folder_whose_lock_cannot_be_opened(tmp_path: Path, capsys: Output) -> None:
    (tmp_path / "run/.lock").mkdir(parents=True)
    said = mistake(capsys, "train", configuration(tmp_path))
    assert f"nothing can be written in {tmp_path / 'run'}: Is a directory" in said and "fix: set run.folder" in said


@pytest.mark.parametrize("begun", [True, False])
def test_report_and_export_of_what_is_no_run(begun: bool, tmp_path: Path, capsys: Output) -> None:
    if begun:
        (tmp_path / "first").mkdir()
        (tmp_path / "first/metrics.jsonl").write_text('{"step": 1}\n')
    said = mistake(capsys, "report", tmp_path / "frist")
    assert f"{tmp_path / 'frist'} is not the folder of a run" in said
    assert (f"did you mean '{tmp_path / 'first'}'?" in said) is begun
    said = mistake(capsys, "export", tmp_path / "first", tmp_path / "target")
    assert f"{tmp_path / 'first'} has no checkpoints" in said and "fix: give the folder of a run" in said
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--max-tokens", "0"], "--max-tokens is 0, it must be at least 1"),
        (["--samples", "-2"], "--samples is -2, it must be at least 1"),
        (["--temperature", "-1"], "--temperature is -1.0, it must be at least 0"),
        (["--temperature", "nan"], "--temperature is nan"),
        (["--seed", "-1"], "--seed is -1, it must be at least 0"),
        (["--max-tokens", "300"], "tokens, the model's context is 256"),
    ],
)
def test_generate_with_numbers_that_cannot_be(arguments: list[str], expected: str, capsys: Output) -> None:
    assert expected in mistake(capsys, "generate", f"{CARRY}:tiny_qwen3", "1+1=", *arguments)


@pytest.mark.parametrize("arguments", [["--max-tokens", "many"], ["--warmth", "1"]])
def test_generate_with_arguments_that_are_none(arguments: list[str], capsys: Output) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["generate", f"{CARRY}:tiny_qwen3", "1+1=", *arguments])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert arguments[0] in said and "usage: hybridflow" in said


# --- going on in a folder that holds another run ---


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that is done."""
    folder = tmp_path_factory.mktemp("done")
    source = rows_file(folder, ROWS)
    assert main(["train", configuration(folder, data={"train": source}), "eval.before_training=false"]) == 0
    return folder


def going_on(folder: Path, capsys: Output, *overrides: str) -> str:
    """What going on says; what is on disk must stay as it is."""
    run = folder / "run"
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != ".lock"}
    said = mistake(capsys, "train", folder / "train.yaml", "eval.before_training=false", *overrides)
    after = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != ".lock"}
    changed = {p.name for p in before.keys() | after.keys() if before.get(p) != after.get(p)}
    assert changed <= {"events.jsonl", "config.yaml"}
    return said


def test_resume_never(done: Path, capsys: Output) -> None:
    said = going_on(done, capsys, "run.resume=never", "train.steps=3")
    assert "already holds a run, and run.resume is never" in said and "fix: choose another run.folder" in said


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("run.seed=4", "run.seed was 3, is 4"),
        ("train.prompts_per_step=4", "train.prompts_per_step was 2, is 4"),
        ("train.samples_per_prompt=3", "train.samples_per_prompt was 2, is 3"),
        ("model.lora.rank=2", "model.lora.rank was unset, is 2"),
        ("data.order=sequential", "data.order was shuffled, is sequential"),
        (f"data.train={CARRY}:problems", "data.train was "),
    ],
)
def test_other_settings_in_the_same_folder(override: str, expected: str, done: Path, capsys: Output) -> None:
    config = (done / "run/config.yaml").read_bytes()
    said = going_on(done, capsys, override, "train.steps=3")
    assert f"{done / 'run'} holds a run with other settings: " in said and expected in said
    assert "why: resuming with them would mix two runs" in said and "fix: choose another run.folder" in said
    assert (done / "run/config.yaml").read_bytes() == config


def test_other_rows_in_the_same_file(done: Path, capsys: Output) -> None:
    try:
        source = rows_file(done, ROWS[::-1])
        said = going_on(done, capsys, "train.steps=3")
    finally:
        rows_file(done, ROWS)
    assert f"the data in {source} is not what the run in {done / 'run'} began with" in said
    assert "why: resuming would draw other rows" in said and "fix: restore the data" in said


def test_a_configuration_on_disk_that_was_damaged(tmp_path: Path, capsys: Output) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "run/config.yaml").write_text("run: {folder")
    said = mistake(capsys, "train", configuration(tmp_path))
    assert f"{tmp_path / 'run/config.yaml'} cannot be read any more" in said and "fix: restore it" in said


def test_rows_that_change_before_the_first_checkpoint_are_noticed_too(tmp_path: Path, capsys: Output) -> None:
    (tmp_path / "mine.py").write_text("def score(response, ground_truth):\n    return 1 / (ground_truth != '2')\n")
    config = configuration(tmp_path, data={"eval": None, "order": "sequential", "train": rows_file(tmp_path, ROWS[:2])})
    arguments = ["train", config, f"reward.function={tmp_path / 'mine.py:score'}"]
    assert "row 1 of the training data" in mistake(capsys, *arguments)  # the group of row 0 is in the journal
    rows_file(tmp_path, ROWS[4:])
    said = mistake(capsys, *arguments)
    assert "the journal of step 1 was written with other data: its prompt of row 0 differs" in said
    assert "why: resuming would train on responses to prompts" in said and "fix: restore the data" in said


def test_a_model_folder_that_is_not_there_is_not_looked_for_on_the_network(tmp_path: Path, capsys: Output) -> None:
    said = mistake(capsys, "train", configuration(tmp_path, model={"path": "some/where/else"}))
    assert "no model at some/where/else" in said and "fix: give a folder in Hugging Face format" in said
    assert "if another run writes this folder, start that run first" in said


def test_a_configuration_for_another_command_names_it(tmp_path: Path, capsys: Output) -> None:
    said = mistake(capsys, "train", configuration(tmp_path, "sft"))
    assert "is for another command" in said and "fix: hybridflow sft" in said
