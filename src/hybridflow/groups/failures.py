"""The treatment of responses that the reward failed on: ``reward.on_failure``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from hybridflow.errors import UserError
from hybridflow.protocols.rewards import Failure


@dataclass(frozen=True, slots=True)
class FailurePolicy:
    """What happens to responses that the reward failed on; see ``reward.on_failure``.

    Args:
        on_failure: what happens.
        value: the reward for "value".
        advice: what the user may change, by `Failure.kind`.
    """

    on_failure: Literal["fail", "drop_group", "mask", "value"] = "fail"
    value: float = 0.0
    advice: dict[str, str] = field(default_factory=dict)

    def refuse(self, failure: Failure, where: str) -> UserError:
        """Returns the error that ends a run at its first failure.

        Args:
            failure: the first one.
            where: which row of which data.
        """
        mendable = self.on_failure == "fail" and failure.kind != "columns"  # else it is set, or of no use
        otherwise = OTHERWISE if mendable else ""
        fix = self.advice.get(failure.kind, "look at the reward") + otherwise
        why = f"it was scoring {failure.scoring}" if failure.scoring else ""
        return UserError(f"{where}: {failure.what}", why=why, fix=fix)


OTHERWISE = "; or let reward.on_failure (drop_group, mask, value) decide the reward of such responses"


FAIL: FailurePolicy = FailurePolicy()  # the first failure ends the run
