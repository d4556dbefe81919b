"""The optimal token baseline (arXiv 2602.07078), and the same for responses with tool calls.

    e_t = 1 - 2 p(y_t) + sum_v p(v)^2               squared norm of the gradient of log p(y_t) by the logits
    W_t = sum_{k <= t} e_k                          what the trajectory has been through so far
    G_t = sum_{k >= t} r_k
    B_t = sum_i W_it G_it / sum_i W_it              over the trajectories i of the group that have a token at time t
    A_t = G_t - B_t

With the weights of a rollout correction, ``e_t`` is multiplied by their squares. `optimal_token_baseline` counts time
over all tokens from the first with loss on, a tool's output included; `tir_optimal_token_baseline` (tool-integrated
reasoning) over tokens with loss alone, as in `gae`.

Where a single trajectory of a group has a token at a time, its baseline would be its own return: it is 0 there, as in
verl, so ``A_t = G_t`` on the tail of the longest response. verl finds that tail by the number of tokens with loss also
where it counts time over all tokens. Before anything is averaged, the lowest reward of the group is taken off: rewards
at the end that are all equal give exactly 0, and where no trajectory has had a choice yet (W is 0), the baseline is
that lowest reward; in verl it is 0.

Shapes: T tokens, M tokens with loss, N trajectories, G groups, P pairs of a group and a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridflow.algorithms.advantage.groups import Groups
from hybridflow.algorithms.advantage.timeline import Timeline, discounted_sums, running_sums

ROUNDING = 1e-5  # e is (1 - p)^2 at least; what is smaller may be an error in p, of either sign, and counts as 0


def optimal_token_baseline(
    reward_N: Tensor,
    reward_T: Tensor,
    old_logp_T: Tensor,
    sum_pi_squared_T: Tensor,
    group_N: Tensor,
    trajectory_T: Tensor,
    mask_T: Tensor,
    rollout_weight_T: Tensor | None = None,
) -> Tensor:
    """Computes the rewards to come less the baseline of the token's time, ``[T]``, 0 where `mask_T` is False.

    Args:
        reward_N: one reward per trajectory, the sum of its tokens' rewards.
        reward_T: reward of each token; those of tokens without loss are not read.
        old_logp_T: log-probability of each token under the policy at the start of the step.
        sum_pi_squared_T: sum over the vocabulary of its squared probabilities.
        group_N: group of each trajectory (any integers).
        trajectory_T: which of the N trajectories each token belongs to.
        mask_T: which tokens carry loss.
        rollout_weight_T: importance weights of a rollout correction.

    Raises:
        ValueError: a group has one member only.
    """
    time = Timeline.of(mask_T, trajectory_T)
    every = Timeline.of(torch.ones_like(mask_T), trajectory_T)
    place_M = time.take(every.put(every.place()))
    first_N, some_N = place_M.new_zeros(len(time.length_N)), time.length_N > 0
    first_N[some_N] = place_M[time.start()[some_N]]
    place_M -= time.spread(first_N)
    path_M = _path(old_logp_T, sum_pi_squared_T, rollout_weight_T, time)
    return _advantage(reward_N, reward_T, path_M, Groups.of(group_N), time, place_M)


def tir_optimal_token_baseline(
    reward_N: Tensor,
    reward_T: Tensor,
    old_logp_T: Tensor,
    sum_pi_squared_T: Tensor,
    group_N: Tensor,
    trajectory_T: Tensor,
    mask_T: Tensor,
    rollout_weight_T: Tensor | None = None,
) -> Tensor:
    """Computes `optimal_token_baseline` with time counted over tokens with loss alone."""
    time = Timeline.of(mask_T, trajectory_T)
    path_M = _path(old_logp_T, sum_pi_squared_T, rollout_weight_T, time)
    return _advantage(reward_N, reward_T, path_M, Groups.of(group_N), time, time.place())


def _path(logp_T: Tensor, sum_pi_squared_T: Tensor, rollout_weight_T: Tensor | None, time: Timeline) -> Tensor:
    """Computes ``W_t`` ``[M]``."""
    energy_M = time.take(logp_T).exp_().mul_(-2.0).add_(time.take(sum_pi_squared_T)).add_(1.0)
    energy_M = torch.nn.functional.hardshrink(energy_M, ROUNDING)
    if rollout_weight_T is not None:
        energy_M *= time.take(rollout_weight_T).square_()
    return running_sums(energy_M, time.length_N)


def _advantage(
    reward_N: Tensor, reward_T: Tensor, path_M: Tensor, groups: Groups, time: Timeline, place_M: Tensor
) -> Tensor:
    """Computes ``A_t`` ``[T]``, with time `place_M`."""
    lowest_G = groups.lowest(reward_N)
    group_N = groups.index_N[: len(time.length_N)]  # the last trajectories may have no token with loss
    advantage_M = discounted_sums(time.take(reward_T), time.length_N, 1.0).sub_(time.spread(lowest_G[group_N]))
    some_N = time.length_N > 0
    last_N = (time.start() + time.length_N)[some_N] - 1
    span_G = groups.size_G.new_zeros(len(groups.size_G))
    span_G.scatter_reduce_(0, group_N[some_N], place_M[last_N].long() + 1, "amax")
    pair_M = place_M.add_(time.spread((span_G.cumsum(0) - span_G)[group_N].int()))
    weight_P = path_M.new_zeros(int(span_G.sum())).index_add_(0, pair_M, path_M)
    baseline_P = torch.zeros_like(weight_P).index_add_(0, pair_M, path_M.mul_(advantage_M))
    baseline_P = torch.where(weight_P != 0, baseline_P / weight_P, 0.0)
    alone_P = torch.bincount(pair_M, minlength=len(weight_P)) < 2
    baseline_P = torch.where(alone_P, -torch.repeat_interleave(lowest_G, span_G), baseline_P)
    return time.put(advantage_M.sub_(baseline_P.index_select(0, pair_M)))
