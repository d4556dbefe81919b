"""Watches the gap between the engine that samples and the policy that is trained, and gives advice when it has grown.

Three metrics of `algorithms.mismatch` are watched: the divergence over the vocabulary that tokens were drawn from, the
99th percentile of the gaps of log-probabilities, and what cutting the vocabulary adds. Each has an early level, the
median of its first `EARLY` steps. It has grown when it was above `TIMES` that level and above a floor in each of the
last `STAYS` steps, and the advice is repeated only after the metric was below half of that bound as long.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

EARLY, STAYS, TIMES = 5, 3, 4.0
FLOORS = {"rollout_corr/k3_kl": 1e-3, "mismatch/abs_logp_diff/p99": 0.1, "mismatch/k3/support": 0.1}
PARTS = {
    "numerics": (
        "numerics, the same weights computed by two engines",
        "set rollout.dtype=float32 (and look for a wrong sync if it is)",
    ),
    "staleness": (
        "staleness, responses drawn with older weights than score them",
        "publish weights more often, or finish responses before it",
    ),
    "support": (
        "the sampling support, words of the policy that are never drawn",
        "raise rollout.top_p, or lower rollout.top_k or rollout.min_p",
    ),
}
CORRECT = "; or weigh it out with algorithm.correction.preset=decoupled_token_is"


@dataclass(slots=True)
class Level:
    """One number over the steps: its early level, and its last values."""

    early: list[float] = field(default_factory=list)
    last: list[float] = field(default_factory=list)

    def take(self, value: float) -> None:
        """Adds the next step's value."""
        if len(self.early) < EARLY:
            self.early.append(value)
        else:
            self.last = [*self.last, value][-STAYS:]

    def growth(self) -> float:
        """Returns by how much the value is above its early level."""
        return statistics.median(self.last) - statistics.median(self.early) if self.last else 0.0


class MismatchWatch:
    """Takes the metrics of every step.

    Its state follows from them alone: a resumed run feeds it the recorded metrics.

    Args:
        corrected: whether the run corrects for the gap already, so that the advice does not ask for it.
    """

    def __init__(self, *, corrected: bool) -> None:
        self.corrected = corrected
        self.levels = {name: Level() for name in [*FLOORS, "mismatch/k3/numerics", "mismatch/k3/staleness"]}
        self.grown: set[str] = set()

    def observe(self, metrics: Mapping[str, float]) -> str | None:
        """Returns advice after the step with these metrics, if there is any."""
        for name in self.levels.keys() & metrics.keys():
            self.levels[name].take(metrics[name])
        for name, floor in FLOORS.items():
            level = self.levels[name]
            if len(level.last) < STAYS or name not in metrics:
                continue
            bound = max(floor, TIMES * statistics.median(level.early))
            if name not in self.grown and min(level.last) > bound:
                self.grown.add(name)
                return self._sentence(name, level)
            if max(level.last) < bound / 2:
                self.grown.discard(name)
        return None

    def _sentence(self, name: str, level: Level) -> str:
        part = "support"
        if name != "mismatch/k3/support":
            part = max(("numerics", "staleness"), key=lambda p: self.levels[f"mismatch/k3/{p}"].growth())
        what, change = PARTS[part]
        more = "" if self.corrected or part == "support" else CORRECT
        return (
            f"sampler and trainer drift apart: {name} stays above {min(level.last):.2g} (it was "
            f"{statistics.median(level.early):.2g} in the first {EARLY} steps). What grew is {what}: {change}{more}"
        )
