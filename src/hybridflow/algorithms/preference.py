"""Losses on pairs of responses, or on responses that are good or bad: pure functions of their log-probabilities.

The last one is of a reward model, on the values that it gives to the two.

With x = log pi - log pi_ref of a response, summed over its tokens, c and r those of a chosen and a rejected one, sigma
the logistic function, s the smoothing of labels, and m the mean log-probability of a response's tokens:

    DPO    -(1 - s) log sigma(beta (c - r)) - s log sigma(-beta (c - r))       arXiv 2305.18290, equation 7
    IPO    (c - r - 1 / (2 tau))^2                                             arXiv 2310.12036, equation 17
    SimPO  -log sigma(beta (m_c - m_r) - gamma)                                arXiv 2405.14734, equation 6
    ORPO   -m_c - lam log sigma(log odds(m_c) - log odds(m_r))                 arXiv 2403.07691, equations 6 and 7
           odds(m) = exp(m) / (1 - exp(m))
    KTO    w_good (1 - sigma(beta (x - z))), w_bad (1 - sigma(beta (z - x)))   arXiv 2402.01306, section 4
    BT     -log sigma(v_c - v_r - margin) + center (v_c + v_r)^2               Bradley and Terry 1952; arXiv 2203.02155,
           equation 1; margin: arXiv 2307.09288, equation 2; center: arXiv 2312.09244, equation 3

A loss is that of each pair (of each response for KTO); the caller averages over the mini-batch. TRL averages an
response's tokens for IPO, where the paper sums them, and takes ORPO's first term over the prompt's tokens too.

Shapes: N pairs, or N responses.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

HIGHEST_MEAN_LOGP = -1e-6  # odds are infinite at 0


def dpo(
    policy_chosen_N: Tensor,
    policy_rejected_N: Tensor,
    ref_chosen_N: Tensor,
    ref_rejected_N: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Computes the loss of each pair ``[N]``, and per-pair diagnostics ``[N]``: see `_rewards`.

    Args:
        policy_chosen_N: summed log-probability of the chosen response (with gradient).
        policy_rejected_N: of the rejected one (with gradient).
        ref_chosen_N: the same under the reference.
        ref_rejected_N: the same under the reference.
        beta: how closely the policy keeps to the reference.
        label_smoothing: probability that a pair's labels are swapped (conservative DPO, E. Mitchell, 2023), below 0.5.
    """
    chosen_N, rejected_N = policy_chosen_N - ref_chosen_N, policy_rejected_N - ref_rejected_N
    margin_N = beta * (chosen_N - rejected_N)
    loss_N = -(1 - label_smoothing) * logsigmoid(margin_N) - label_smoothing * logsigmoid(-margin_N)
    return loss_N, _rewards(beta * chosen_N, beta * rejected_N)


def ipo(
    policy_chosen_N: Tensor,
    policy_rejected_N: Tensor,
    ref_chosen_N: Tensor,
    ref_rejected_N: Tensor,
    *,
    tau: float = 0.1,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Computes the loss of each pair ``[N]``, and per-pair diagnostics; arguments as for `dpo`, all sums.

    Args:
        policy_chosen_N: see `dpo`.
        policy_rejected_N: see `dpo`.
        ref_chosen_N: see `dpo`.
        ref_rejected_N: see `dpo`.
        tau: the margin that is sought is ``1 / (2 tau)`` nats.
    """
    chosen_N, rejected_N = policy_chosen_N - ref_chosen_N, policy_rejected_N - ref_rejected_N
    return (chosen_N - rejected_N - 0.5 / tau).square(), _rewards(tau * chosen_N, tau * rejected_N)


def simpo(
    chosen_mean_N: Tensor, rejected_mean_N: Tensor, *, beta: float = 2.0, gamma: float = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Computes the loss of each pair ``[N]``, and per-pair diagnostics; without a reference.

    Args:
        chosen_mean_N: mean log-probability of the chosen response's tokens (with gradient).
        rejected_mean_N: of the rejected one's (with gradient).
        beta: scale of the rewards.
        gamma: the margin by which the chosen response's reward should be ahead.
    """
    loss_N = -logsigmoid(beta * (chosen_mean_N - rejected_mean_N) - gamma)
    return loss_N, _rewards(beta * chosen_mean_N, beta * rejected_mean_N)


def orpo(chosen_mean_N: Tensor, rejected_mean_N: Tensor, *, lam: float = 0.1) -> tuple[Tensor, dict[str, Tensor]]:
    """Computes the loss of each pair ``[N]`` from the likelihood of the chosen response and the odds against the
    rejected one, and diagnostics.

    Mean log-probabilities above -1e-6 have the odds of that bound, without a gradient.

    Args:
        chosen_mean_N: mean log-probability of the chosen response's tokens (with gradient).
        rejected_mean_N: of the rejected one's (with gradient).
        lam: weight of the odds against the likelihood.
    """
    log_odds_N = _log_odds(chosen_mean_N) - _log_odds(rejected_mean_N)
    metrics = _rewards(lam * chosen_mean_N, lam * rejected_mean_N) | {"log_odds_ratio": log_odds_N.detach()}
    return -chosen_mean_N - lam * logsigmoid(log_odds_N), metrics


def kto(
    policy_N: Tensor,
    ref_N: Tensor,
    good_N: Tensor,
    divergence: Tensor,
    *,
    beta: float = 0.1,
    weight_good: float = 1.0,
    weight_bad: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Computes the loss of each response ``[N]``, and per-response diagnostics ``[N]``: its "rewards".

    Args:
        policy_N: summed log-probability of the response (with gradient).
        ref_N: the same under the reference.
        good_N: whether the response is a good one.
        divergence: the paper's z, one number ``[]``: `kto_divergence` of the whole mini-batch.
        beta: how quickly gains and losses saturate.
        weight_good: weight of good responses.
        weight_bad: weight of the others; where one kind is rarer, a larger weight of it makes up for that.
    """
    gain_N = beta * (policy_N - ref_N - divergence)
    loss_N = torch.where(good_N, weight_good * torch.sigmoid(-gain_N), weight_bad * torch.sigmoid(gain_N))
    return loss_N, {"rewards": beta * (policy_N - ref_N).detach()}


def bradley_terry(
    chosen_N: Tensor, rejected_N: Tensor, margin_N: Tensor, *, center_coef: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Computes the loss of each pair ``[N]`` of a reward model, and per-pair diagnostics.

    Args:
        chosen_N: value of the chosen response (with gradient).
        rejected_N: of the rejected one.
        margin_N: by how much the first should be ahead; 0 for the plain model.
        center_coef: weight of the squared sum of both, which holds values around 0; the model leaves that open.
    """
    loss_N = -logsigmoid(chosen_N - rejected_N - margin_N) + center_coef * (chosen_N + rejected_N).square()
    return loss_N, _rewards(chosen_N, rejected_N)


def kto_divergence(policy_N: Tensor, ref_N: Tensor) -> Tensor:
    """Estimates the policy's divergence from the reference as KTO does: one number ``[]``, never negative, no gradient.

    Args:
        policy_N: summed log-probabilities of responses each to another one's prompt, of the whole mini-batch.
        ref_N: the same under the reference.
    """
    return (policy_N - ref_N).detach().mean().clamp(min=0)


def _log_odds(mean_N: Tensor) -> Tensor:
    mean_N = mean_N.clamp(max=HIGHEST_MEAN_LOGP)
    # log(1 - exp(m)), each of the two where it is precise; the other one gets a harmless value, as its gradient counts.
    near_N = mean_N > -math.log(2)
    near = torch.where(near_N, mean_N, -1.0).expm1().neg().log()
    far = torch.where(near_N, -1.0, mean_N).exp().neg().log1p()
    return mean_N - torch.where(near_N, near, far)


def _rewards(chosen_N: Tensor, rejected_N: Tensor) -> dict[str, Tensor]:
    """Computes per-pair diagnostics under TRL's names."""
    chosen_N, rejected_N = chosen_N.detach(), rejected_N.detach()
    return {
        "rewards/chosen": chosen_N,
        "rewards/rejected": rejected_N,
        "rewards/margins": chosen_N - rejected_N,
        "rewards/accuracies": (chosen_N > rejected_N).to(chosen_N.dtype),
    }
