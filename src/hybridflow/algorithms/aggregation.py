"""How token losses become one number: a weight for every token, computed once per mini-batch.

    token-mean                sum of all / number of tokens                      DAPO, arXiv 2503.14476
    token-sum                 sum of all
    seq-mean-token-sum        mean over trajectories of their sums               RLOO, arXiv 2402.14740
    seq-mean-token-mean       mean over trajectories of their means              GRPO, arXiv 2402.03300
    seq-mean-token-sum-norm   mean over trajectories of their sums / norm        Dr.GRPO, arXiv 2503.20783
    prompt-mean               mean over groups of the mean of all their tokens   ScaleRL, arXiv 2510.13786, section 3.2

An engine only sums weight x loss, over micro-batches and ranks, so the result cannot depend on how work is split.
Denominators count the whole mini-batch; a trajectory or a group without any loss token counts in them too, as one whose
loss is 0. verl leaves such trajectories out where a micro-batch counts its own, not where it is given the global
number, and multiplies by the number of data-parallel ranks; its norm is the padded width unless configured.

Shapes: T tokens, B sequences, N trajectories (one or more sequences each), G groups.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hybridflow.algorithms.pieces import ABSENT, call, piece
from hybridflow.batch import Batch
from hybridflow.errors import UserError


def token_weights(batch: Batch, mode: str, *, norm: float, values: Mapping[str, Any] | None = None) -> Tensor:
    """Computes the weight of every token, ``[T]``; 0 where ``loss_mask_T`` is False.

    In float64, whatever the batch's own precision: a loss in float64 then loses nothing, one in float32 is summed in
    float64 at no cost that shows, and its gradient is float32 as it was.

    Args:
        batch: one mini-batch, whole: ``loss_mask_T``, ``trajectory_B``, and ``group_B`` for "prompt-mean".
        mode: a key of `AGGREGATIONS`, or ``file.py:function``: see there.
        norm: the constant of "seq-mean-token-sum-norm", `max_response_tokens` unless configured.
        values: further keyword-only parameters of a function of the user's own.

    Raises:
        UserError: a function of the user's own has a parameter that nothing fits, or returns no weight per trajectory.
    """
    _, trajectory_B = torch.unique(batch["trajectory_B"], return_inverse=True)
    count = int(trajectory_B.max()) + 1 if len(batch) else 0
    plain = {"norm": norm, **(values or {})}

    def given(parameter: str) -> Any:
        if parameter in plain:
            return plain[parameter]
        if parameter == "length_N":
            return torch.zeros(count, dtype=torch.float64).index_add_(0, trajectory_B, loss_tokens(batch))
        if not parameter.endswith("_N") or f"{parameter[:-1]}B" not in batch:
            return ABSENT
        column_B = batch[f"{parameter[:-1]}B"]
        return column_B.new_empty(count).index_copy_(0, trajectory_B, column_B)

    function = piece(AGGREGATIONS, mode)
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.default is parameter.empty and given(name) is ABSENT:
            raise UserError(
                f"the aggregation {mode} has the parameter {name}, and no value of that name exists", fix=EXPECTED
            )
    weight_N = call(function, given)
    if not isinstance(weight_N, Tensor) or weight_N.shape != (count,):
        what = f"a tensor {list(weight_N.shape)}" if isinstance(weight_N, Tensor) else repr(weight_N)
        raise UserError(f"the aggregation {mode} returned {what} for {count} trajectories", fix=EXPECTED)
    weight_T = torch.repeat_interleave(weight_N.double()[trajectory_B], batch.lengths())
    # Filled, not multiplied: the weight of a trajectory without loss tokens may be no number.
    return weight_T.masked_fill_(batch["loss_mask_T"].logical_not(), 0.0)


def loss_tokens(batch: Batch) -> Tensor:
    """Counts the tokens of each sequence that carry loss ``[B]`` (float64)."""
    passed_T = batch["loss_mask_T"].cumsum(0, dtype=torch.int32)
    passed_B = torch.cat([passed_T.new_zeros(1), passed_T])[batch.offsets["T"]]  # before each sequence and behind all
    return passed_B.diff().double()


def token_mean(length_N: Tensor) -> Tensor:
    """Gives every loss token of the mini-batch the same weight ``[N]``."""
    return torch.ones_like(length_N) / length_N.sum().clamp(min=1)


def token_sum(length_N: Tensor) -> Tensor:
    """Gives every loss token the weight 1 ``[N]``."""
    return torch.ones_like(length_N)


def seq_mean_token_sum(length_N: Tensor) -> Tensor:
    """Gives every loss token the same weight, 1 / N, however many there are ``[N]``."""
    return torch.ones_like(length_N) / max(len(length_N), 1)


def seq_mean_token_mean(length_N: Tensor) -> Tensor:
    """Gives every trajectory the same weight ``[N]``."""
    return 1.0 / (len(length_N) * length_N.clamp(min=1))


def seq_mean_token_sum_norm(length_N: Tensor, *, norm: float) -> Tensor:
    """Gives every loss token the weight 1 / (N norm) ``[N]``."""
    return torch.ones_like(length_N) / (max(len(length_N), 1) * norm)


def prompt_mean(length_N: Tensor, group_N: Tensor) -> Tensor:
    """Gives every group the same weight, and every loss token within a group ``[N]``.

    A group that is spread over two mini-batches counts in each of them.
    """
    groups, index_N = torch.unique(group_N, return_inverse=True)
    length_G = length_N.new_zeros(len(groups)).index_add_(0, index_N, length_N)
    return 1.0 / (len(groups) * length_G.clamp(min=1))[index_N]


EXPECTED = (
    "an aggregation is a function such as weights(length_N, group_N, *, norm) that returns a tensor [N], the weight of "
    "every token of each of N trajectories; it may ask for length_N (loss tokens), group_N or another column, and norm"
)

# Each maps what its parameters name to one weight per trajectory, the same for all its tokens: `length_N` is the number
# of loss tokens of each (float64), `x_N` the column `x_B`, `norm` a number.
AGGREGATIONS: dict[str, Callable[..., Tensor]] = {
    "token-mean": token_mean,
    "token-sum": token_sum,
    "seq-mean-token-sum": seq_mean_token_sum,
    "seq-mean-token-mean": seq_mean_token_mean,
    "seq-mean-token-sum-norm": seq_mean_token_sum_norm,
    "prompt-mean": prompt_mean,
}
