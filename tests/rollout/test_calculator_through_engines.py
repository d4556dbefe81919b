"""The calculator job for three steps with vLLM or SGLang generating: tools are called as turns come, nothing is polled,
and every sampled token has the probability that the trainer gives it.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from hybridflow.config.kinds.rl import RlConfig
from hybridflow.config.kinds.sft import SftConfig
from hybridflow.config.load import load_config
from hybridflow.protocols.groups import Group
from hybridflow.tracking.jsonl import read_metrics
from hybridflow.trainers.rl.loop import estimate, next_groups, publish_weights, record, update
from hybridflow.trainers.rl.run import open_run
from hybridflow.trainers.sft import train_sft

CALCULATOR = Path(__file__).parents[2] / "recipes/calculator"
SECONDS = "CALCULATOR_SECONDS"
SLOW_TOOL = f"""
import importlib.util, os, time

spec = importlib.util.spec_from_file_location("task", {str(CALCULATOR / "task.py")!r})
task = importlib.util.module_from_spec(spec)
spec.loader.exec_module(task)

def calculate(expression: str) -> str:
    \"\"\"Computes the value of an expression.

    Args:
        expression: such as 47*85.
    \"\"\"
    time.sleep(float(os.environ.get({SECONDS!r}, 0)))
    return task.calculate(expression)
"""


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that calls the tool: the beginning of the warm-up, in which all demonstrations do."""
    folder = tmp_path_factory.mktemp("sft")
    overrides = [f"run.folder={folder}", "train.steps=80", "checkpoint.every=0", "track.console=false"]
    return train_sft(load_config(CALCULATOR / "sft.yaml", overrides, kind=SftConfig)) / "model"


@pytest.mark.parametrize(
    ("engine", "mode"),
    [
        pytest.param("vllm", "in_process", marks=pytest.mark.vllm),
        pytest.param("vllm", "server", marks=pytest.mark.vllm),
        pytest.param("sglang", "server", marks=pytest.mark.sglang),
    ],
)
def test_the_calculator_is_called_through_an_engine_and_nothing_is_polled(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, mode: str
) -> None:
    (tmp_path / "tool.py").write_text(SLOW_TOOL)
    overrides = [
        f"run.folder={tmp_path / 'run'}", f"model.path={start}", f"rollout.engine={engine}", f"rollout.mode={mode}",
        f"agent.tools=[{tmp_path / 'tool.py'}:calculate]", "train.steps=3", "eval.max_rows=8", "track.console=false",
    ]  # fmt: skip
    wall, worked = {}, {}
    with open_run(load_config(CALCULATOR / "grpo.yaml", overrides, kind=RlConfig)) as run:
        record(run, 0, [], None, {})
        for step in run.steps():
            monkeypatch.setenv(SECONDS, "1.5" if step == 3 else "0")
            began, used = time.monotonic(), time.thread_time()
            groups, drawn = next_groups(run, step)
            wall[step], worked[step] = time.monotonic() - began, time.thread_time() - used
            assert_called_and_answered(groups, step - 1)
            batch, estimated = estimate(run, groups)
            learned = update(run, batch)
            record(run, step, groups, batch, learned | drawn | estimated | publish_weights(run, step))
    assert wall[3] > 1.5, "the tool was slow"
    assert worked[3] < worked[2] + 0.3, "a thread that waits for a tool must not work"
    metrics = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [m["step"] for m in metrics] == [0, 1, 2, 3]
    assert all(m["training/rollout_probs_diff_max"] <= 1e-4 for m in metrics[1:])
    assert any(m["actor/grad_norm"] > 0 for m in metrics[1:])


def assert_called_and_answered(groups: list[Group], version: int) -> None:
    called = 0
    for trajectory in [t for group in groups for t in group.trajectories]:
        assert trajectory.failure is None
        (sequence,) = trajectory.sequences
        called += len(sequence.turns) > 1
        assert [s.version for s in sequence.spans] == [version] * len(sequence.spans)
        for turn, later in zip(sequence.turns, sequence.turns[1:]):
            assert later.start > turn.end, "the result of the tool lies between two turns"
    assert called > 20, "most trajectories call it"
