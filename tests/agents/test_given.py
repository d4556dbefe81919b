"""`hybridflow.train` with tools and environments that are given as objects."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

import hybridflow as hf
from talks import PLAIN, byte_tokenizer

from runs import assert_same_tensors, metrics, mistake
from tiny import CARRY, SIZES

SMALL: dict[str, Any] = {
    "run": {"threads": 1, "device": "cpu"},
    "data": {"max_prompt_tokens": 16},
    "rollout": {"max_response_tokens": 12},
    "train": {"steps": 1, "prompts_per_step": 2, "samples_per_prompt": 2},
    "optim": {"lr": 1e-3},
    "agent": {"max_turns": 3, "max_observation_tokens": 16, "tasks": 4},
    "eval": {"before_training": False},
    "track": {"console": False},
}


class Digits:
    """Says sums, and pays for the length of what it is told."""

    def __init__(self, count: int = 2) -> None:
        self.count = count

    def reset(self, row: dict[str, Any], seed: int) -> str:
        self.random, self.turns = random.Random(seed), 0
        return "1+2="

    async def step(self, action: hf.Action) -> hf.Observation:
        self.turns += 1
        said = f"{self.random.randrange(100)}+2="
        messages = [{"role": "user", "content": said}]
        return hf.Observation(messages, reward=len(action.text) % 5, done=self.turns == self.count)

    def close(self) -> None:
        pass


def add(a: int, b: int) -> int:
    """Adds."""
    return a + b


def byte_model() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model whose template lists tools; too small to learn to call them."""
    tokenizer = byte_tokenizer(PLAIN)
    tokenizer.pad_token = "<|end|>"
    sizes = SIZES | {"vocab_size": len(tokenizer), "max_position_embeddings": 512}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    return Qwen3ForCausalLM(Qwen3Config(**sizes, **ends, head_dim=8)), tokenizer


def of_digits(folder: Path, environment: Any, **given: Any) -> Any:
    call = {"model": f"{CARRY}:tiny_qwen3", "environment": environment, "folder": folder, "config": SMALL}
    return hf.train(**call | given)


def test_an_environment_that_is_an_object_trains_as_its_file_does(tmp_path: Path) -> None:
    run = of_digits(tmp_path / "object", Digits(2))
    of_digits(tmp_path / "file", f"{__file__}:Digits", agent={"environment_kwargs": {"count": 2}})
    weights = "model/model.safetensors"
    assert_same_tensors(tmp_path / "object" / weights, tmp_path / "file" / weights)
    assert run.metrics[-1]["critic/score/max"] > 0
    config = yaml.safe_load((tmp_path / "object/config.yaml").read_text())
    assert config["agent"]["environment"].startswith("given:Digits@")
    assert config["reward"]["function"] == "environment"
    of_digits(tmp_path / "object", Digits(3), train={"steps": 2})  # another object: the setting has changed
    assert "agent.environment" in (tmp_path / "object/events.jsonl").read_text()
    assert len(metrics(tmp_path / "object")) == 2
    with pytest.raises(hf.UserError, match=r"environment Digits has no step\(action\)"):
        of_digits(tmp_path / "none", type("Digits", (), {"reset": Digits.reset, "close": Digits.close}))
    with pytest.raises(hf.UserError, match=r"Digits is given as an object, and agent\.processes"):
        of_digits(tmp_path / "none", Digits, agent={"processes": 2})


def test_tools_that_are_functions_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = byte_model()
    rows = [{"prompt": f"{a}+1?", "ground_truth": str(a + 1)} for a in range(4)]
    call = {"model": model, "tokenizer": tokenizer, "data": rows, "reward": lambda response: len(response) % 7}
    sizes = SMALL | {"data": {"max_prompt_tokens": 300}}
    run = hf.train(**call, tools=[add], folder=tmp_path / "run", config=sizes)  # its environment keys do not count
    assert run.model is not None
    assert 'tool {"name": "add", "description": "Adds."' in capsys.readouterr().out
    config = tmp_path / "run/config.yaml"
    assert yaml.safe_load(config.read_text())["agent"]["tools"][0].startswith("given:add@")
    values = yaml.safe_load(config.read_text())
    values["reward"], values["run"]["folder"] = {"function": "gsm8k"}, str(tmp_path / "other")
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(values))
    assert "is an object that a program gave to this run" in mistake(capsys, "train", tmp_path / "other.yaml")
    with pytest.raises(hf.UserError, match="tools is a function"):
        hf.train(**call, tools=add, folder=tmp_path / "none", config=sizes)  # type: ignore[arg-type]
