"""Turns the reward of a response into rewards of tokens, as the section ``reward`` says for training.

In this order: the reward is clipped (`reward.clip`); long responses are penalised (`reward.overlong_buffer`), and
length is weighted (`reward.length_coef`); last, rewards are normalised (`reward.normalize`). Evaluation and the metric
``critic/score`` show the reward as the reward function returned it.

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

LEAST_DEVIATION = 1e-6


@dataclass(frozen=True, slots=True)
class Moments:
    """Count, mean and sum of squared deviations of all rewards so far (Chan, Golub & LeVeque 1979, equation 1.5)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def with_more(self, value_B: Tensor) -> Moments:
        """Returns the moments of all rewards so far and of these."""
        if not len(value_B):
            return self
        value_B = value_B.double()
        n, mean = len(value_B), float(value_B.mean())
        apart, total = mean - self.mean, self.count + n
        squares = self.squares + (float(((value_B - mean) ** 2).sum()) + apart**2 * self.count * n / total)
        return Moments(total, self.mean + apart * n / total, squares)

    def scale(self, value_B: Tensor) -> Tensor:
        """Subtracts the mean from values and divides by the standard deviation ``[B]``."""
        deviation = math.sqrt(self.squares / max(self.count, 1))
        return (value_B - self.mean) / max(deviation, LEAST_DEVIATION)


@dataclass(frozen=True, slots=True)
class Shaped:
    """The rewards that training works with.

    Args:
        reward_B: of every response ``[B]``.
        baseline_B: what each is compared with, clipped and scaled as the rewards are; None where there is none.
        moments: of all steps so far, this one among them where ``reward.normalize`` is running.
    """

    reward_B: Tensor
    baseline_B: Tensor | None
    moments: Moments


def shaped_rewards(batch: Batch, config: RlConfig, moments: Moments) -> Shaped:
    """Computes the rewards that training works with, for the responses of a batch.

    Args:
        batch: ``reward_B``, ``loss_mask_T``, and ``baseline_B`` where there is one.
        config: its ``reward`` section.
        moments: of all steps so far.
    """
    r, reward_B = config.reward, batch["reward_B"]
    baseline_B: Tensor | None = None
    if "baseline_B" in batch:
        baseline_B = batch["baseline_B"]
    if r.clip is not None:
        reward_B = reward_B.clamp(*r.clip)
        baseline_B = None if baseline_B is None else baseline_B.clamp(*r.clip)
    if r.overlong_buffer is not None or r.length_coef:
        length_B = torch.zeros_like(reward_B).index_add_(0, batch.sequence_of(), batch["loss_mask_T"].to(reward_B))
        limit = config.rollout.max_response_tokens
        if r.overlong_buffer is not None:
            reward_B = reward_B + overlong_penalty_N(length_B, limit, r.overlong_buffer, r.overlong_penalty)
        reward_B = reward_B + r.length_coef * length_B / limit
    if r.normalize != "none":
        known = (moments if r.normalize == "running" else Moments()).with_more(reward_B)
        moments = known if r.normalize == "running" else moments
        reward_B = known.scale(reward_B)
        baseline_B = None if baseline_B is None else known.scale(baseline_B)
    return Shaped(reward_B, baseline_B, moments)


def token_rewards(batch: Batch, reward_B: Tensor | None = None) -> Tensor:
    """Computes the reward of every token ``[T]``; those of a response add up to its own.

    Rewards of its parts (``step_reward_T``) lie on the tokens that end them, and all that is left on its last token
    that carries loss.

    Args:
        batch: ``loss_mask_T``, and ``reward_B`` unless given.
        reward_B: the reward of each response.
    """
    reward_B = batch["reward_B"] if reward_B is None else reward_B
    reward_T = torch.zeros(batch.total(), dtype=reward_B.dtype)
    if "step_reward_T" in batch:
        reward_T += batch["step_reward_T"] * batch["loss_mask_T"]
        reward_B = reward_B.index_add(0, batch.sequence_of(), -reward_T)
    scored_T = batch["loss_mask_T"].nonzero()[:, 0]
    last_B = torch.full((len(batch),), -1).scatter_reduce(0, batch.sequence_of()[scored_T], scored_T, "amax")
    reward_T[last_B[last_B >= 0]] += reward_B[last_B >= 0]
    return reward_T
