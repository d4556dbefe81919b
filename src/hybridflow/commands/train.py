"""Starting a run from the command line: checks first, then training, then where the results are and how to resume."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridflow.agents.given import NOTHING, Given
from hybridflow.checkpoint.store import read_best, saved_steps
from hybridflow.commands.check import check
from hybridflow.config.kinds.registry import TrainingConfig, kind_for
from hybridflow.placing.places import serve_torchrun
from hybridflow.rewards.graders.given import GivenReward
from hybridflow.runs.finished import AlreadyDone, finished
from hybridflow.runs.lifecycle import Interrupted
from hybridflow.tracking.events import read_events
from hybridflow.tracking.jsonl import read_metrics
from hybridflow.tracking.signal_watch import SignalWatch
from hybridflow.viewer.report import write_report


@dataclass(frozen=True, slots=True)
class Ended:
    """How a run ended.

    Args:
        done: whether it is at its end, also where it was so before.
        interrupted: the signal that stopped it.
    """

    done: bool
    interrupted: Interrupted | None = None


def start(config: TrainingConfig, *, again: str) -> int:
    """Checks a configuration and runs it; returns the exit status of the command, see `run_checked`."""
    return 0 if run_checked(config, again=again).done else 130


def run_checked(
    config: TrainingConfig,
    *,
    again: str,
    reward: GivenReward | None = None,
    given: Given = NOTHING,
    **objects: Any,
) -> Ended:
    """Checks a configuration, runs it, and prints where to look and what resumes it.

    Args:
        config: what to run.
        again: what resumes this run, to be shown when it stops early.
        reward: a reward that a program gives as an object.
        given: other objects that it gives, by the names that the configuration has for them.
        objects: what else it gives for training, see `Kind.trained`.
    """
    over = finished(config)
    if over is not None:
        return _nothing_to_do(over)
    serve_torchrun(config.placement)
    scored: dict[str, Any] = {} if reward is None else {"reward": reward}
    scored |= {"given": given} if given else {}
    for line in check(config, **scored):
        print(line)
    folder, interrupted = Path(config.run.folder), None
    try:
        kind_for(config).trained(config, **scored, **objects)
    except Interrupted as signalled:
        interrupted = signalled
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
        return Ended(done=True)
    last = max([0, *(int(m["step"]) for m in steps), *saved_steps(folder / "checkpoints")])
    print(f"stopped after step {last}; to resume: {again}")
    return Ended(done=False, interrupted=interrupted)


def _nothing_to_do(done: AlreadyDone) -> Ended:
    if os.environ.get("RANK", "0") == "0":  # only one of the processes that torchrun started prints it
        print(done.line())
    return Ended(done=True)
