"""Training on some responses of a step more than on others: PF-PPO (arXiv 2409.06957).

    pow          responses drawn again with replacement, as many as there are, in proportion to |score|^power
    max_min      of every group its best response and its worst (the paper's BW)
    max_random   of every group its best response and another one at random (the paper's BR)

The paper filters every prompt's responses, which gives the last two; pow is verl's. There max_min and max_random are
draws from the whole batch too: of the responses with its one best score (and its worst, or all others at a quarter of
the weight), so that some prompts are not trained on at all. And all three go by the process's random state.

Shapes: B responses, G groups.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from hybridflow.noise import NoiseKey, uniform


def pf_ppo_rows(
    score_B: Tensor,
    group_B: Tensor,
    sample_B: Tensor,
    *,
    key: NoiseKey,
    method: Literal["pow", "max_min", "max_random"],
    power: float,
) -> Tensor:
    """Returns the indices of the responses to train on (int64), ascending; with "pow" they may repeat.

    Which responses they are is a function of the key, of groups, samples and scores, not of the order of the rows. A
    group with a single response gives it once. Advantages are computed before, from whole groups.

    Args:
        score_B: score of each response.
        group_B: its group (any integers).
        sample_B: which of the group's responses it is (any integers, each once in a group).
        key: of the random picks: seed, and step as the draw.
        method: see the head of this file.
        power: of "pow"; 0 draws every response alike.
    """
    if method == "pow":
        order_B = _sorted_by(group_B, sample_B)
        return order_B[_drawn(score_B[order_B].abs().double() ** power, key)].sort().values
    _, index_B, size_G = torch.unique(group_B, return_inverse=True, return_counts=True)
    first_G = size_G.cumsum(0) - size_G
    order_B = _sorted_by(index_B, -score_B, sample_B)  # of equal scores the lowest sample is best, the highest worst
    best_G = order_B[first_G]
    if method == "max_min":
        other_G = order_B[first_G + size_G - 1]
    else:
        not_best_B = torch.ones_like(index_B).index_fill_(0, best_G, 0)
        drawn_B = _sorted_by(index_B, not_best_B, uniform(key, group_B, sample_B))
        other_G = drawn_B[first_G + (size_G > 1).long()]
    return torch.cat([best_G, other_G]).unique()


def _sorted_by(*keys_B: Tensor) -> Tensor:
    """Returns the order of rows by the first key, where equal by the second, and so on."""
    order_B = torch.arange(len(keys_B[0]))
    for key_B in reversed(keys_B):
        order_B = order_B[torch.argsort(key_B[order_B], stable=True)]
    return order_B


def _drawn(weight_B: Tensor, key: NoiseKey) -> Tensor:
    """Draws as many indices with replacement as there are weights; every index once where all weights are 0."""
    index_B = torch.arange(len(weight_B))
    bound_B = weight_B.cumsum(0)
    if not len(weight_B) or bound_B[-1] == 0:
        return index_B
    drawn_B = torch.searchsorted(bound_B, uniform(key, index_B) * bound_B[-1], right=True)
    return drawn_B.clamp_(max=int(weight_B.nonzero()[-1]))  # a product that rounds up to the sum of all
