"""REINFORCE against a greedy response: ReMax (arXiv 2310.10505).

    A_t = sum_{k >= t} gamma^(k - t) r_k - b        b the reward of the greedy response to the same prompt

Time runs as in `gae`. As in verl, which does not discount. Shapes: T tokens, M tokens with loss, N trajectories.
"""

from __future__ import annotations

from torch import Tensor

from hybridflow.algorithms.advantage.timeline import Timeline, discounted_sums


def remax(reward_T: Tensor, baseline_N: Tensor, mask_T: Tensor, trajectory_T: Tensor, *, gamma: float = 1.0) -> Tensor:
    """Computes the rewards to come less the baseline, ``[T]``, 0 where `mask_T` is False.

    Args:
        reward_T: reward of each token; those of tokens without loss are not read.
        baseline_N: reward of the greedy response to each trajectory's prompt.
        mask_T: which tokens carry loss.
        trajectory_T: which of the N trajectories each token belongs to.
        gamma: discount for each token that carries loss.
    """
    time = Timeline.of(mask_T, trajectory_T)
    return_M = discounted_sums(time.take(reward_T), time.length_N, gamma)
    return time.put(return_M.sub_(time.spread(baseline_N[: len(time.length_N)])))
