"""How token losses become one number: a weight for every token, computed once per mini-batch.

An engine only sums weight x loss, over micro-batches and ranks, so the result cannot depend on how work is split.
Denominators count the whole mini-batch. Shapes: T tokens, B sequences, N trajectories (one or more sequences each).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hybridflow.batch import Batch


def token_weights(batch: Batch, mode: str, *, norm: float) -> Tensor:
    """The weight of every token, ``[T]`` (float64 would be wasted: float32); 0 where ``loss_mask_T`` is False.

    Args:
        batch: one mini-batch, whole: ``loss_mask_T`` and ``trajectory_B``.
        mode: a key of `AGGREGATIONS`.
        norm: the constant of "seq-mean-token-sum-norm", `max_response_tokens` unless configured.
    """
    mask_T = batch["loss_mask_T"]
    _, trajectory_B = torch.unique(batch["trajectory_B"], return_inverse=True)
    trajectory_T = trajectory_B[batch.sequence_of()]
    count = int(trajectory_B.max()) + 1 if len(batch) else 0
    length_N = torch.zeros(count).index_add_(0, trajectory_T, mask_T.float())
    return AGGREGATIONS[mode](length_N, norm)[trajectory_T] * mask_T


def _token_mean(length_N: Tensor, norm: float) -> Tensor:
    return torch.full_like(length_N, 1.0) / length_N.sum().clamp(min=1)


def _seq_mean_token_mean(length_N: Tensor, norm: float) -> Tensor:
    return 1.0 / (len(length_N) * length_N.clamp(min=1))


def _seq_mean_token_sum_norm(length_N: Tensor, norm: float) -> Tensor:
    return torch.full_like(length_N, 1.0 / (max(len(length_N), 1) * norm))


# Each maps the trajectories' numbers of loss tokens to one weight per trajectory, the same for all its tokens.
AGGREGATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "token-mean": _token_mean,  # DAPO, arXiv 2503.14476
    "seq-mean-token-mean": _seq_mean_token_mean,  # GRPO, arXiv 2402.03300
    "seq-mean-token-sum-norm": _seq_mean_token_sum_norm,  # Dr.GRPO, arXiv 2503.20783
}
