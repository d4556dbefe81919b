"""The tokens that carry loss in order of time, and sums along it.

Time runs over the tokens of a trajectory that carry loss, from one of its sequences to the next in the order of the
batch. Other tokens (a prompt, a tool's output) do not exist for it: a sum is carried across them unchanged.

All of it is on the CPU. numpy picks tokens by a mask, and repeats: in a sixth of the time of `torch.masked_select`, and
without an index for each token.

Shapes: T tokens of the batch, M those that carry loss, N trajectories, R runs of tokens of one trajectory, C blocks of
K successive tokens, c blocks that are computed at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

BLOCK = 128
BLOCKS_AT_ONCE = 4096  # as many as the caches of a core hold


@dataclass(frozen=True, slots=True)
class Timeline:
    """The order of time.

    Args:
        mask_T: which tokens carry loss.
        length_N: how many of each trajectory do. On the axis M they stand trajectory after trajectory.
        order_M: which of the tokens with loss stands at each place; None where the batch has this order already.
    """

    mask_T: Tensor
    length_N: Tensor
    order_M: Tensor | None

    @staticmethod
    def of(mask_T: Tensor, trajectory_T: Tensor) -> Timeline:
        """Makes it from the trajectory of each token, 0..N-1."""
        if not len(mask_T):
            return Timeline(mask_T, torch.zeros(0, dtype=torch.int64), None)
        changes_R = (trajectory_T[1:] != trajectory_T[:-1]).numpy().nonzero()[0] + 1
        first_R = np.concatenate([[0], changes_R])  # where a run of tokens of one trajectory begins
        run_R = trajectory_T[torch.from_numpy(first_R)]
        length_R = torch.from_numpy(np.add.reduceat(mask_T.numpy(), first_R, dtype=np.int64))
        length_N = torch.zeros(int(run_R.max()) + 1, dtype=torch.int64).index_add_(0, run_R, length_R)
        if bool((run_R.diff() > 0).all()):
            return Timeline(mask_T, length_N, None)
        sorted_R = run_R.argsort(stable=True)
        start_R, sorted_length_R = length_R.cumsum(0) - length_R, length_R[sorted_R]
        move_R = start_R[sorted_R] - (sorted_length_R.cumsum(0) - sorted_length_R)
        order_M = torch.repeat_interleave(move_R, sorted_length_R)
        return Timeline(mask_T, length_N, order_M.add_(torch.arange(len(order_M))))

    def take(self, value_T: Tensor) -> Tensor:
        """Returns the values of the tokens with loss ``[M]``."""
        value_M = _picked(value_T, self.mask_T)
        return value_M if self.order_M is None else value_M[self.order_M]

    def put(self, value_M: Tensor) -> Tensor:
        """Puts values of tokens with loss back into the batch ``[T]``, 0 for tokens without loss."""
        if self.order_M is not None:
            value_M = torch.empty_like(value_M).index_copy_(0, self.order_M, value_M)
        return value_M.new_zeros(len(self.mask_T)).masked_scatter_(self.mask_T, value_M)

    def spread(self, value_N: Tensor) -> Tensor:
        """Repeats a trajectory's value at each of its tokens with loss ``[M]``."""
        return torch.from_numpy(np.repeat(value_N.numpy(), self.length_N.numpy()))

    def start(self) -> Tensor:
        """Returns where each trajectory begins on the axis M ``[N]``."""
        return self.length_N.cumsum(0) - self.length_N

    def place(self) -> Tensor:
        """Counts the tokens with loss that come before each one in its trajectory ``[M]``, int32."""
        start_M = self.spread(self.start().int())
        return torch.arange(len(start_M), dtype=torch.int32).sub_(start_M)


def discounted_sums(value_M: Tensor, length_N: Tensor, decay: float | Tensor) -> Tensor:
    """Computes ``y_t = x_t + decay y_{t+1}`` within each segment, from 0 behind its end ``[M]``.

    The recursion runs over the K tokens of a block for many blocks at once; what comes from the blocks behind is the
    same recursion over their totals. So the number of steps grows with the logarithm of the length, and nothing is
    padded but the last block of each segment.

    Args:
        value_M: x, segment after segment.
        length_N: length of each segment.
        decay: one for all, or one for each segment ``[N]``.
    """
    blocks_N = (length_N + BLOCK - 1) // BLOCK
    segment_C = torch.repeat_interleave(blocks_N)
    block_C = torch.arange(len(segment_C)) - (blocks_N.cumsum(0) - blocks_N)[segment_C]
    left_C = length_N[segment_C] - BLOCK * block_C
    kept_CK = torch.arange(BLOCK) < left_C[:, None]
    value_CK = value_M.new_zeros(kept_CK.shape).masked_scatter_(kept_CK, value_M)
    decay_N = decay if isinstance(decay, Tensor) else value_M.new_full((len(length_N),), decay)
    decay_C, behind_C = decay_N[segment_C], value_M.new_zeros(len(segment_C))
    if len(block_C) and int(block_C.max()) > 0:
        total_C = _within_blocks(value_CK, decay_C, behind_C, write=False)
        sum_C = discounted_sums(total_C, blocks_N, decay_N**BLOCK)
        behind_C = torch.where(left_C > BLOCK, sum_C.roll(-1), 0.0)
    _within_blocks(value_CK, decay_C, behind_C, write=True)
    return _picked(value_CK, kept_CK)


def _within_blocks(value_CK: Tensor, decay_C: Tensor, behind_C: Tensor, *, write: bool) -> Tensor:
    """Runs the recursion within each block, in place or not, from what is behind it; returns the sum at its first token
    ``[C]``.
    """
    total_C = torch.empty_like(behind_C)
    for start in range(0, len(value_CK), BLOCKS_AT_ONCE):
        part = slice(start, start + BLOCKS_AT_ONCE)
        value_Kc, sum_c = value_CK[part].T.contiguous(), behind_C[part]
        for k in range(BLOCK - 1, -1, -1):
            sum_c = torch.addcmul(value_Kc[k], decay_C[part], sum_c, out=value_Kc[k])
        total_C[part] = sum_c
        if write:
            value_CK[part] = value_Kc.T
    return total_C


def _picked(value: Tensor, mask: Tensor) -> Tensor:
    """Returns the values where `mask` is True, end to end."""
    return torch.from_numpy(value.detach().numpy()[mask.numpy()])


def running_sums(value_M: Tensor, length_N: Tensor) -> Tensor:
    """Computes ``y_t = x_t + y_{t-1}`` within each segment ``[M]``; precise in float32, unlike a sum over all of the
    axis.
    """
    return discounted_sums(value_M.flip(0), length_N.flip(0), 1.0).flip(0)
