"""Named fault points: a run is killed, or a worker fails, in a chosen phase, to show how the run recovers.

``HYBRIDFLOW_FAULT=kill@step3:update`` ends the process with SIGKILL at the point "update" of step 3, as a crash of the
machine would. Points of a reinforcement-learning step, in order: gen, group (after every group that is journaled;
``group:5`` is the fifth), call (after an answer of a tool or an environment, before it is on disk), answered (when
answers are), update, publish, eval, record, save (a checkpoint is half written), saved, finish (all is
saved but the exported model). Supervised steps have update, save, saved and finish.

``HYBRIDFLOW_FAULT=ACTION:GROUP[.RANK]@stepN:METHOD[:COUNT]`` makes a worker of a group fail when the controller calls a
method of it: ``kill:actor.1@step3:update``. Without a rank all workers of the group fail; COUNT is which call of the
method in that step (the first, if left out); the method ``create`` is the making of the worker. Actions:

    kill      the process ends with SIGKILL, as by the kernel when memory runs out
    raise     the worker raises a RuntimeError
    sleep     the worker never replies; the others of its pool wait for it in their next collective
    oom       the worker raises a MemoryError
    drop-row  the worker is given one sequence fewer than the controller sent
"""

from __future__ import annotations

import os
import re
import signal
import time
from typing import Literal

from hybridflow.errors import UserError

VARIABLE = "HYBRIDFLOW_FAULT"
_OWN = re.compile(r"kill@step(\d+):([a-z]+)(?::(\d+))?")
_WORKER = re.compile(r"(kill|raise|sleep|oom|drop-row):([\w-]+)(?:\.(\d+))?@step(\d+):([a-z_]+)(?::(\d+))?")


def fault_point(name: str, step: int, count: int = 1) -> None:
    """Kills this process here if the environment asks for it.

    Args:
        name: name of the point.
        step: step of the run.
        count: how often the point was passed in this step.

    Raises:
        UserError: the variable is set to something that is no fault.
    """
    form = _wanted(_OWN)
    if form is not None and (int(form[1]), form[2], int(form[3] or 1)) == (step, name, count):
        os.kill(os.getpid(), signal.SIGKILL)


def worker_fault(group: str, rank: int, method: str, step: int, count: int = 1) -> Literal["drop-row"] | None:
    """Makes this worker fail here if the environment asks for it.

    Args:
        group: name of the worker's group.
        rank: of the worker in its group.
        method: the method that is called.
        step: step of the run.
        count: how often the method was called in this step.

    Returns:
        "drop-row" if the caller shall take a sequence away from the arguments.

    Raises:
        UserError: the variable is set to something that is no fault.
        RuntimeError, MemoryError: as the fault says.
    """
    form = _wanted(_WORKER)
    if form is None or (form[2], int(form[4]), form[5], int(form[6] or 1)) != (group, step, method, count):
        return None
    if form[3] is not None and int(form[3]) != rank:
        return None
    if form[1] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if form[1] == "raise":
        raise RuntimeError(f"a fault that {VARIABLE} asked for")
    if form[1] == "oom":
        raise MemoryError(f"a fault that {VARIABLE} asked for")
    while form[1] == "sleep":
        time.sleep(3600)
    return "drop-row"


def _wanted(kind: re.Pattern[str]) -> re.Match[str] | None:
    """Returns the fault that the environment asks for, if it is of this kind."""
    wanted = os.environ.get(VARIABLE)
    if not wanted:
        return None
    if _OWN.fullmatch(wanted) is None and _WORKER.fullmatch(wanted) is None:
        raise UserError(
            f"{VARIABLE}={wanted} is no fault",
            fix="write kill@step3:update or kill@step3:group:5; of a worker kill:actor.1@step3:update, or with raise, "
            "sleep, oom or drop-row for kill",
        )
    return kind.fullmatch(wanted)
