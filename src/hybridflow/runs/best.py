"""The best step of a run by a held-out metric (``checkpoint.best``)."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping

from hybridflow.checkpoint.store import Best
from hybridflow.config.sections.run import CheckpointSection
from hybridflow.errors import UserError, nearest


def better(section: CheckpointSection, metrics: Mapping[str, float], step: int, best: Best | None) -> Best | None:
    """Returns the step as the new best, if its metrics are better than the best so far; of equal steps the earlier one
    stays.

    The model that a run begins with (step 0) is none of its checkpoints, and never the best.

    Args:
        section: the metric and whether more is better.
        metrics: of the step; a step that was not evaluated cannot be the best.
        step: the step.
        best: the best so far.

    Raises:
        UserError: the step was evaluated, but nothing of that name was measured.
    """
    name = section.best
    if name is None:
        return None
    measured = [n for n in metrics if n.startswith("val-core/")]
    if measured and name not in metrics:
        raise UserError(
            f"checkpoint.best {name!r} is not among what the evaluation measures", fix=nearest(name, measured)
        )
    value = metrics.get(name, math.nan)
    sign = 1 if section.best_mode == "max" else -1
    if step == 0 or not math.isfinite(value) or (best is not None and sign * value <= sign * best.value):
        return None
    return Best(step, name, value)


def best_of(section: CheckpointSection, lines: Iterable[Mapping[str, float]], saved: Collection[int]) -> Best | None:
    """Returns the best of the steps that are saved, from the lines of metrics.jsonl: the state with which a resumed
    process begins.

    Args:
        section: see `better`.
        lines: the metrics of each step, ascending.
        saved: steps with a checkpoint.
    """
    best = None
    for line in lines:
        if section.best in line and line["step"] in saved:
            best = better(section, line, int(line["step"]), best) or best
    return best
