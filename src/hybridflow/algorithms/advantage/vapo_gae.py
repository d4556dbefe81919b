"""GAE with a lambda of its own for the critic and one that grows with the response: VAPO (arXiv 2504.05118).

    A_t      by `gae` with lam = 1 - 1 / (length_alpha l)          l tokens with loss in the trajectory
    return_t by `gae` with lam = lam_critic                        decoupled GAE (arXiv 2503.01491)

With lambda 1 the critic learns whole returns, without a bias from its own start. The policy's lambda keeps the sum of
the weights of one-step differences, about ``1 / (1 - lam)``, in proportion to the length, so that a reward at the end
reaches the beginning of a long response. Where ``length_alpha l`` is below 1, lambda is 0. Advantages are whitened as
in `gae`; verl has neither lambda apart. Shapes: T tokens, M tokens with loss, N
trajectories.
"""

from __future__ import annotations

from torch import Tensor

from hybridflow.algorithms.advantage.gae import one_step_differences
from hybridflow.algorithms.advantage.timeline import Timeline, discounted_sums
from hybridflow.algorithms.whitening import whiten


def vapo_gae(
    reward_T: Tensor,
    value_T: Tensor,
    mask_T: Tensor,
    trajectory_T: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 1.0,
    lam_critic: float = 1.0,
    length_alpha: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes whitened advantages and returns, both ``[T]`` and 0 where `mask_T` is False.

    Args:
        reward_T: reward of each token; those of tokens without loss are not read.
        value_T: the critic's value of the state before each token.
        mask_T: which tokens carry loss.
        trajectory_T: which of the N trajectories each token belongs to.
        gamma: discount for each token that carries loss.
        lam: lambda of the advantages where `length_alpha` is None.
        lam_critic: lambda of the returns that the critic learns.
        length_alpha: lambda becomes ``1 - 1 / (length_alpha * length)``.
    """
    time = Timeline.of(mask_T, trajectory_T)
    value_M = time.take(value_T)
    delta_M = one_step_differences(time.take(reward_T), value_M, time.length_N, gamma)
    decay: float | Tensor = gamma * lam
    if length_alpha is not None:
        decay = gamma * (1 - 1 / (length_alpha * time.length_N.to(value_M.dtype))).clamp(min=0)
    advantage_T = time.put(whiten(discounted_sums(delta_M, time.length_N, decay)))
    return advantage_T, time.put(value_M.add_(discounted_sums(delta_M, time.length_N, gamma * lam_critic)))
