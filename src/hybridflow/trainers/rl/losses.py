"""The losses of a reinforcement-learning step, and the weights of their tokens.

Shapes: B sequences, T tokens of all sequences and their prompts.
"""

from __future__ import annotations

from typing import Any

import torch

from hybridflow.algorithms.aggregation import token_weights
from hybridflow.algorithms.kl import KL_ESTIMATORS
from hybridflow.batch import Batch
from hybridflow.config.kinds.rl import RlConfig
from hybridflow.config.locate import is_function_reference
from hybridflow.config.pieces.needs import needs_of
from hybridflow.config.pieces.tables import POLICY_LOSSES
from hybridflow.protocols.training import Loss


def divergence(batch: Batch, estimator: str) -> torch.Tensor:
    """Computes the policy's divergence from the reference at every token ``[T]``, 0 where there is no loss.

    Where old log-probabilities were not computed, the sampler's take their place: no forward pass for this alone.
    """
    logp_T = batch["old_logp_T"] if "old_logp_T" in batch else batch["rollout_logp_T"]
    return KL_ESTIMATORS[estimator](logp_T, batch["ref_logp_T"]) * batch["loss_mask_T"]


def with_weights(mini: Batch, config: RlConfig) -> Batch:
    """Returns a mini-batch with a weight column per loss term."""
    a, mini = config.algorithm, mini.select(list(mini))
    weight_T = token_weights(mini, a.aggregation, norm=config.rollout.max_response_tokens, values=a.values)
    mini["policy_weight_T"] = weight_T
    for name, wanted in [("entropy", a.entropy_coef), ("kl", a.kl_loss_coef), ("value", config.critic is not None)]:
        if wanted:
            mini[f"{name}_weight_T"] = weight_T
    return mini


def with_loss(mini: Batch, config: RlConfig) -> Batch:
    """Returns the sequences from which the actor can learn: those with an advantage, or all where it has other loss
    terms.
    """
    a, shared = config.algorithm, config.critic is not None and config.critic.shared_trunk
    every = a.entropy_coef or a.kl_loss_coef or shared or not config.train.skip_zero_advantage
    every = every or is_function_reference(a.policy_loss) or needs_of(a.policy_loss, POLICY_LOSSES).every_answer
    return mini.select(list(mini)) if every else with_signal(mini)


def with_signal(mini: Batch) -> Batch:
    """Returns the sequences whose advantage is not zero everywhere. Weights were computed before, so the gradient is
    the same.
    """
    size_T = mini["advantage_T"].abs() * mini["loss_mask_T"]
    signal_B = size_T.new_zeros(len(mini)).index_add_(0, mini.sequence_of(), size_T)
    return mini.take(signal_B.nonzero()[:, 0])


def policy_loss(config: RlConfig, *, measure_gap: bool = True) -> Loss:
    """Returns the configured loss of the actor, as the engine takes it; see `losses.policy`."""
    a = config.algorithm
    params: dict[str, Any] = {
        "policy_loss": a.policy_loss,
        "values": a.values | {n: getattr(a, n) for n in needs_of(a.policy_loss, POLICY_LOSSES).values if hasattr(a, n)},
        "measure_gap": measure_gap,
        "entropy_coef": a.entropy_coef,
        "kl_loss_coef": a.kl_loss_coef,
        "kl_loss_estimator": a.kl_loss_estimator,
        "temperature": config.rollout.temperature,
    }
    if config.critic is not None and config.critic.shared_trunk:
        params |= {"value_coef": a.value_coef, "clip_value": a.clip_value}
    return Loss("policy", params)


def value_loss(config: RlConfig) -> Loss:
    """Returns the configured loss of a critic with a model of its own."""
    return Loss("value", {"clip_value": config.algorithm.clip_value})
