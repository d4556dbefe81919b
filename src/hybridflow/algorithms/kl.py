"""The divergence of a policy from a reference: estimators of KL(policy | reference) from sampled tokens, and the
controller of the penalty's coefficient.

With d = logp - reference logp of a token that the policy drew (J. Schulman, "Approximating KL divergence", 2020):

    k1   d                        its mean is the divergence; the usual choice in the reward
    abs  |d|
    k2   d^2 / 2                  its gradient's mean is the divergence's
    k3   exp(-d) + d - 1          its mean is the divergence, with less variance than k1; never negative (GRPO's choice)

In a loss, k1 does nothing: the mean of its gradient is 0. There k2 or k3 is the choice, or a straight-through form,
whose name ends in a plus sign (verl's): the value is that of the estimator, the gradient that of k2, which is d.

Shapes: M tokens; for means per response T tokens of all sequences, N trajectories.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

LOG_RATIO_BOUND = 20.0  # where exp(-d) would become infinite
K3_BOUND = 10.0
ROUNDING = 1e-5  # log-probabilities that are closer than this may be the same, computed twice


def k1(logp_M: Tensor, ref_logp_M: Tensor) -> Tensor:
    """Computes the log-ratio itself ``[M]``."""
    return logp_M - ref_logp_M


def absolute(logp_M: Tensor, ref_logp_M: Tensor) -> Tensor:
    """Computes the size of the log-ratio ``[M]``; without a gradient where its sign is a matter of rounding."""
    d_M = logp_M - ref_logp_M
    return torch.where(d_M.detach().abs() < ROUNDING, d_M.detach(), d_M).abs()


def k2(logp_M: Tensor, ref_logp_M: Tensor) -> Tensor:
    """Computes half the squared log-ratio ``[M]``."""
    return 0.5 * (logp_M - ref_logp_M).square()


def k3(logp_M: Tensor, ref_logp_M: Tensor) -> Tensor:
    """Computes ``exp(-d) + d - 1`` ``[M]``; the log-ratio is kept within 20, outside of which there is no gradient."""
    d_M = (logp_M - ref_logp_M).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    return (-d_M).exp() + d_M - 1


def k3_clamped(logp_M: Tensor, ref_logp_M: Tensor) -> Tensor:
    """Computes k3, at most 10 ``[M]``: what verl calls low_var_kl."""
    return k3(logp_M, ref_logp_M).clamp(max=K3_BOUND)


def _with_gradient_of_k2(estimator: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    def straight_through(logp_M: Tensor, ref_logp_M: Tensor) -> Tensor:
        slope_M = k2(logp_M, ref_logp_M)
        return estimator(logp_M, ref_logp_M).detach() + (slope_M - slope_M.detach())  # the bracket is exactly 0

    return straight_through


KL_ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "k1": k1,
    "abs": absolute,
    "k2": k2,
    "k3": k3,
    "k3_clamped": k3_clamped,
    "k1+": _with_gradient_of_k2(k1),
    "abs+": _with_gradient_of_k2(absolute),
    "k3+": _with_gradient_of_k2(k3),
    "k3_clamped+": _with_gradient_of_k2(k3_clamped),
}


@dataclass(slots=True)
class KlController:
    """The coefficient of the KL penalty in the reward: fixed, or led towards a target (arXiv 1909.08593, section 2.2).

        coef <- coef (1 + clip(kl / target - 1, -0.2, 0.2) responses / horizon)

    The paper's divergence is a sum over a response's tokens; here it is, as in verl, their mean.

    Args:
        coef: the coefficient now.
        target: the divergence to hold, in nats per token; None keeps the coefficient as it is.
        horizon: responses over which a clipped error changes the coefficient by a fifth.
    """

    coef: float
    target: float | None = None
    horizon: float = 10_000

    def observe(self, kl: float, answers: int) -> None:
        """Takes in the mean divergence per token of this many responses."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coef *= 1 + error * answers / self.horizon


def mean_per_answer(kl_T: Tensor, mask_T: Tensor, trajectory_T: Tensor, count: int) -> float:
    """Computes the mean over responses (trajectories) of the mean over each one's masked-in tokens; responses without
    any count as 0.
    """
    weight_T = mask_T.to(kl_T.dtype)
    sum_N = torch.zeros(count, dtype=kl_T.dtype).index_add_(0, trajectory_T, kl_T * weight_T)
    size_N = torch.zeros(count, dtype=kl_T.dtype).index_add_(0, trajectory_T, weight_T)
    return float((sum_N / size_N.clamp(min=1)).mean()) if count else 0.0
