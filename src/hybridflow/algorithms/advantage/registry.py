"""Advantage estimators, by name: pure functions of named tensors, each given what its signature asks for.

| parameter | what it is given |
| --- | --- |
| ``reward_N`` | the reward of each trajectory, less its KL penalty |
| ``length_N`` | its number of tokens with loss |
| ``x_N``, such as ``group_N``, ``baseline_N``; ``components_NK`` | the column ``x_B``, one entry per trajectory |
| ``trajectory_T`` | which of the N trajectories a token belongs to |
| ``mask_T`` | ``loss_mask_T`` |
| ``x_T``, such as ``reward_T``, ``value_T`` | the column of that name, ragged: see ``offsets`` |
| ``offsets`` | ``[B + 1]`` where each sequence begins and ends on the T axis |
| anything else | the key of that name in the ``algorithm`` section |

Where a column is missing, the parameter keeps its default.

An estimator that takes ``mask_T`` returns an advantage per token ``[T]``, any other one per trajectory ``[N]``. One
that trains a critic returns (advantage, return): the return ``[T]`` is what the critic learns.

Shapes: T tokens, B sequences, N trajectories (one or more sequences each), K components of a reward.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hybridflow.algorithms.advantage.distillation import distillation
from hybridflow.algorithms.advantage.gae import gae
from hybridflow.algorithms.advantage.gdpo import gdpo
from hybridflow.algorithms.advantage.gigpo import gigpo
from hybridflow.algorithms.advantage.gpg import gpg
from hybridflow.algorithms.advantage.grpo import grpo
from hybridflow.algorithms.advantage.grpo_passk import grpo_passk
from hybridflow.algorithms.advantage.maxrl import maxrl
from hybridflow.algorithms.advantage.opo import opo
from hybridflow.algorithms.advantage.optimal_token_baseline import optimal_token_baseline, tir_optimal_token_baseline
from hybridflow.algorithms.advantage.reinforce_plus_plus import reinforce_plus_plus
from hybridflow.algorithms.advantage.reinforce_plus_plus_baseline import reinforce_plus_plus_baseline
from hybridflow.algorithms.advantage.remax import remax
from hybridflow.algorithms.advantage.rloo import rloo
from hybridflow.algorithms.advantage.vapo_gae import vapo_gae
from hybridflow.algorithms.aggregation import loss_tokens
from hybridflow.algorithms.pieces import ABSENT, call, piece
from hybridflow.batch import Batch

ADVANTAGES: dict[str, Callable[..., Tensor | tuple[Tensor, Tensor]]] = {
    "gae": gae,
    "vapo_gae": vapo_gae,
    "grpo": grpo,
    "grpo_passk": grpo_passk,
    "rloo": rloo,
    "opo": opo,
    "gpg": gpg,
    "maxrl": maxrl,
    "gdpo": gdpo,
    "gigpo": gigpo,
    "remax": remax,
    "reinforce_plus_plus": reinforce_plus_plus,
    "reinforce_plus_plus_baseline": reinforce_plus_plus_baseline,
    "optimal_token_baseline": optimal_token_baseline,
    "tir_optimal_token_baseline": tir_optimal_token_baseline,
    "distillation": distillation,
}


def advantage_columns(name: str, batch: Batch, values: Mapping[str, Any]) -> dict[str, Tensor]:
    """Computes ``advantage_T``, and ``return_T`` where the estimator trains a critic; 0 where ``loss_mask_T`` is False.

    Args:
        name: a key of `ADVANTAGES`, or ``file.py:function``.
        batch: the whole step's responses: ``loss_mask_T``, ``reward_T``, ``trajectory_B``, and what the estimator
            needs.
        values: the keys of the ``algorithm`` section.
    """
    estimator = piece(ADVANTAGES, name)
    _, trajectory_B = torch.unique(batch["trajectory_B"], return_inverse=True)
    count, mask_T = int(trajectory_B.max()) + 1 if len(batch) else 0, batch["loss_mask_T"]

    def summed(value_B: Tensor) -> Tensor:
        return value_B.new_zeros(count).index_add_(0, trajectory_B, value_B)

    def given(parameter: str) -> Any:
        own: dict[str, Callable[[], Any]] = {
            # A sum with zeros: exact where no token but the last has a reward.
            "reward_N": lambda: summed(_sums(batch["reward_T"], batch.lengths())),
            "length_N": lambda: summed(loss_tokens(batch)).long(),
            "mask_T": lambda: mask_T,
            "trajectory_T": lambda: trajectory_B[batch.sequence_of()],
            "offsets": lambda: batch.offsets["T"],
        }
        if parameter in own:
            return own[parameter]()
        name, _, axes = parameter.rpartition("_")
        if not axes.startswith(("N", "T")):
            return values.get(parameter, ABSENT)
        column = f"{name}_B{axes[1:]}" if axes.startswith("N") else parameter
        if column not in batch:
            return ABSENT
        if column == parameter:
            return batch[column]
        return batch[column].new_empty(count, *batch[column].shape[1:]).index_copy_(0, trajectory_B, batch[column])

    found = call(estimator, given)
    advantage, return_T = found if isinstance(found, tuple) else (found, None)
    if "mask_T" not in inspect.signature(estimator).parameters:
        advantage = torch.repeat_interleave(advantage[trajectory_B], batch.lengths())
    columns = {"advantage_T": advantage * mask_T}
    return columns if return_T is None else columns | {"return_T": return_T * mask_T}


def _sums(value_T: Tensor, lengths_B: Tensor) -> Tensor:
    """Sums the values of each sequence ``[B]``."""
    if not len(lengths_B):
        return value_T.new_zeros(0)
    return torch.segment_reduce(value_T, "sum", lengths=lengths_B)
