"""Starting a run from the command line: checks first, then training, then where the results are and how to resume."""

from __future__ import annotations

import os
from pathlib import Path

from hybridflow.checkpoint.store import read_best, saved_steps
from hybridflow.commands.check import check
from hybridflow.config.kinds.registry import TrainingConfig, kind_for
from hybridflow.placing.places import serve_torchrun
from hybridflow.runs.finished import AlreadyDone, finished
from hybridflow.runs.lifecycle import Interrupted
from hybridflow.tracking.events import read_events
from hybridflow.tracking.jsonl import read_metrics
from hybridflow.tracking.signal_watch import SignalWatch
from hybridflow.viewer.report import write_report


def start(config: TrainingConfig, *, again: str) -> int:
    """Checks a configuration and runs it.

    Args:
        config: what to run.
        again: the command that resumes this run, to be shown when it stops early.

    Returns:
        0 when the run is done (also when it was so before), 130 when it was stopped before its end.
    """
    over = finished(config)
    if over is not None:
        return _nothing_to_do(over)
    serve_torchrun(config.placement)
    for line in check(config):
        print(line)
    folder = Path(config.run.folder)
    try:
        kind_for(config).trained(config)
    except Interrupted:
        pass
    except AlreadyDone as done:
        return _nothing_to_do(done)
    steps = read_metrics(folder / "metrics.jsonl")
    watch = SignalWatch()
    for metrics in steps:
        watch.observe(metrics)
    advice = watch.summary()
    if advice is not None:
        print(f"advice: {advice}")
    print(f"report: {write_report(folder)}")
    if read_events(folder / "events.jsonl")[-1]["kind"] == "done":  # model/ alone may be of a shorter run before
        print(f"model: {folder / 'model'}  (a Hugging Face folder)")
        best = read_best(folder / "checkpoints")
        if best is not None:
            print(f"best: step {best.step}, {best.metric} {best.value:.4f}; hybridflow export {folder} FOLDER --best")
        return 0
    last = max([0, *(int(m["step"]) for m in steps), *saved_steps(folder / "checkpoints")])
    print(f"stopped after step {last}; to resume: {again}")
    return 130


def _nothing_to_do(done: AlreadyDone) -> int:
    if os.environ.get("RANK", "0") == "0":  # of the processes that torchrun started, one says it
        print(done.line())
    return 0
