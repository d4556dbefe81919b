"""The tokens that carry loss in order of time, and sums along it.

Time runs over the tokens of a trajectory that carry loss, from one of its sequences to the next in the order of the
batch. Other tokens (a prompt, a tool's output) do not exist for it: a sum is carried across them unchanged.

Shapes: T tokens of the batch, M those that carry loss, N trajectories, C blocks of K successive tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 128


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
        """From the trajectory of each token, 0..N-1."""
        begins_T = torch.ones_like(mask_T)  # where a run of tokens of one trajectory begins
        torch.ne(trajectory_T[1:], trajectory_T[:-1], out=begins_T[1:])
        first_R = begins_T.nonzero()[:, 0]
        run_R = trajectory_T[first_R]
        passed_T = mask_T.cumsum(0, dtype=torch.int32)
        passed_R = torch.cat([passed_T[first_R[1:] - 1], passed_T[-1:]]).long()
        length_R = passed_R.diff(prepend=passed_R.new_zeros(1)) if len(passed_R) else passed_R
        count = int(run_R.max()) + 1 if len(run_R) else 0
        length_N = length_R.new_zeros(count).index_add_(0, run_R, length_R)
        if bool((run_R.diff() > 0).all()):
            return Timeline(mask_T, length_N, None)
        sorted_R = run_R.argsort(stable=True)
        start_R, sorted_length_R = length_R.cumsum(0) - length_R, length_R[sorted_R]
        move_R = start_R[sorted_R] - (sorted_length_R.cumsum(0) - sorted_length_R)
        order_M = torch.repeat_interleave(move_R, sorted_length_R)
        return Timeline(mask_T, length_N, order_M.add_(torch.arange(len(order_M), device=order_M.device)))

    def take(self, value_T: Tensor) -> Tensor:
        """The tokens with loss ``[M]``."""
        value_M = torch.masked_select(value_T, self.mask_T)
        return value_M if self.order_M is None else value_M[self.order_M]

    def put(self, value_M: Tensor) -> Tensor:
        """Back to the batch ``[T]``, 0 for tokens without loss."""
        if self.order_M is not None:
            value_M = torch.empty_like(value_M).index_copy_(0, self.order_M, value_M)
        return value_M.new_zeros(len(self.mask_T)).masked_scatter_(self.mask_T, value_M)

    def spread(self, value_N: Tensor) -> Tensor:
        """A trajectory's value at each of its tokens with loss ``[M]``."""
        return torch.repeat_interleave(value_N, self.length_N.int())

    def start(self) -> Tensor:
        """Where each trajectory begins on the axis M ``[N]``."""
        return self.length_N.cumsum(0) - self.length_N

    def place(self) -> Tensor:
        """How many tokens with loss came before each in its trajectory ``[M]``, int32."""
        start_M = self.spread(self.start().int())
        return torch.arange(len(start_M), dtype=torch.int32, device=start_M.device).sub_(start_M)


def discounted_sums(value_M: Tensor, length_N: Tensor, decay: float | Tensor) -> Tensor:
    """``y_t = x_t + decay y_{t+1}`` within each segment, from 0 behind its end ``[M]``.

    The recursion runs over the K tokens of a block for all blocks at once; what comes from the blocks behind is the same
    recursion over their totals. So the number of steps grows with the logarithm of the length, and nothing is padded
    but the last block of each segment.

    Args:
        value_M: x, segment after segment.
        length_N: length of each segment.
        decay: one for all, or one for each segment ``[N]``.
    """
    blocks_N = (length_N + BLOCK - 1) // BLOCK
    segment_C = torch.repeat_interleave(blocks_N)
    block_C = torch.arange(len(segment_C), device=value_M.device) - (blocks_N.cumsum(0) - blocks_N)[segment_C]
    left_C = length_N[segment_C] - BLOCK * block_C
    kept_CK = torch.arange(BLOCK, device=value_M.device) < left_C[:, None]
    value_KC = value_M.new_zeros(kept_CK.shape).masked_scatter_(kept_CK, value_M).T.contiguous()
    decay_N = decay if isinstance(decay, Tensor) else value_M.new_full((len(length_N),), decay)
    decay_C, behind_C = decay_N[segment_C], value_M.new_zeros(len(segment_C))
    if int(block_C.max()) > 0 if len(block_C) else False:
        total_C = behind_C
        for value_C in value_KC.flip(0).unbind():
            total_C = torch.addcmul(value_C, decay_C, total_C)
        sum_C = discounted_sums(total_C, blocks_N, decay_N**BLOCK)
        behind_C = torch.where(left_C > BLOCK, sum_C.roll(-1), 0.0)
    for k in range(BLOCK - 1, -1, -1):
        behind_C = torch.addcmul(value_KC[k], decay_C, behind_C, out=value_KC[k])
    return torch.masked_select(value_KC.T, kept_CK)


def running_sums(value_M: Tensor, length_N: Tensor) -> Tensor:
    """``y_t = x_t + y_{t-1}`` within each segment ``[M]``; precise in float32, unlike a sum over all of the axis."""
    return discounted_sums(value_M.flip(0), length_N.flip(0), 1.0).flip(0)
