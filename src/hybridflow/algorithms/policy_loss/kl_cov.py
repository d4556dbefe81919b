"""KL-Cov (arXiv 2505.22617): a policy gradient that holds back its tokens of highest covariance.

    d = logp - old_logp
    loss = -A exp(d) + kl_cov_coef penalty |d|
    penalty = 1 for the max(1, int(kl_cov_share x loss tokens)) tokens of highest covariance (`covariance`), else 0

Nothing is clipped. The covariance is that of the current policy over the whole mini-batch, so it takes a forward pass
before each update; verl takes every micro-batch for a batch of its own, each penalises at least one token. As in verl,
ppo_kl is the mean of |d| here. Where |d| is below 1e-5 its sign is a matter of rounding, and it has no gradient: all
of a step's first update would else be pushed at random.

Shapes: T tokens of the mini-batch, M scored tokens.
"""

from __future__ import annotations

from torch import Tensor

from hybridflow.algorithms.kl import absolute
from hybridflow.algorithms.policy_loss.covariance import covariance, largest, picked
from hybridflow.algorithms.policy_loss.ratio import bounded


def kl_cov(
    logp_M: Tensor,
    old_logp_M: Tensor,
    advantage_M: Tensor,
    cov_penalty_M: Tensor,
    *,
    kl_cov_coef: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Computes the loss of each token ``[M]``, and per-token diagnostics.

    Args:
        logp_M: current log-probabilities (with gradient).
        old_logp_M: log-probabilities at the start of the step.
        advantage_M: advantage of each token.
        cov_penalty_M: 1 for the tokens that are held back, else 0; see `kl_cov_columns`.
        kl_cov_coef: weight of their penalty, per nat.
    """
    change_M = logp_M - old_logp_M
    size_M = absolute(logp_M, old_logp_M)
    loss_M = -advantage_M * bounded(change_M).exp() + kl_cov_coef * cov_penalty_M * size_M
    return loss_M, {"ppo_kl": size_M.detach(), "cov_penaltyfrac": cov_penalty_M}


def kl_cov_columns(
    logp_T: Tensor, advantage_T: Tensor, mask_T: Tensor, token_key_T: Tensor, *, kl_cov_share: float = 2e-4
) -> dict[str, Tensor]:
    """Computes the column ``cov_penalty_T`` (float32) of a whole mini-batch.

    Args:
        logp_T: log-probabilities under the policy as it is before the update.
        advantage_T: advantage of each token.
        mask_T: which tokens have a loss.
        token_key_T: a random number of each token (int64); of equal covariances the smallest keys are taken.
        kl_cov_share: share of the loss tokens that is held back.
    """
    cov_T = covariance(logp_T, advantage_T, mask_T)
    return {"cov_penalty_T": largest(cov_T, mask_T, token_key_T, picked(mask_T, kl_cov_share))}
