"""Ctrl-C while answers are generated or scored: waits come back at once, and nothing that counts is lost."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from hybridflow.cli.main import main
from hybridflow.config.load import load_config
from hybridflow.config.sections.rewards import RewardPoolSection
from hybridflow.noise import NoiseKey
from hybridflow.protocols.generation import Request, Sampling, generate
from hybridflow.protocols.rewards import Answers, score_all
from hybridflow.protocols.waiting import Stopped, returning_when
from hybridflow.rewards.graders.composed import ComposedGrader, Part
from hybridflow.rewards.graders.function import FunctionSpec
from hybridflow.rewards.pool.grader import ProcessGrader
from hybridflow.rollout.inline.engine import InlineEngine
from hybridflow.tracking.events import read_events
from hybridflow.tracking.rollouts import read_rollouts
from hybridflow.tracking.signal_watch import SignalWatch
from hybridflow.trainers.rl.run import open_run

from runs import assert_same_tensors, configuration, metrics, succeed
from tiny import packed_model

# Presses Ctrl-C while the held-out answers of these numbers are scored, counted over all processes of the run.
PRESSED = """
import os, signal
from pathlib import Path
here = Path(__file__).parent
def score(response, row):
    handler = getattr(signal.getsignal(signal.SIGINT), "__qualname__", "")
    if row["held_out"] and handler == "StopRequest._on_signal":  # in the run, and not in the checks before it
        with (here / "scored").open("a") as file:
            file.write(".")
        if (here / "scored").stat().st_size in {stops}:
            signal.raise_signal(signal.SIGINT)
    return sum(map(ord, response)) % 101 / 101
"""


def run_with(folder: Path, stops: list[int]) -> str:
    folder.mkdir()
    (folder / "pressed.py").write_text(PRESSED.format(stops=stops))
    for name, count in [("train", 8), ("eval", 3)]:
        rows = [{"prompt": f"{i}+{i}=", "ground_truth": str(i), "held_out": name == "eval"} for i in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return configuration(
        folder,
        data={name: str(folder / f"{name}.jsonl") for name in ("train", "eval")},
        reward={"function": str(folder / "pressed.py:score"), "pool": {"processes": 0}},
        eval={"every": 1}, track={"console": True}, rollout={"max_response_tokens": 6},
        checkpoint={"best": "val-core/data/reward/mean@1"},
    )  # fmt: skip


def of_steps(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in m.items() if not k.startswith(("timing_s/", "perf/"))} for m in metrics(run)]


def test_a_run_that_is_stopped_in_its_evaluations_ends_as_one_that_was_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Three answers each: of step 0 (1; then 2 to 4), of step 1 (5, 6; 7, 8; 9 to 11), of step 2 (12, 13; 14 to 16).
    stopped, straight = run_with(tmp_path / "stopped", [1, 6, 8, 13]), run_with(tmp_path / "straight", [])
    said = []
    for stop in range(4):
        assert main(["train", stopped]) == 130
        said.append(capsys.readouterr().out)
        if stop:  # what looks at metrics has seen those of the step, whose line waits for the evaluation
            with open_run(load_config(stopped)) as opened:
                watch = next(watch for watch in opened.watches if isinstance(watch, SignalWatch))
                assert watch.learned or len(watch.streak) == opened.step
    run = tmp_path / "stopped/run"
    assert "stopped after step 0;" in said[0] and "stopped after step 2;" in said[3]
    for text, step in zip(said[1:], (1, 1, 2)):
        assert f"stopped in the evaluation of step {step}: it is made when the run resumes" in text
    assert [m["step"] for m in metrics(run)] == [0, 1] and not (run / "model").exists()
    stops = [e["text"] for e in read_events(run / "events.jsonl") if e["kind"] == "stopped"]
    assert stops == [f"after step {step} of 2: Ctrl-C" for step in (0, 1, 1, 2)]
    for config in (stopped, straight):
        succeed(capsys, "train", config)
    other = tmp_path / "straight/run"
    assert of_steps(run) == of_steps(other) and [m["step"] for m in metrics(run)] == [0, 1, 2]
    assert_same_tensors(run / "model/model.safetensors", other / "model/model.safetensors")
    for name in ("evaluations/step-000001.parquet", "evaluations/step-000002.parquet", "rollouts/step-000002.parquet"):
        assert read_rollouts(run / name) == read_rollouts(other / name)
    assert json.loads((run / "checkpoints/best.json").read_text()) == json.loads(
        (other / "checkpoints/best.json").read_text()
    )


def test_generation_that_came_back_early_goes_on_with_the_same_tokens() -> None:
    model = packed_model("qwen3")
    asked = [
        Request((3, 4, 5 + i), Sampling(max_tokens=20, temperature=1.0), NoiseKey(0, "eval", i, 0)) for i in range(6)
    ]
    expected = [(r.token_ids, r.logps) for r in generate(InlineEngine(model), asked)]
    engine, found, looks = InlineEngine(model), {}, 0
    handles = [engine.submit(request) for request in asked]
    while len(found) < len(asked):
        looks += 1
        with returning_when(iter([False, True]).__next__, engine):  # one decoding step at a time
            found.update({r.handle: (r.token_ids, r.logps) for r in engine.wait()})
        assert engine.should_return() is False
    assert [found[h] for h in handles] == expected and looks > 10
    for request in asked:
        engine.submit(request)
    with returning_when(lambda: True, engine):
        assert engine.wait() == []
    assert len(engine.abort(range(100))) == len(asked)


@pytest.mark.parametrize("composed", [False, True])
def test_scoring_that_hangs_is_given_up_within_a_second(composed: bool, tmp_path: Path) -> None:
    (tmp_path / "hangs.py").write_text("import time\ndef score(response):\n    time.sleep(60)\n    return 1.0\n")
    pool = ProcessGrader({"f": FunctionSpec(f"{tmp_path / 'hangs.py'}:score")}, RewardPoolSection(timeout=90))
    grader = ComposedGrader(lambda answers: [Part(None, pool, "f")], [pool]) if composed else pool
    began = time.monotonic()

    def pressed() -> bool:
        return time.monotonic() > began + 0.5

    try:
        with pytest.raises(Stopped), returning_when(pressed, grader):
            score_all(grader, [Answers(["a"], None, [], {})], pressed)
        assert time.monotonic() < began + 10  # of 60; a machine under load
    finally:
        grader.close()
    assert time.monotonic() < began + 20
