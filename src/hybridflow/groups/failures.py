"""What becomes of answers that the reward failed on: ``reward.on_failure``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from hybridflow.errors import UserError
from hybridflow.protocols.rewards import Score


@dataclass(frozen=True, slots=True)
class FailurePolicy:
    """What happens to answers that the reward failed on; see ``reward.on_failure``.

    Args:
        on_failure: what happens.
        value: the reward for "value".
        advice: what the user may change, by `Score.kind`.
    """

    on_failure: Literal["fail", "drop_group", "mask", "value"] = "fail"
    value: float = 0.0
    advice: dict[str, str] = field(default_factory=dict)

    def refuse(self, score: Score, where: str) -> UserError:
        """What ends a run at its first failure.

        Args:
            score: a failed one.
            where: which row of which data.
        """
        what, scoring, why = str(score.failure).partition(" (it was scoring ")
        otherwise = OTHERWISE if self.on_failure == "fail" else ""  # else the user has said so already
        fix = self.advice.get(score.kind, "look at the reward") + otherwise
        return UserError(f"{where}: {what}", why=f"it was scoring {why.removesuffix(')')}" if scoring else "", fix=fix)


OTHERWISE = "; or let reward.on_failure (drop_group, mask, value) say what such answers are worth"


FAIL: FailurePolicy = FailurePolicy()  # the first failure ends the run
