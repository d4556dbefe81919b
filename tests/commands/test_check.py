"""What `hybridflow check` says of a model's vocabulary, of an evaluation, and to a script."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from hybridflow.config.kinds.sft import SftConfig
from hybridflow.config.load import load_config
from hybridflow.config.locate import load_function
from hybridflow.errors import UserError
from hybridflow.trainers.sft import next_batch, open_sft

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
    assert "an evaluation: 4 prompts, 2 sampled at temperature 0.5 responses to each" in said
    name = "val-core/carry/reward"
    assert f"it measures {name}/mean@2, {name}/pass@1, {name}/pass@2, {name}/maj@2/mean\n" in said
    assert "eval.answer: the answer in '1639' is '39'" in said


def test_a_script_reads_what_check_found(tmp_path: Path, capsys: Output) -> None:
    config = configuration(tmp_path)
    found = json.loads(succeed(capsys, "check", config, "optim.lr=0.25", "--json"))
    assert found["command"] == "train" and found["config"]["optim"]["lr"] == 0.25
    assert any(line.startswith("training data ") for line in found["checks"])
    assert "train.steps" in mistake(capsys, "check", config, "train.steps=0", "--json")


# --- what a run would refuse or say later ---


@pytest.mark.parametrize(
    ("kind", "overrides", "expected"),
    [
        ("train", ["rollout.max_response_tokens=250"], "sequence has 266 tokens, the model's context is 256"),
        ("train", ["data.max_prompt_tokens=300"], "the longest possible sequence has 308 tokens"),
        ("eval", ["rollout.max_response_tokens=250"], "11 prompt tokens and up to 250 new ones does not fit in 256"),
        ("eval", ["rollout.max_cache_tokens=18"], "does not fit in 18 tokens"),
        ("eval", ["rollout.engine=vllm"], "hybridflow eval generates with the inline engine"),
        ("eval", ["eval.logit_bias={100: 1}"], "logit_bias names token 100, the model's tokens are 0 to 99"),
    ],
)  # fmt: skip
def test_check_refuses_what_the_command_refuses_in_the_same_words(
    kind: str, overrides: list[str], expected: str, tmp_path: Path, capsys: Output
) -> None:
    file = configuration(tmp_path, kind, reward={"pool": {"processes": 0}})
    said = [mistake(capsys, command, file, *overrides) for command in ("check", kind)]
    assert said[0] == said[1] and expected in said[0]
    assert not list((tmp_path / "run").glob("*"))


def long_rows(folder: Path) -> Path:
    """Conversations of 25 and of 304 tokens, for a context of 256."""
    rows = [[{"role": "user", "content": "1"}, {"role": "assistant", "content": "2" * n}] for n in (20, 300, 20, 20)]
    path = folder / "long.jsonl"
    path.write_text("\n".join(json.dumps({"messages": messages}) for messages in rows))
    return path


def test_a_conversation_longer_than_the_context_is_refused_wherever_it_is_drawn(tmp_path: Path, capsys: Output) -> None:
    file, rows = configuration(tmp_path, "sft"), long_rows(tmp_path)
    said = {mistake(capsys, command, file, f"data.train={rows}", "data.max_tokens=400") for command in ("check", "sft")}
    assert len(said) == 1 and f"row 1 of {rows} has 305 tokens, the model's context is 256" in said.pop()
    config = load_config(file, [f"data.train={rows}", "data.max_tokens=400"], kind=SftConfig)
    assert isinstance(config, SftConfig)
    with pytest.raises(UserError, match="the model's context is 256") as caught, open_sft(config) as run:
        next_batch(run)  # without a check before
    assert "set data.max_tokens=256 and data.over_long=filter" in caught.value.fix
    for way in ("filter", "truncate"):
        fitting = ("data.max_tokens=256", f"data.over_long={way}", f"data.train={rows}")
        assert "all checks passed" in succeed(capsys, "check", file, *fitting)


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_check_and_the_run_say_alike_that_a_tracker_is_not_installed(
    name: str, tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = configuration(tmp_path, track={name: True}, reward={"pool": {"processes": 0}})
    assert "not available" not in succeed(capsys, "check", file)
    monkeypatch.setitem(sys.modules, name, None)
    expected = f"pip install 'hybridflow[{name}]'; training continues, and metrics.jsonl has everything"
    assert f"warning: {name}: not available; install it with: {expected}" in succeed(capsys, "check", file)


def test_check_asks_for_ray_where_a_run_would(tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "hybridflow.controller.backends.ray", raising=False)
    said = mistake(capsys, "check", configuration(tmp_path), "placement.backend=ray", "placement.pools={all: 1}")
    assert "placement.backend is ray, and Ray is not installed" in said and "hybridflow[ray]" in said


@pytest.mark.parametrize(
    ("kind", "overrides", "expected"),
    [
        (
            "train",
            ["rollout.max_response_tokens=100000"],
            "set train.tokens_per_microbatch=100016 or more, or lower one",
        ),
        ("sft", ["data.max_tokens=20000"], "set it to 20000 or more, or lower data.max_tokens"),
    ],
)
def test_a_budget_below_one_sequence_says_what_to_set(
    kind: str, overrides: list[str], expected: str, tmp_path: Path, capsys: Output
) -> None:
    assert expected in mistake(capsys, "check", configuration(tmp_path, kind), *overrides)
