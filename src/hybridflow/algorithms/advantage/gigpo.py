"""Groups of trajectories and, within them, of steps from one state: GiGPO (arXiv 2505.10978).

    A^E_i = (R_i - mean) / (std + 1e-6)                     over the trajectories of a group, R the whole reward
    R_is  = sum_{u >= s} gamma^(u - s) r_iu                 what follows step s of trajectory i
    A^S   = (R_is - mean) / (std + 1e-6)                    over the group's steps that began in the same state
    A     = A^E_i + step_weight A^S_is

or without the divisions. A step that no other trajectory took from its state has ``A^S = 0``. Where the environment has
no steps, a trajectory is one step from the prompt, so that A is ``(1 + step_weight)`` times GRPO's. The standard
deviation is the unbiased one. Not in verl 0.9.1. Shapes: T tokens, M tokens with loss, N trajectories, G groups, S
steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridflow.algorithms.advantage.groups import Groups
from hybridflow.algorithms.advantage.timeline import Timeline, discounted_sums


def gigpo(
    reward_N: Tensor,
    reward_T: Tensor,
    group_N: Tensor,
    trajectory_T: Tensor,
    mask_T: Tensor,
    step_T: Tensor | None = None,
    anchor_T: Tensor | None = None,
    *,
    normalize_by_std: bool = True,
    gamma: float = 1.0,
    step_weight: float = 1.0,
) -> Tensor:
    """Computes advantages, the same for all tokens of a step, ``[T]``, 0 where `mask_T` is False.

    Args:
        reward_N: one reward per trajectory, the sum of its tokens' rewards.
        reward_T: reward of each token; those of tokens without loss are not read.
        group_N: group of each trajectory (any integers).
        trajectory_T: which of the N trajectories each token belongs to.
        mask_T: which tokens carry loss.
        step_T: step of each token: a number that changes from one step of a trajectory to its next.
        anchor_T: state that the token's step began in: an integer, equal for equal states.
        normalize_by_std: whether to divide by standard deviations.
        gamma: discount for each step.
        step_weight: weight of the advantages within steps from one state.

    Raises:
        ValueError: a group has one member only, or one of `step_T` and `anchor_T` is missing.
    """
    episode_N = Groups.of(group_N).normalized(reward_N, normalize_by_std)
    if (step_T is None) != (anchor_T is None):
        raise ValueError("gigpo needs both the step of each token and the state that it began in, or none of them")
    if step_T is None or anchor_T is None:
        return (episode_N * (1 + step_weight))[trajectory_T].masked_fill_(~mask_T, 0.0)
    time = Timeline.of(mask_T, trajectory_T)
    begins_M = torch.ones(int(time.length_N.sum()), dtype=torch.bool)
    begins_M[1:] = time.take(step_T).diff() != 0
    begins_M[time.start()[time.length_N > 0]] = True
    first_S = begins_M.nonzero()[:, 0]
    length_S = torch.cat([first_S, first_S.new_full((1,), len(begins_M))]).diff()
    trajectory_S, anchor_S = time.take(trajectory_T)[first_S], time.take(anchor_T)[first_S]
    reward_S = torch.segment_reduce(time.take(reward_T), "sum", lengths=length_S, unsafe=True)
    return_S = discounted_sums(reward_S, torch.bincount(trajectory_S, minlength=len(group_N)), gamma)
    pair_S2 = torch.stack([group_N[trajectory_S], anchor_S], -1)
    _, state_S, size_G = torch.unique(pair_S2, dim=0, return_inverse=True, return_counts=True)
    step_S = Groups(state_S, size_G).normalized(return_S, normalize_by_std)
    return time.put(torch.repeat_interleave(episode_N[trajectory_S] + step_weight * step_S, length_S))
