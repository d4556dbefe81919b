"""The main job, whole: from random weights to reinforcement, as `make demo` runs it."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from hybridflow.tracking.events import read_events

DEMO = Path(__file__).parents[1] / "recipes/carry/demo.py"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_reinforcement_raises_held_out_accuracy_by_fifty_points(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, DEMO, "77"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = [json.loads(line) for line in (tmp_path / "runs/demo/grpo/metrics.jsonl").read_text().splitlines()]
    accuracy = [m["val-core/carry/reward/mean@1"] for m in metrics if "val-core/carry/reward/mean@1" in m]
    assert accuracy[-1] - accuracy[0] >= 0.5
    assert f"{accuracy[0]:.1%}" in done.stdout and f"{accuracy[-1]:.1%}" in done.stdout
    assert (tmp_path / "runs/demo/grpo/report.html").is_file()
    told = [event["text"] for event in read_events(tmp_path / "runs/demo/grpo/events.jsonl")]
    assert not any("the reward rises" in text for text in told), "it rises for a good reason"
    peak_gb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 2**30
    assert peak_gb < 2
