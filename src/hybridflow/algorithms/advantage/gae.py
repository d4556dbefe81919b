"""Generalised advantage estimation (arXiv 1506.02438), for PPO with a critic.

    delta_t  = r_t + gamma V_{t+1} - V_t
    A_t      = delta_t + gamma lam A_{t+1}        equation 16, as a recursion from the last token
    return_t = A_t + V_t                          what the critic learns

Time runs over the tokens that carry loss: across others (a tool's output) ``V_{t+1}`` and ``A_{t+1}`` are carried
unchanged, neither discounted nor decayed. Behind the last token both are 0, also where the answer was cut at the length
limit: as in verl, an answer that does not end is worth what its reward says. The advantages are then whitened over the
whole step's loss tokens.

Shapes: T tokens, B sequences, M tokens that carry loss, L most of them in one sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridflow.algorithms.whitening import whiten


def gae(
    reward_T: Tensor, value_T: Tensor, mask_T: Tensor, offsets: Tensor, *, gamma: float = 1.0, lam: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Whitened advantages and returns, both ``[T]`` and 0 where `mask_T` is False.

    Args:
        reward_T: reward of each token; those of tokens without loss are not read.
        value_T: the critic's value of the state before each token.
        mask_T: which tokens carry loss.
        offsets: ``[B + 1]``, where each sequence begins and ends.
        gamma: discount for each token that carries loss.
        lam: 1 weighs whole returns, 0 one-step differences of the values.
    """
    advantage_T = raw_gae(reward_T, value_T, mask_T, offsets, gamma=gamma, lam=lam)
    return whiten(advantage_T, mask_T), (advantage_T + value_T) * mask_T


def raw_gae(reward_T: Tensor, value_T: Tensor, mask_T: Tensor, offsets: Tensor, *, gamma: float, lam: float) -> Tensor:
    """The advantages ``[T]`` before they are whitened; see `gae`."""
    index_M = mask_T.nonzero()[:, 0]
    sequence_T = torch.repeat_interleave(torch.arange(len(offsets) - 1), offsets.diff())
    sequence_M = sequence_T[index_M]
    count_B = torch.bincount(sequence_M, minlength=len(offsets) - 1)
    place_M = torch.arange(len(index_M)) - (count_B.cumsum(0) - count_B)[sequence_M]
    value_M = value_T[index_M]
    last_M = place_M + 1 == count_B[sequence_M]
    next_M = torch.where(last_M, 0, value_M.roll(-1))
    delta_M = reward_T[index_M] + gamma * next_M - value_M
    # Side by side, so that one step of the recursion serves all sequences; zeros behind a sequence's end stay zeros.
    delta_BL = delta_M.new_zeros(len(count_B), int(count_B.max()) if len(count_B) else 0)
    delta_BL[sequence_M, place_M] = delta_M
    for t in range(delta_BL.shape[1] - 2, -1, -1):
        delta_BL[:, t] += gamma * lam * delta_BL[:, t + 1]
    advantage_T = delta_M.new_zeros(len(mask_T))
    advantage_T[index_M] = delta_BL[sequence_M, place_M]
    return advantage_T
