"""Generalised advantage estimation (arXiv 1506.02438), for PPO with a critic.

    delta_t  = r_t + gamma V_{t+1} - V_t
    A_t      = delta_t + gamma lam A_{t+1}        equation 16, as a recursion from the last token
    return_t = A_t + V_t                          what the critic learns

Time runs over the tokens that carry loss: across others (a tool's output) ``V_{t+1}`` and ``A_{t+1}`` are carried
unchanged, neither discounted nor decayed, and so they are from one sequence of a trajectory to its next. Behind the
last token both are 0, also where the response was cut at the length limit: as in verl, a response that does not end is
worth what its reward says. The advantages are then whitened over the whole step's loss tokens. verl whitens the same,
but leaves ``-mean / std`` at tokens without loss, and ends every sequence on its own.

Shapes: T tokens, M tokens that carry loss, N trajectories.
"""

from __future__ import annotations

from torch import Tensor

from hybridflow.algorithms.advantage.timeline import Timeline, discounted_sums
from hybridflow.algorithms.whitening import whiten


def gae(
    reward_T: Tensor, value_T: Tensor, mask_T: Tensor, trajectory_T: Tensor, *, gamma: float = 1.0, lam: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Computes whitened advantages and returns, both ``[T]`` and 0 where `mask_T` is False.

    Args:
        reward_T: reward of each token; those of tokens without loss are not read.
        value_T: the critic's value of the state before each token.
        mask_T: which tokens carry loss.
        trajectory_T: which of the N trajectories each token belongs to.
        gamma: discount for each token that carries loss.
        lam: 1 weighs whole returns, 0 one-step differences of the values.
    """
    time = Timeline.of(mask_T, trajectory_T)
    value_M = time.take(value_T)
    delta_M = one_step_differences(time.take(reward_T), value_M, time.length_N, gamma)
    advantage_M = discounted_sums(delta_M, time.length_N, gamma * lam)
    del delta_M
    return time.put(whiten(advantage_M)), time.put(value_M.add_(advantage_M))


def one_step_differences(reward_M: Tensor, value_M: Tensor, length_N: Tensor, gamma: float) -> Tensor:
    """Computes ``delta_t`` ``[M]``: how much better a token turned out than the critic expected, judged by its next
    value.
    """
    delta_M = reward_M - value_M
    delta_M[:-1].add_(value_M[1:], alpha=gamma)
    last_N = length_N.cumsum(0)[length_N > 0] - 1
    delta_M[last_N] = reward_M[last_N] - value_M[last_N]
    return delta_M
