"""Named fault points, so that anybody can see that a run survives being killed in any phase.

``HYBRIDFLOW_FAULT=kill@step3:update`` ends the process with SIGKILL at the point "update" of step 3, as a crash of the
machine would. Points of a reinforcement-learning step, in order: gen, group (after every group that is journaled;
``group:5`` is the fifth), update, publish, eval, record, save (a checkpoint is half written), saved, finish (all is
saved but the exported model). Supervised steps have update, save, saved and finish.
"""

from __future__ import annotations

import os
import re
import signal

from hybridflow.errors import UserError

VARIABLE = "HYBRIDFLOW_FAULT"
_FORM = re.compile(r"kill@step(\d+):([a-z]+)(?::(\d+))?")


def fault_point(name: str, step: int, count: int = 1) -> None:
    """Kills this process here if the environment asks for it.

    Args:
        name: name of the point.
        step: step of the run.
        count: how often the point was passed in this step.

    Raises:
        UserError: the variable is set to something that is no fault.
    """
    wanted = os.environ.get(VARIABLE)
    if not wanted:
        return
    form = _FORM.fullmatch(wanted)
    if form is None:
        raise UserError(f"{VARIABLE}={wanted} is no fault", fix="write kill@step3:update or kill@step3:group:5")
    if (int(form[1]), form[2], int(form[3] or 1)) == (step, name, count):
        os.kill(os.getpid(), signal.SIGKILL)
