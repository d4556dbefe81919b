"""Tiny runs for tests: a folder with a configuration in which everything is small, and the command in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from hybridflow.cli.main import main
from hybridflow.config.locate import load_function

from tiny import CARRY

CONVERSATIONS = load_function(f"{CARRY}:demonstrations")(seed=3, count=30)
# The first of the recipe's problems: reading all 4,000 of them takes longer than the run.
PROBLEMS = load_function(f"{CARRY}:problems")(seed=3, count=100)
HELD_OUT = load_function(f"{CARRY}:held_out_problems")(count=8)

# Its values differ between answers, however untrained the model: every step has something to learn from.
REWARD = """
def score(response, ground_truth):
    return sum(map(ord, response)) % 101 / 101
"""


def configuration(folder: Path, command: str = "train", **sections: dict[str, Any]) -> str:
    """Writes the YAML file of a small run that lives in ``folder/run``; sections are laid over the small values."""
    (folder / "reward.py").write_text(REWARD)
    write_rows(folder)
    values: dict[str, dict[str, Any]] = {
        "run": {"folder": str(folder / "run"), "seed": 3, "threads": 1, "device": "cpu"},
        "model": {"path": f"{CARRY}:tiny_qwen3"},
        "data": {"train": str(folder / "conversations.jsonl")},
        "train": {"steps": 3, "sequences_per_update": 4},
        "optim": {"lr": 1e-3},
        "track": {"console": False},
    }
    if command != "sft":
        values |= {
            "data": {
                "train": str(folder / "problems.jsonl"),
                "eval": str(folder / "held_out.jsonl"),
                "max_prompt_tokens": 16,
            },
            "reward": {"function": str(folder / "reward.py:score")},
            "rollout": {"max_response_tokens": 8},
            "train": {"steps": 2, "prompts_per_step": 2, "samples_per_prompt": 2},
            "eval": {"max_rows": 4},
        }
    if command == "eval":
        values = {name: values[name] for name in ("run", "model", "data", "reward", "rollout", "eval")}
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    path = folder / f"{command}.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def write_rows(folder: Path) -> None:
    """Writes the data of small runs: conversations.jsonl, problems.jsonl and held_out.jsonl."""
    for name, rows in {"conversations": CONVERSATIONS, "problems": PROBLEMS, "held_out": HELD_OUT}.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))


def succeed(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """What a command that ends well prints."""
    capsys.readouterr()
    status = main([str(a) for a in arguments])
    printed = capsys.readouterr()
    assert status == 0, printed.err
    return printed.out


def mistake(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """What a command says that ends with a mistake of the user's."""
    capsys.readouterr()
    status = main([str(a) for a in arguments])
    printed = capsys.readouterr()
    assert status == 1, printed.out
    assert printed.err.startswith("error: ")
    return printed.err


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, as they are on disk."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_tensors(one: Path, other: Path) -> None:
    """Two safetensors files hold the same, bit for bit."""
    a, b = load_file(one), load_file(other)
    assert a.keys() == b.keys() and a
    assert [n for n in a if not a[n].equal(b[n])] == []
