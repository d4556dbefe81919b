"""PRIME's implicit process reward (arXiv 2502.01456): a language model phi, trained on outcomes, rewards every token.

    r_t  = beta (log phi(y_t) - log ref(y_t))                             the reward of a token
    r(y) = sum of r_t                                                     the reward of a response
    loss = -o log sigma(r(y)) - (1 - o) log(1 - sigma(r(y)))              o: the outcome, 1 for a right response
    A_t  = sum_{s >= t} gamma^(s - t) (r_s - mean of m' over the others)  +  o - mean of o' over the others

m is the mean of r_t over a response's tokens; the others are the rest of the group. Time runs over the tokens of a
trajectory that carry loss. verl's recipe also scales r_s by n / (n - 1) in a group of n and whitens the advantages; the
paper does neither.

Shapes: T tokens of a batch, M scored tokens of a micro-batch, S sequences, N trajectories.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from hybridflow.algorithms.advantage.rloo import rloo
from hybridflow.algorithms.advantage.timeline import Timeline, discounted_sums
from hybridflow.algorithms.segments import segment_count, segment_mean, segment_sum


def process_rewards(logp_T: Tensor, ref_logp_T: Tensor, *, beta: float = 0.05) -> Tensor:
    """Computes the reward of each token ``[T]``.

    Args:
        logp_T: log-probabilities under the reward model.
        ref_logp_T: log-probabilities under its reference.
        beta: scale of the reward.
    """
    return beta * (logp_T - ref_logp_T)


def outcome_loss(
    logp_M: Tensor, ref_logp_M: Tensor, outcome_M: Tensor, sequence_M: Tensor, *, beta: float = 0.05
) -> tuple[Tensor, dict[str, Tensor]]:
    """Computes the reward model's loss of each sequence, given to each of its tokens ``[M]``, and per-token
    diagnostics.

    Args:
        logp_M: log-probabilities under the reward model (with gradient).
        ref_logp_M: log-probabilities under its reference.
        outcome_M: outcome of each token's sequence, from 0 to 1.
        sequence_M: sequence of each token; a sequence is a whole response.
        beta: scale of the reward.
    """
    reward_S = segment_sum(process_rewards(logp_M, ref_logp_M, beta=beta), sequence_M, segment_count(sequence_M))
    reward_M = reward_S[sequence_M]
    loss_M = -outcome_M * logsigmoid(reward_M) - (1 - outcome_M) * logsigmoid(-reward_M)
    right = ((reward_M > 0) == (outcome_M > 0.5)).to(logp_M.dtype)
    return loss_M, {"prm_accuracy": right, "prm_reward": reward_M.detach()}


def prime(
    process_reward_T: Tensor,
    reward_N: Tensor,
    group_N: Tensor,
    trajectory_T: Tensor,
    mask_T: Tensor,
    *,
    gamma: float = 1.0,
) -> Tensor:
    """Computes the advantage of each token ``[T]``, 0 where `mask_T` is False.

    Args:
        process_reward_T: see `process_rewards`; those of tokens without loss are not read.
        reward_N: outcome of each trajectory.
        group_N: group of each trajectory (any integers).
        trajectory_T: trajectory of each token.
        mask_T: which tokens carry loss.
        gamma: discount for each token that carries loss.

    Raises:
        ValueError: a group has one member only: there is nothing to compare it with.
    """
    time = Timeline.of(mask_T, trajectory_T)
    mean_N = segment_mean(process_reward_T[mask_T], trajectory_T[mask_T], len(reward_N))
    others_N = mean_N - rloo(mean_N, group_N)
    return_M = discounted_sums(time.take(process_reward_T - others_N[trajectory_T]), time.length_N, gamma)
    return time.put(return_M) + rloo(reward_N, group_N)[trajectory_T] * mask_T
