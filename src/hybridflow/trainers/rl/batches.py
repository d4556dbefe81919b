"""A step's groups as one batch, a row per response.

Shapes: B responses, T tokens of all responses and their prompts, S spans of one weight version, K words that the tokens
were drawn from (of `components_BK`, components of a reward).
"""

from __future__ import annotations

import math
from typing import Any

import torch

from hybridflow.batch import Batch
from hybridflow.protocols.groups import Group, Trajectory
from hybridflow.trainers.rl.filters import component_names


def batch_of(groups: list[Group]) -> Batch:
    """Makes one batch of groups, a row per response.

    Columns: ``input_ids_T``, ``loss_mask_T`` (the response), ``rollout_logp_T``, ``reward_B``, ``group_B`` (the draw),
    ``sample_B``, ``trajectory_B``, ``span_version_S``, ``span_start_S``, ``span_end_S``, and the object column ``row``.
    If the reward has components: ``components_BK``, in the order of `component_names`, NaN for one that a response
    lacks. If it has parts: ``step_reward_T``. If greedy responses were generated: ``baseline_B``. If tokens were drawn
    from a part of the vocabulary: ``support_size_T`` (0 means all of it) and ``support_ids_K``.
    """
    answers = [(g, t) for g in groups for t in g.trajectories]
    ragged: dict[str, list[Any]] = {}
    if any(t.support is not None for _, t in answers):
        sizes = [t.support.sizes if t.support else [0] * len(t.token_ids) for _, t in answers]
        ragged["support_size_T"] = [[0] * len(g.prompt_ids) + size for (g, _), size in zip(answers, sizes)]
        ragged["support_ids_K"] = [t.support.ids if t.support else [] for _, t in answers]
    names = component_names(groups)
    dense: dict[str, list[Any]] = {}
    if names:
        dense["components_BK"] = [[t.components.get(name, math.nan) for name in names] for _, t in answers]
    if any(t.step_rewards for _, t in answers):
        ragged["step_reward_T"] = [[0.0] * len(g.prompt_ids) + _by_token(t) for g, t in answers]
    if any(g.baseline is not None for g in groups):
        dense["baseline_B"] = [g.baseline for g, _ in answers]
    batch = Batch.from_rows(
        {
            **ragged,
            **dense,
            "input_ids_T": [g.prompt_ids + t.token_ids for g, t in answers],
            "loss_mask_T": [[False] * len(g.prompt_ids) + [True] * len(t.token_ids) for g, t in answers],
            "rollout_logp_T": [[0.0] * len(g.prompt_ids) + t.logps for g, t in answers],
            "reward_B": [t.reward for _, t in answers],
            "group_B": [g.draw for g, _ in answers],
            "sample_B": [t.sample for _, t in answers],
            "trajectory_B": list(range(len(answers))),
            "span_version_S": [[s.version for s in t.spans] for _, t in answers],
            "span_start_S": [[s.start for s in t.spans] for _, t in answers],
            "span_end_S": [[s.end for s in t.spans] for _, t in answers],
            "row": [g.row for g, _ in answers],
        }
    )
    if not answers:  # empty lists have no type of their own, and nothing is computed from them
        batch["loss_mask_T"], batch["advantage_T"] = torch.zeros(0, dtype=torch.bool), torch.zeros(0)
    return batch


def _by_token(t: Trajectory) -> list[float]:
    """Returns the rewards of a response's parts, on its tokens; parts may end with the same token."""
    found = [0.0] * len(t.token_ids)
    for position, reward in t.step_rewards:
        found[position] += reward
    return found
