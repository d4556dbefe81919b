"""A model learns calls of a tool from supervised rows; generate plays them; check tells what turns do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from talks import PLAIN, TWO_ENDS, WITHOUT_TOOLS

from runs import mistake, succeed

Output = pytest.CaptureFixture[str]
MODEL = """
import sys
sys.path.insert(0, {tests!r})
from talks import byte_tokenizer
from transformers import Qwen3Config, Qwen3ForCausalLM
import torch

def model(seed=0):
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=262, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=1024, tie_word_embeddings=True,
        initializer_range=0.06, eos_token_id=257, bos_token_id=None,
    )
    return Qwen3ForCausalLM(config), byte_tokenizer({template!r})
"""
TOOL = '''
calls = []

def add(a: int, b: int) -> int:
    """Adds.

    Args:
        a: one number.
        b: another.
    """
    calls.append((a, b))
    return a + b
'''


@pytest.mark.slow
def test_a_model_learns_calls_from_rows_and_generate_plays_them(tmp_path: Path, capsys: Output) -> None:
    (tmp_path / "model.py").write_text(MODEL.format(tests=str(Path(__file__).parents[1]), template=PLAIN))
    (tmp_path / "tool.py").write_text(TOOL)
    from hybridflow.agents.make import load_tools

    [schema] = load_tools([f"{tmp_path}/tool.py:add"]).schemas
    rows = []
    for a in (1, 2, 3, 4):
        call = {"function": {"name": "add", "arguments": {"a": a, "b": a}}}
        talk = [
            {"role": "user", "content": f"double {a}"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": str(2 * a)},
            {"role": "assistant", "content": f"It is {2 * a}."},
        ]
        rows.append({"messages": talk, "tools": [schema]})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "run": {"folder": str(tmp_path / "run"), "threads": 1},
        "model": {"path": f"{tmp_path}/model.py:model"},
        "data": {"train": str(tmp_path / "rows.jsonl"), "max_tokens": 1024},
        "train": {"steps": 150, "sequences_per_update": 4, "stop_below_loss": 0.01},
        "optim": {"lr": 5e-3},
    }
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(config))
    succeed(capsys, "sft", tmp_path / "sft.yaml")
    tool = f"{tmp_path}/tool.py:add"
    said = succeed(capsys, "generate", tmp_path / "run", "double 2", "double 3", "--tools", tool)
    assert said == "double 2\nadd(a=2, b=2)\n  -> 4\nIt is 4.\ndouble 3\nadd(a=3, b=3)\n  -> 6\nIt is 6.\n"
    answer = json.loads(succeed(capsys, "generate", tmp_path / "run", "double 4", "--tools", tool, "--json"))
    assert [message["role"] for message in answer["messages"]] == ["assistant", "tool", "assistant"]
    assert answer["response"] == "It is 8." and answer["finish_reason"] == "done"
    cut = succeed(capsys, "generate", tmp_path / "run", "double 4", "--tools", tool, "--max-tokens", "5")
    assert cut.endswith("[ended after 5 tokens: length]\n")
    assert "is no tool" in mistake(capsys, "generate", tmp_path / "run", "double 4", "--tools", "add")


def acting(tmp_path: Path, template: str) -> Path:
    """A configuration of a model that may call the tool."""
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "model.py").write_text(MODEL.format(tests=str(Path(__file__).parents[1]), template=template))
    (tmp_path / "tool.py").write_text(
        TOOL + "\ndef score(response, ground_truth):\n    return ground_truth in response\n"
    )
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "double 2", "ground_truth": "4"}) + "\n")
    config = {
        "run": {"folder": str(tmp_path / "run"), "threads": 1},
        "model": {"path": f"{tmp_path}/model.py:model"},
        "data": {"train": str(tmp_path / "rows.jsonl"), "max_prompt_tokens": 700},
        "reward": {"function": f"{tmp_path}/tool.py:score"},
        "rollout": {"max_response_tokens": 8},
        "agent": {"tools": [f"{tmp_path}/tool.py:add"], "max_turns": 2, "max_observation_tokens": 32},
        "train": {"steps": 1, "prompts_per_step": 1, "samples_per_prompt": 2},
        "eval": {"every": 0},
    }
    (tmp_path / "rl.yaml").write_text(yaml.safe_dump(config))
    return tmp_path / "rl.yaml"


def test_check_prints_what_appends_and_what_forks(tmp_path: Path, capsys: Output) -> None:
    said = succeed(capsys, "check", acting(tmp_path, PLAIN))
    assert "(agent.history=template)\n  text, then the user: appends\n" in said
    assert "  a call, then its result: appends\n" in said and "agent.history=append" not in said
    said = succeed(capsys, "check", acting(tmp_path / "two", TWO_ENDS))
    assert "  a call, then its result: forks (closing rewritten: it ends an earlier turn in another way" in said
    assert "advice: a new sequence begins after each call" in said


def test_a_template_without_tools_is_refused_before_training(tmp_path: Path, capsys: Output) -> None:
    config = acting(tmp_path, WITHOUT_TOOLS)
    for command in ("check", "train"):
        assert "the chat template does not list tools" in mistake(capsys, command, config)
    assert not (tmp_path / "run/metrics.jsonl").exists()
