"""A step's groups as one batch, a row per sequence.

Shapes: B sequences, T tokens of all sequences and their prompts, N trajectories, S spans of one weight version, K words
that the tokens were drawn from (of `components_BK`, components of a reward).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from hybridflow.batch import Batch
from hybridflow.protocols.groups import Group, TokenSequence, Trajectory
from hybridflow.trainers.rl.filters import component_names


def batch_of(groups: list[Group]) -> Batch:
    """Makes one batch of groups, a row per sequence of each trajectory.

    Columns: ``input_ids_T``, ``loss_mask_T`` (what the model sampled), ``rollout_logp_T``, ``reward_B`` (the
    trajectory's), ``group_B`` (the draw), ``sample_B``, ``trajectory_B``, ``sequence_B`` (which of its trajectory),
    ``span_version_S``, ``span_start_S``, ``span_end_S``, and the object column ``row``. If the reward has components:
    ``components_BK``, in the order of `component_names`, NaN for one that a trajectory lacks. If it has parts:
    ``step_reward_T``. If states are known: ``step_T``, the number of each token's turn in its trajectory, and
    ``anchor_T``. If greedy responses were generated: ``baseline_B``. If tokens were drawn from a part of the
    vocabulary: ``support_size_T`` (0 means all of it) and ``support_ids_K``.
    """
    trajectories = [(g, t) for g in groups for t in g.trajectories]
    rows = [(g, t, number, s) for number, (g, t) in enumerate(trajectories) for s in t.sequences]
    ragged: dict[str, list[Any]] = {}

    def behind_prompts(values: Iterable[list[Any]], fill: Any) -> list[list[Any]]:
        return [[fill] * len(s.prompt_ids) + of_tokens for (_, _, _, s), of_tokens in zip(rows, values)]

    if any(s.support is not None for *_, s in rows):
        sizes = [s.support.sizes if s.support else [0] * len(s.token_ids) for *_, s in rows]
        ragged["support_size_T"] = behind_prompts(sizes, 0)
        ragged["support_ids_K"] = [s.support.ids if s.support else [] for *_, s in rows]
    names = component_names(groups)
    dense: dict[str, list[Any]] = {}
    if names:
        dense["components_BK"] = [[t.components.get(name, math.nan) for name in names] for _, t, *_ in rows]
    if any(s.step_rewards for *_, s in rows):
        ragged["step_reward_T"] = behind_prompts((_by_token(s) for *_, s in rows), 0.0)
    if any(turn.anchor is not None for *_, s in rows for turn in s.turns):
        steps, anchors = _states([t for _, t in trajectories])
        ragged["step_T"], ragged["anchor_T"] = behind_prompts(steps, 0), behind_prompts(anchors, 0)
    if any(g.baseline is not None for g in groups):
        dense["baseline_B"] = [g.baseline for g, *_ in rows]
    batch = Batch.from_rows(
        {
            **ragged,
            **dense,
            "input_ids_T": [s.prompt_ids + s.token_ids for *_, s in rows],
            "loss_mask_T": behind_prompts((s.sampled() for *_, s in rows), False),
            "rollout_logp_T": behind_prompts((s.logps for *_, s in rows), 0.0),
            "reward_B": [t.reward for _, t, *_ in rows],
            "group_B": [g.draw for g, *_ in rows],
            "sample_B": [t.sample for _, t, *_ in rows],
            "trajectory_B": [number for _, _, number, _ in rows],
            "sequence_B": [i for _, t in trajectories for i in range(len(t.sequences))],
            "span_version_S": [[span.version for span in s.spans] for *_, s in rows],
            "span_start_S": [[span.start for span in s.spans] for *_, s in rows],
            "span_end_S": [[span.end for span in s.spans] for *_, s in rows],
            "row": [g.row for g, *_ in rows],
        }
    )
    if not rows:  # empty lists have no type of their own, and nothing is computed from them
        batch["loss_mask_T"], batch["advantage_T"] = torch.zeros(0, dtype=torch.bool), torch.zeros(0)
    return batch


def trajectories(batch: Batch) -> tuple[Tensor, Tensor]:
    """Returns which trajectory each sequence of a batch belongs to ``[B]``, 0 to N - 1 in the order of
    ``trajectory_B``, and the first sequence of each ``[N]``.
    """
    numbers, index_B = torch.unique(batch["trajectory_B"], return_inverse=True)
    first_N = torch.full((len(numbers),), len(batch)).scatter_reduce(0, index_B, torch.arange(len(batch)), "amin")
    return index_B, first_N


def minibatches(batch: Batch, size: int) -> list[Batch]:
    """Cuts a batch into mini-batches of `size` trajectories each, in order, with all of their sequences; the last one
    is smaller where they do not divide.
    """
    index_B, first_N = trajectories(batch)
    parts = [(index_B // size == part).nonzero()[:, 0] for part in range(-(-len(first_N) // size))]
    return [batch.take(rows) for rows in parts]


def _by_token(s: TokenSequence) -> list[float]:
    """Returns the rewards of a trajectory's parts, on the tokens of one sequence; parts may end with the same token."""
    found = [0.0] * len(s.token_ids)
    for position, reward in s.step_rewards:
        found[position] += reward
    return found


def _states(trajectories: list[Trajectory]) -> tuple[list[list[int]], list[list[int]]]:
    """Returns for each token of each sequence the number of its turn, and the state in which that began; 0 where the
    model did not sample it.

    Where a state is unknown, the turn gets one that no other has; a first turn gets 0, since all trajectories of a
    group begin alike.
    """
    steps, anchors = [], []
    unknown = 0
    for t in trajectories:
        number = 0
        for s in t.sequences:
            steps.append([0] * len(s.token_ids))
            anchors.append([0] * len(s.token_ids))
            for turn in s.turns:
                count = turn.end - turn.start
                unknown -= turn.anchor is None
                anchor = turn.anchor if turn.anchor is not None else unknown if number else 0
                steps[-1][turn.start : turn.end] = [number] * count
                anchors[-1][turn.start : turn.end] = [anchor] * count
                number += 1
    return steps, anchors
