"""The recipes in which a model acts, whole, with one seed: from random weights to reinforcement."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from hybridflow.config.locate import load_function
from hybridflow.tracking.rollouts import read_rollouts

from runs import metrics

RECIPES = Path(__file__).resolve().parents[1] / "recipes"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_demo_teaches_a_model_to_call_the_calculator(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, RECIPES / "calculator/demo.py", "77"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "runs/demo-agent/grpo"
    evaluations = [read_rollouts(file) for file in sorted((run / "evaluations").glob("*.parquet"))]
    before, after = (sum(row["reward"] for row in rows) / 256 for rows in (evaluations[0], evaluations[-1]))
    assert after - before >= 0.3
    assert sum("<tool_call>" in row["response"] for row in evaluations[-1]) / 256 > 0.85
    assert f"{before:.1%}" in done.stdout and f"{after:.1%}" in done.stdout
    assert "tool_call" in (run / "report.html").read_text()
    steps = metrics(run)[1:]
    assert len(steps) == 40
    # The log-probabilities of the sampler and of the trainer, over all sampled tokens of all turns.
    assert max(m["mismatch/abs_logp_diff/max"] for m in steps) < 1e-4


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_success_in_the_grid_rises_with_gigpo_and_with_grpo(tmp_path: Path) -> None:
    run_grid = runpy.run_path(str(RECIPES / "grid/grid.py"))["run_grid"]
    found = run_grid(tmp_path, 77, changes=["eval.every=60"], live=False)
    for algorithm in ("gigpo", "grpo"):
        assert found[algorithm]["after"] - found[algorithm]["before"] >= 0.25
        assert max(m["mismatch/abs_logp_diff/max"] for m in metrics(tmp_path / algorithm)[1:]) < 1e-4
    walks = read_rollouts(tmp_path / "gigpo/rollouts/step-000060.parquet")
    assert any(row["sequence"] > 0 and row["fork"] == "step" for row in walks)
    assert all(len(row["turns"]) == 1 for row in walks)


def test_held_out_questions_and_walks_are_never_trained_on() -> None:
    for recipe, trained, held_out in [
        ("calculator", ("problems", "demonstrations"), "held_out_problems"),
        ("grid", ("tasks", "demonstrations"), "held_out_tasks"),
    ]:
        rows = {name: load_function(f"{RECIPES / recipe / 'task.py'}:{name}")() for name in (*trained, held_out)}
        seen = {_question(row) for name in trained for row in rows[name]}
        assert len(seen) > 300 and not seen & {_question(row) for row in rows[held_out]}


def _question(row: dict[str, object]) -> object:
    """Returns what a row of either recipe asks, as text."""
    if "start" in row:
        (x, y), (gx, gy) = row["start"], row["goal"]  # type: ignore[misc]
        return f"you {x},{y} goal {gx},{gy}"
    return row["messages"][0]["content"] if "messages" in row else row["prompt"]  # type: ignore[index]
