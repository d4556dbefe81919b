"""The treatment of responses that the reward failed on (``reward.on_failure``), and of trajectories that failed before
they had one (``agent.on_failure``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from hybridflow.errors import UserError
from hybridflow.protocols.groups import Group, Trajectory
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


def failed_trajectory(t: Trajectory, where: str) -> UserError:
    """Returns the error that ends a run at a trajectory that failed.

    Args:
        t: the trajectory.
        where: which row of which data.
    """
    return UserError(
        f"{where}: a trajectory failed: {t.failure}",
        why="the environment, or what it needs, is at fault, not the model",
        fix="mend it; agent.on_failure=mask trains on the others",
    )


def require_most(groups: Sequence[Group], count: int, of: str = "a step") -> None:
    """Refuses a step or an evaluation in which most trajectories failed: it would learn from what is left, or measure
    that.

    Args:
        groups: all of it.
        count: how many trajectories it has, those of groups that were dropped too.
        of: what they are of, for the message.

    Raises:
        UserError: names the most frequent cause.
    """
    failed = Counter(reason for g in groups for reason in g.failed)
    if 2 * failed.total() > count:
        reason, count = failed.most_common(1)[0]
        raise UserError(
            f"{failed.total()} trajectories of {of} failed, {count} of them with: {reason}",
            why="those are most of them, so the environment, or what it needs, is broken",
            fix="mend it, and resume; hybridflow check plays an episode",
        )


def require_one_beginning(trajectories: Iterable[Trajectory], where: str) -> None:
    """Refuses a group whose trajectories begin with different prompts.

    Args:
        trajectories: of one draw.
        where: which row of which data.

    Raises:
        UserError: the environment does not begin as its seed says.
    """
    prompts = {tuple(t.sequences[0].prompt_ids) for t in trajectories if t.sequences}
    if len(prompts) > 1:
        raise UserError(
            f"{where}: the environment began {len(prompts)} different episodes for the samples of one prompt",
            why="they are compared with each other, so all begin alike: reset(row, seed) gets the same seed for each",
            fix="make every random choice of reset from its seed",
        )
