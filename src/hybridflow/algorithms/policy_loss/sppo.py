"""Self-play preference optimisation (arXiv 2405.00675): a response's log-ratio is led to its advantage.

    loss = (sum over the response of (logp - old_logp) - sppo_eta A)^2, one value for the response

The paper's A is the share of responses that this one beats, minus 1/2: with that share as the reward, its difference
from the group's mean. A response's loss is given to each of its tokens, and "seq-mean-token-mean" is the mean over
responses; no other aggregation has a meaning here. The paper's sppo_eta is 1000, verl's recipe and the default 1.

Shapes: M scored tokens, B sequences.
"""

from __future__ import annotations

from torch import Tensor

from hybridflow.algorithms.segments import segment_count, segment_mean, segment_sum


def sppo(
    logp_M: Tensor, old_logp_M: Tensor, advantage_M: Tensor, sequence_M: Tensor, *, sppo_eta: float = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Computes the loss of each token's sequence ``[M]``, and per-token diagnostics.

    Args:
        logp_M: current log-probabilities (with gradient).
        old_logp_M: log-probabilities at the start of the step.
        advantage_M: advantage of each token; a sequence's is their mean.
        sequence_M: index of each token's sequence.
        sppo_eta: log-ratio that an advantage of 1 asks for, in nats.
    """
    change_M = logp_M - old_logp_M
    count = segment_count(sequence_M)
    target_B = sppo_eta * segment_mean(advantage_M, sequence_M, count)
    loss_B = (segment_sum(change_M, sequence_M, count) - target_B).square()
    return loss_B[sequence_M], {"ppo_kl": -change_M.detach()}
