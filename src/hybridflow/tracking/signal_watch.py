"""Watches whether rewards differ between responses: a run in which they never do ends as done and has learned nothing.

A step teaches if a response has another reward than those it is compared with: the responses to the same prompt if the
advantage compares these, else all responses of the step (`teaches`). The advice comes after `ALIKE` steps in a row that
do not teach, if all of their responses had the same reward, and after `GROUPS_ALIKE` if that holds within prompts only.
It comes once, and again only if the run has learned in between.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hybridflow.config.pieces.needs import needs_of
from hybridflow.config.pieces.tables import ADVANTAGES
from hybridflow.protocols.groups import Group, Trajectory

ALIKE, GROUPS_ALIKE = 3, 5  # steps
TEACHES = "training/reward_teaches"  # 1 or 0
LEAST, MOST, CUT = "critic/score/min", "critic/score/max", "response_length/clip_ratio"


def teaches(groups: Sequence[Group], advantage: str, clip: tuple[float, float] | None = None) -> bool | None:
    """Returns whether a response of a step has another reward than those it is compared with; None where rewards are
    not read.

    Bounds on the reward (``reward.clip``) count. Penalties on length or divergence do not: a run on these alone learns
    nothing from its reward.

    Args:
        groups: of the step.
        advantage: the estimator.
        clip: the bounds.
    """
    needs = needs_of(advantage, ADVANTAGES)
    low, high = clip or (float("-inf"), float("inf"))

    def worth(group: Group, t: Trajectory) -> tuple[object, ...]:
        value = min(max(t.reward, low), high)
        if needs.needs_greedy and group.baseline is not None:
            value -= min(max(group.baseline, low), high)
        steps = tuple((i, *step) for i, s in enumerate(t.sequences) for step in s.step_rewards)
        return value, steps, tuple(sorted(t.components.items())) if needs.needs_components else ()

    if advantage == "distillation":
        return None
    scored = [[worth(g, t) for t in g.trajectories if t.failure is None] for g in groups]
    compared = scored if needs.needs_group else [[value for group in scored for value in group]]
    if not any(compared):  # the reward failed on all: other code reports that
        return None
    return any(len(set(values)) > 1 for values in compared)


class SignalWatch:
    """Takes the metrics of every step. Its state follows from them alone, as that of `watch.MismatchWatch`."""

    def __init__(self) -> None:
        self.streak: list[tuple[float, float]] = []  # least and highest reward of each step since one has taught
        self.told: str | None = None  # the advice on this streak
        self.learned = False  # in some step

    def observe(self, metrics: Mapping[str, float]) -> str | None:
        """Returns advice after the step with these metrics, if there is any."""
        if TEACHES not in metrics or LEAST not in metrics:
            return None
        if metrics[TEACHES]:
            self.streak, self.told, self.learned = [], None, True
            return None
        self.streak.append((metrics[LEAST], metrics[MOST]))
        ends = {end for step in self.streak for end in step}
        if self.told or len(self.streak) < (ALIKE if len(ends) == 1 else GROUPS_ALIKE):
            return None
        self.told = _sentence(len(self.streak), ends, metrics.get(CUT, 0.0))
        return self.told

    def summary(self) -> str | None:
        """Returns advice at the end of a run, if there is any; also for a run that was too short for earlier advice."""
        if self.told or self.learned or not self.streak:
            return self.told
        return _sentence(len(self.streak), {end for step in self.streak for end in step}, 0.0)


def _sentence(steps: int, ends: set[float], cut: float) -> str:
    last, each = ("the only step", "") if steps == 1 else (f"the last {steps} steps", "in each of them, ")
    if len(ends) > 1:
        return (
            f"nothing was learned in {last}: {each}all responses to a prompt had the same "
            "reward. Use rows that the model solves sometimes, or raise train.samples_per_prompt or "
            "rollout.temperature"
        )
    (worth,) = ends
    said = f"nothing was learned in {last}: every response had reward {worth:g}. "
    if worth > 0:
        said += (
            "If that is the highest reward, these rows are solved: use harder ones, or stop here; else check the reward"
        )
    else:
        said += (
            "Compare a few responses (hybridflow report RUN, or rollouts/) with what the reward expects, and score a "
            "right response by hand (hybridflow audit-reward); if the reward is right, use easier rows, or begin with "
            "supervised fine-tuning (hybridflow sft)"
        )
    if cut == 1:
        said += "; every response was cut at rollout.max_response_tokens"
    return said
