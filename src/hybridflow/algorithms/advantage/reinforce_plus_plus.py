"""REINFORCE++: returns, normalised over the whole step instead of over a group (arXiv 2501.03262).

    G_t = r_t + gamma G_{t+1}
    A_t = (G_t - mean) / sqrt(variance + 1e-8)        over all tokens of the step that carry loss

The reward of a token holds the penalty for diverging from the reference (``algorithm.kl_reward_coef``). Time runs as in
`gae`: G is carried across a tool's output and, unlike in verl, from one sequence of a trajectory to its next. Shapes: T
tokens, N trajectories.
"""

from __future__ import annotations

from torch import Tensor

from hybridflow.algorithms.advantage.timeline import Timeline, discounted_sums
from hybridflow.algorithms.whitening import whiten


def reinforce_plus_plus(reward_T: Tensor, mask_T: Tensor, trajectory_T: Tensor, *, gamma: float = 1.0) -> Tensor:
    """Computes whitened returns, ``[T]``, 0 where `mask_T` is False.

    Args:
        reward_T: reward of each token; those of tokens without loss are not read.
        mask_T: which tokens carry loss.
        trajectory_T: which of the N trajectories each token belongs to.
        gamma: discount for each token that carries loss.
    """
    time = Timeline.of(mask_T, trajectory_T)
    return time.put(whiten(discounted_sums(time.take(reward_T), time.length_N, gamma)))
