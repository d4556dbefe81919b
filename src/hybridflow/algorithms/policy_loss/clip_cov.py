"""Clip-Cov (arXiv 2505.22617): PPO's loss, of which some tokens of high covariance learn nothing.

    candidates: the mini-batch's tokens with cov_low < cov < cov_high that the ratio's clip has not taken (`covariance`)
    keep = 0 for max(1, int(clip_cov_share x loss tokens)) of them drawn at random, else 1
    loss = keep max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))

The covariance is that of the current policy, so it takes a forward pass before each update. verl takes every
micro-batch for a batch of its own (each drops at least one token) and draws with the process's random state; its
pg_clipfrac is the cov_clipfrac here.

Shapes: T tokens of the mini-batch, M scored tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridflow.algorithms.policy_loss.covariance import covariance, picked, smallest_keys
from hybridflow.algorithms.policy_loss.ppo_clip import ppo_clip


def clip_cov(
    logp_M: Tensor,
    old_logp_M: Tensor,
    advantage_M: Tensor,
    cov_keep_M: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Computes the loss of each token ``[M]``, and per-token diagnostics: those of `ppo_clip` and the share that was
    dropped.

    Args:
        logp_M: current log-probabilities (with gradient).
        old_logp_M: log-probabilities at the start of the step.
        advantage_M: advantage of each token.
        cov_keep_M: 0 for the tokens that learn nothing, else 1; see `clip_cov_columns`.
        clip_low: the ratio is clipped below at ``1 - clip_low``.
        clip_high: the ratio is clipped above at ``1 + clip_high``.
    """
    loss_M, metrics = ppo_clip(logp_M, old_logp_M, advantage_M, clip_low=clip_low, clip_high=clip_high)
    return loss_M * cov_keep_M, {**metrics, "cov_clipfrac": 1 - cov_keep_M}


def clip_cov_columns(
    logp_T: Tensor,
    old_logp_T: Tensor,
    advantage_T: Tensor,
    mask_T: Tensor,
    token_key_T: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    clip_cov_share: float = 2e-4,
    cov_low: float = 1.0,
    cov_high: float = 5.0,
) -> dict[str, Tensor]:
    """Computes the column ``cov_keep_T`` (float32) of a whole mini-batch.

    Args:
        logp_T: log-probabilities under the policy as it is before the update.
        old_logp_T: log-probabilities at the start of the step.
        advantage_T: advantage of each token.
        mask_T: which tokens have a loss.
        token_key_T: a random number of each token (int64); candidates with the smallest are dropped.
        clip_low: as for the loss.
        clip_high: as for the loss.
        clip_cov_share: share of the loss tokens that is dropped, at most.
        cov_low: candidates have a covariance above this.
        cov_high: and below this.
    """
    _, metrics = ppo_clip(logp_T, old_logp_T, advantage_T, clip_low=clip_low, clip_high=clip_high)
    cov_T = covariance(logp_T, advantage_T, mask_T)
    candidate_T = (cov_T > cov_low) & (cov_T < cov_high) & mask_T & (metrics["pg_clipfrac"] == 0)
    dropped = smallest_keys(candidate_T, token_key_T, picked(mask_T, clip_cov_share))
    return {"cov_keep_T": torch.ones_like(cov_T).index_fill_(0, dropped, 0.0)}
