"""Turns the reward of a trajectory (a response, or several turns) into rewards of tokens, as the section ``reward``
says for training.

In this order: the reward is clipped (`reward.clip`); long responses are penalised (`reward.overlong_buffer`), and
length is weighted (`reward.length_coef`); last, rewards are normalised (`reward.normalize`). Length is the number of
tokens that the model sampled, over all sequences of the trajectory. Evaluation and the metric ``critic/score`` show the
reward as the reward function returned it.

Shapes: B sequences, T tokens, N trajectories.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hybridflow.algorithms.filtering import overlong_penalty_N
from hybridflow.batch import Batch
from hybridflow.config.kinds.rl import RlConfig
from hybridflow.trainers.rl.batches import trajectories

LEAST_DEVIATION = 1e-6


@dataclass(frozen=True, slots=True)
class Moments:
    """Count, mean and sum of squared deviations of all rewards so far (Chan, Golub & LeVeque 1979, equation 1.5)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def with_more(self, value_N: Tensor) -> Moments:
        """Returns the moments of all rewards so far and of these."""
        if not len(value_N):
            return self
        value_N = value_N.double()
        n, mean = len(value_N), float(value_N.mean())
        apart, total = mean - self.mean, self.count + n
        squares = self.squares + (float(((value_N - mean) ** 2).sum()) + apart**2 * self.count * n / total)
        return Moments(total, self.mean + apart * n / total, squares)

    def scale(self, value_N: Tensor) -> Tensor:
        """Subtracts the mean from values and divides by the standard deviation ``[N]``."""
        deviation = math.sqrt(self.squares / max(self.count, 1))
        return (value_N - self.mean) / max(deviation, LEAST_DEVIATION)


@dataclass(frozen=True, slots=True)
class Shaped:
    """The rewards that training works with.

    Args:
        reward_B: of the trajectory of every sequence ``[B]``.
        baseline_B: what it is compared with, clipped and scaled as the rewards are; None where there is none.
        moments: of all steps so far, this one among them where ``reward.normalize`` is running.
    """

    reward_B: Tensor
    baseline_B: Tensor | None
    moments: Moments


def shaped_rewards(batch: Batch, config: RlConfig, moments: Moments) -> Shaped:
    """Computes the rewards that training works with, for the trajectories of a batch.

    Args:
        batch: ``reward_B``, ``loss_mask_T``, ``trajectory_B``, and ``baseline_B`` where there is one.
        config: its ``reward`` section.
        moments: of all steps so far.
    """
    r, (index_B, first_N) = config.reward, trajectories(batch)
    reward_N = batch["reward_B"][first_N]
    baseline_N: Tensor | None = None
    if "baseline_B" in batch:
        baseline_N = batch["baseline_B"][first_N]
    if r.clip is not None:
        reward_N = reward_N.clamp(*r.clip)
        baseline_N = None if baseline_N is None else baseline_N.clamp(*r.clip)
    if r.overlong_buffer is not None or r.length_coef:
        own_T = index_B[batch.sequence_of()]
        length_N = torch.zeros_like(reward_N).index_add_(0, own_T, batch["loss_mask_T"].to(reward_N))
        limit = config.rollout.max_response_tokens
        if r.overlong_buffer is not None:
            reward_N = reward_N + overlong_penalty_N(length_N, limit, r.overlong_buffer, r.overlong_penalty)
        reward_N = reward_N + r.length_coef * length_N / limit
    if r.normalize != "none":
        known = (moments if r.normalize == "running" else Moments()).with_more(reward_N)
        moments = known if r.normalize == "running" else moments
        reward_N = known.scale(reward_N)
        baseline_N = None if baseline_N is None else known.scale(baseline_N)
    return Shaped(reward_N[index_B], None if baseline_N is None else baseline_N[index_B], moments)


def token_rewards(batch: Batch, reward_B: Tensor | None = None) -> Tensor:
    """Computes the reward of every token ``[T]``; those of a trajectory add up to its own.

    Rewards of its parts (``step_reward_T``) lie on the tokens that end them, and all that is left on its last token
    that carries loss.

    Args:
        batch: ``loss_mask_T``, ``trajectory_B``, whose sequences stand in the order of time, and ``reward_B`` unless
            given.
        reward_B: the reward of each sequence's trajectory.
    """
    index_B, first_N = trajectories(batch)
    reward_N = (batch["reward_B"] if reward_B is None else reward_B)[first_N]
    reward_T, own_T = torch.zeros(batch.total(), dtype=reward_N.dtype), index_B[batch.sequence_of()]
    if "step_reward_T" in batch:
        reward_T += batch["step_reward_T"] * batch["loss_mask_T"]
        reward_N = reward_N.index_add(0, own_T, -reward_T)
    scored_T = batch["loss_mask_T"].nonzero()[:, 0]
    last_N = torch.full((len(first_N),), -1).scatter_reduce(0, own_T[scored_T], scored_T, "amax")
    reward_T[last_N[last_N >= 0]] += reward_N[last_N >= 0]
    return reward_T
