"""On-policy distillation as a policy gradient: every token is compared with a teacher.

    A_t = log p_teacher(y_t) - log p_old(y_t)

Over tokens that the student drew, the mean of ``-A_t`` is the divergence KL(student || teacher) of the next token, the
reverse one; its gradient is that of REINFORCE with the advantage A, which is what `policy_loss=reinforce` computes.
Learning from the student's own responses is GKD (arXiv 2306.13649), which sums over the vocabulary instead of taking
the one token that was drawn; reverse KL through a policy gradient is MiniLLM (arXiv 2306.08543), which adds later
tokens' terms to the return. Here as in Thinking Machines' note "On-Policy Distillation" (2025) each token answers for
itself alone: a discount of 0. The task's reward is not read. The teacher is ``model.reference``. Not in verl as an
estimator. Shapes: T tokens.
"""

from __future__ import annotations

from torch import Tensor


def distillation(ref_logp_T: Tensor, old_logp_T: Tensor, mask_T: Tensor) -> Tensor:
    """Computes how much likelier the teacher would have written each token, in nats ``[T]``, 0 where `mask_T` is False.

    Args:
        ref_logp_T: log-probabilities of the teacher.
        old_logp_T: those of the policy at the start of the step.
        mask_T: which tokens carry loss.
    """
    return (ref_logp_T - old_logp_T).masked_fill_(~mask_T, 0.0)
