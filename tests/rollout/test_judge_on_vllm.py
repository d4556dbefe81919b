"""A judge on a vLLM server that the run starts gives the verdicts that it gives on the inline engine."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from hybridflow.config.kinds.eval import EvalConfig
from hybridflow.config.locate import load_function
from hybridflow.grading.engine_judge import make_judge
from hybridflow.protocols.rewards import Answers, Grader, Score

from tiny import CARRY

PARSER = """
def number(text):
    return sum(i * ord(letter) for i, letter in enumerate(text, start=1)) / 9973
"""


def answers(*responses: str) -> Answers:
    return Answers(list(responses), None, [{"role": "user", "content": "3+4="}], {})


def judge(folder: Path, engine: str) -> Grader:
    keys: dict[str, Any] = {
        "path": str(folder / "judge"),
        "engine": engine,
        "template": str(folder / "judge.jinja"),
        "parser": f"{folder / 'parse.py'}:number",
        "max_tokens": 12,
        "max_prompt_tokens": 40,
    }
    sections = {
        "run": {"folder": str(folder / "run"), "seed": 3, "device": "cpu"},
        "model": {"path": f"{CARRY}:tiny_qwen3"},
        "data": {"eval": f"{CARRY}:held_out_problems"},
        "reward": {"function": "judge", "judge": keys},
    }
    c = EvalConfig.model_validate(sections)
    assert c.reward.judge is not None
    return make_judge(c.reward.judge, c.reward.pool, c.run, c.rollout, None)


@pytest.mark.vllm
def test_a_vllm_server_gives_the_verdicts_of_the_inline_engine(tmp_path: Path) -> None:
    model, tokenizer = load_function(f"{CARRY}:tiny_qwen3")(seed=3)
    model.save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    (tmp_path / "judge.jinja").write_text("{{ question }} {{ response }}?")
    (tmp_path / "parse.py").write_text(PARSER)
    groups = {0: answers("7", "8", "seven"), 1: answers("3+4=7#7", "7" * 50)}
    verdicts = []
    for engine in ("inline", "vllm"):
        grader = judge(tmp_path, engine)
        grader.check()
        found: dict[int, list[Score]] = {}
        try:
            for key, group in groups.items():
                grader.submit(key, group)
            while len(found) < len(groups):
                found.update(grader.wait())
            if engine == "vllm":
                grader.submit(2, answers("9"))
                until = time.monotonic() + 60
                while 2 not in found and time.monotonic() < until:  # it works while nobody waits for it
                    found.update(grader.ready())
                assert found.pop(2)[0].failure is None
        finally:
            grader.close()
        verdicts.append(found)
    assert verdicts[0] == verdicts[1]
    assert [score.kind for score in verdicts[0][1]] == ["", "refused"]
