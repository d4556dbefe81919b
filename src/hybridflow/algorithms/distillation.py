"""On-policy distillation: how far a student is from a teacher at every token of the student's own responses.

With p the teacher's and q the student's distribution of the next token:

    forward KL        sum p log(p / q)           makes the student cover the teacher
    reverse KL        sum q log(q / p)           makes it seek what the teacher finds likely; MiniLLM, arXiv 2306.08543
    generalised JSD   b KL(p | m) + (1 - b) KL(q | m),  m = b p + (1 - b) q,  0 < b < 1        GKD, arXiv 2306.13649

From the teacher's k likeliest tokens alone, the rest of the vocabulary is one more token that has the remaining mass:
the divergence is then a lower bound of the true one, never negative, and 0 only where the two agree on all k tokens.
verl leaves the remaining mass out: its sum over k tokens can be negative, which it clamps to 0, and is least where the
student gives all its mass to these k.

From the sampled tokens alone, estimators of the reverse KL are in `kl`: with the teacher as the reference, k1 as a
reward is the `distillation` advantage, and k3, or a straight-through form, is a loss (`algorithm.kl_loss_estimator`).

Shapes: M tokens, V vocabulary, K tokens of the teacher's choice.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LEAST_LOGP = -1e4  # of a token that is ruled out by a logit of minus infinity, so that 0 x log 0 is 0
LEAST_REST = 1e-6  # remaining mass below which its logarithm is all rounding


def forward_kl(student_logits_MV: Tensor, teacher_logits_MV: Tensor) -> Tensor:
    """Computes KL(teacher | student) of each token ``[M]``, from logits after temperature."""
    return _kl(_logp(teacher_logits_MV), _logp(student_logits_MV))


def reverse_kl(student_logits_MV: Tensor, teacher_logits_MV: Tensor) -> Tensor:
    """Computes KL(student | teacher) of each token ``[M]``, from logits after temperature."""
    return _kl(_logp(student_logits_MV), _logp(teacher_logits_MV))


def generalized_jsd(student_logits_MV: Tensor, teacher_logits_MV: Tensor, *, beta: float = 0.5) -> Tensor:
    """Computes the generalised Jensen-Shannon divergence of each token ``[M]``, from logits after temperature.

    Divided by beta it goes to the forward KL as beta goes to 0, divided by 1 - beta to the reverse KL as it goes to 1.

    Args:
        student_logits_MV: logits of the student (with gradient).
        teacher_logits_MV: logits of the teacher.
        beta: the teacher's share in the mixture.

    Raises:
        ValueError: beta is not between 0 and 1, where the divergence is 0 whatever the student.
    """
    if not 0 < beta < 1:
        raise ValueError(f"beta is {beta:g}, it must be between 0 and 1; at the ends take forward_kl or reverse_kl")
    student_MV, teacher_MV = _logp(student_logits_MV), _logp(teacher_logits_MV)
    mixture_MV = torch.logaddexp(teacher_MV + math.log(beta), student_MV + math.log1p(-beta))
    return beta * _kl(teacher_MV, mixture_MV) + (1 - beta) * _kl(student_MV, mixture_MV)


def logp_at(logits_MV: Tensor, ids_MK: Tensor) -> Tensor:
    """Computes the log-probabilities of these tokens ``[M, K]``; of the logits' size there is only their gradient."""
    return logits_MV.gather(-1, ids_MK) - logits_MV.logsumexp(-1, keepdim=True)


def top_k_forward_kl(student_logp_MK: Tensor, teacher_logp_MK: Tensor) -> Tensor:
    """Computes KL(teacher | student) of each token ``[M]`` over K tokens and the rest.

    Args:
        student_logp_MK: the student's log-probabilities of the teacher's K likeliest tokens (with gradient).
        teacher_logp_MK: the teacher's.
    """
    return _kl(_with_rest(teacher_logp_MK), _with_rest(student_logp_MK))


def top_k_reverse_kl(student_logp_MK: Tensor, teacher_logp_MK: Tensor) -> Tensor:
    """Computes KL(student | teacher) of each token ``[M]`` over K tokens and the rest; arguments as for
    `top_k_forward_kl`.
    """
    return _kl(_with_rest(student_logp_MK), _with_rest(teacher_logp_MK))


def _logp(logits_MV: Tensor) -> Tensor:
    return logits_MV.log_softmax(-1).clamp(min=LEAST_LOGP)


def _kl(p_MV: Tensor, q_MV: Tensor) -> Tensor:
    """Computes the divergence of two distributions that are given as log-probabilities."""
    return (p_MV.exp() * (p_MV - q_MV)).sum(-1)


def _with_rest(logp_MK: Tensor) -> Tensor:
    """Returns the log-probabilities ``[M, K + 1]``: the last one is that of all other tokens, at least log(1e-6)."""
    rest_M = 1 - logp_MK.exp().sum(-1)
    return torch.cat([logp_MK.clamp(min=LEAST_LOGP), rest_M.clamp(min=LEAST_REST).log()[:, None]], -1)
