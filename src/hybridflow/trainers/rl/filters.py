"""Which groups and responses of a step are trained on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from hybridflow.algorithms.filtering import drop_reason
from hybridflow.config.kinds.rl import RlConfig
from hybridflow.config.pieces.needs import needs_of
from hybridflow.config.pieces.tables import ADVANTAGES
from hybridflow.config.sections.algorithm import FilterSection
from hybridflow.errors import UserError
from hybridflow.protocols.groups import Group, Trajectory

NOT_SCORED = "reward failed"
FAILED = "trajectory failed"


def passing(groups: Sequence[Group], section: FilterSection, dropped: Counter[str]) -> list[Group]:
    """Returns the groups that pass the filter; counts in `dropped` why the others do not."""
    kept: list[Group] = []
    for group in groups:
        scored = [t for t in group.trajectories if t.failure is None]
        if section.metric == "reward":
            values = [t.reward for t in scored]
        else:  # of the responses that have it
            values = [t.components[section.metric] for t in scored if section.metric in t.components]
        reason: str | None = f"no {section.metric}" if scored else FAILED if group.failed else NOT_SCORED
        if values:
            reason = drop_reason(
                values, equal_rewards=section.equal_rewards, min_mean=section.min_mean, max_mean=section.max_mean
            )
        if reason is None:
            kept.append(group)
        else:
            dropped[reason] += 1
    return kept


def nothing_passed(section: FilterSection, dropped: Counter[str], groups: Sequence[Group]) -> UserError:
    """Returns the error for a step in which no group passes the filter.

    Args:
        section: the ``filter`` section.
        dropped: what `passing` counted.
        groups: all that were generated.
    """
    counts = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
    if set(dropped) == {FAILED}:
        cause = next(reason for group in groups for reason in group.failed)
        return UserError(
            f"a trajectory failed in all {dropped.total()} groups of a step: {cause}",
            why="agent.on_failure=drop_group leaves nothing to learn from",
            fix="mend the environment; or agent.on_failure=mask trains on the others",
        )
    if set(dropped) == {NOT_SCORED}:
        return UserError(
            f"the reward failed on the responses of all {dropped.total()} groups of a step",
            why="reward.on_failure leaves nothing to learn from",
            fix="check the reward: reward.on_failure=fail reports the first response that it fails on",
        )
    return UserError(
        f"no group of {dropped.total()} passed the filter: {counts}",
        why=f"filter.max_rounds={section.max_rounds} rounds of prompts gave nothing to learn from",
        fix="look at critic/score/mean: the data may be too hard or solved; change the data, the filter, or "
        "rollout.temperature, and resume from the last checkpoint",
    )


def failure_counts(groups: Sequence[Group], on_failure: str) -> dict[str, float]:
    """Counts the responses of a step on which the reward failed, by the failure, and by what became of them."""
    found = {"reward/failures": 0.0}
    for group in groups:
        for kind, count in group.failures.items():
            found["reward/failures"] += count
            found[f"reward/failures/{kind}"] = found.get(f"reward/failures/{kind}", 0.0) + count
    if on_failure in ("drop_group", "mask"):
        found["reward/dropped_groups"] = float(sum(not g.trajectories for g in groups))
    if on_failure == "mask":
        found["reward/masked_answers"] = float(sum(t.failure is not None for g in groups for t in g.trajectories))
    return found


def trainable(groups: Sequence[Group], config: RlConfig) -> tuple[list[Group], dict[str, float]]:
    """Returns the groups without the responses that carry no loss: those that the reward failed on, those that ended
    before their first turn, and, where ``filter.overlong`` asks for it, those that were cut at the limit.

    A group that is left with a single response has nothing to be compared with: where the advantage needs groups, it is
    dropped, and counted.
    """
    overlong = config.filter.overlong

    def given(t: Trajectory) -> bool:
        return t.failure is None and bool(t.sequences)

    if not overlong and all(given(t) for g in groups for t in g.trajectories):
        return list(groups), {}
    scored = [replace(g, trajectories=[t for t in g.trajectories if given(t)]) for g in groups]

    def lost(t: Trajectory) -> bool:
        return overlong and t.finish_reason == "length"

    whole = [replace(g, trajectories=[t for t in g.trajectories if not lost(t)]) for g in scored]
    least = 2 if needs_of(config.algorithm.advantage, ADVANTAGES).needs_group else 1
    kept = [g for g in whole if len(g.trajectories) >= least]
    counts = {
        "training/single_answer_groups": sum(len(g.trajectories) == 1 for g in whole) if least == 2 else 0,
    }
    if overlong:
        counts["training/overlong_answers"] = sum(lost(t) for g in scored for t in g.trajectories)
    return kept, {name: float(count) for name, count in counts.items()}


def component_names(groups: Sequence[Group]) -> list[str]:
    """Returns the names of the rewards' components, in order: all that some response has."""
    return sorted({name for g in groups for t in g.trajectories for name in t.components})
