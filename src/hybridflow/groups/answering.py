"""What generates responses to prompts and scores them: the same for training and for evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from hybridflow.groups.failures import FAIL, FailurePolicy
from hybridflow.protocols.episodes import Rollouts
from hybridflow.protocols.generation import RolloutEngine
from hybridflow.protocols.rewards import Grader
from hybridflow.protocols.waiting import never


@dataclass(frozen=True, slots=True)
class Answering:
    """The engine that generates, the grader that scores, and when both end.

    Args:
        engine: where responses come from.
        rollouts: makes trajectories of what it generates.
        grader: scores the trajectories of finished groups, while others are generated.
        decode: token ids to text.
        policy: what happens where the reward fails.
        on_failed: what happens to a trajectory that failed before it had a reward: see ``agent.on_failure``.
        should_stop: asked all the time; True ends with `Stopped`.
    """

    engine: RolloutEngine
    rollouts: Rollouts
    grader: Grader
    decode: Callable[[list[int]], str]
    policy: FailurePolicy = FAIL
    on_failed: Literal["mask", "fail", "drop_group"] = "fail"
    should_stop: Callable[[], bool] = never
