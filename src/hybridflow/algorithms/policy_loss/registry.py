"""Per-token policy losses, by name, and the functions that make columns for those that look at the whole mini-batch.

A loss is given what its signature names. Positional parameters are data of a micro-batch's M scored tokens:

    logp_M        current log-probabilities, with the gradient
    old_logp_M    those at the start of the step
    advantage_M   advantage of each token
    sequence_M    index of each token's sequence in the micro-batch (int64); sequences are never cut
    x_M           any other column ``x_T`` of the batch, such as rollout_logp_M or cov_keep_M

Keyword-only parameters are values of the same name in the algorithm section. It returns the loss of each token ``[M]``
and a dict of diagnostics ``[M]`` whose means become metrics "actor/<name>". It takes no mean itself: the engine
multiplies by a weight column (see `aggregation`), which makes the result the same however a mini-batch is split. A loss
of a whole sequence is given to each of its tokens.

`STATISTICS` are called before an update with the whole mini-batch under the current policy, at the cost of one forward
pass: parameters logp_T (current), old_logp_T, advantage_T, mask_T (which tokens have a loss), token_key_T (int64 noise
of each token), and values as above. They return columns, which the loss of the same name reads.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from hybridflow.algorithms.policy_loss.cispo import cispo
from hybridflow.algorithms.policy_loss.clip_cov import clip_cov, clip_cov_columns
from hybridflow.algorithms.policy_loss.decoupled_ppo import decoupled_ppo
from hybridflow.algorithms.policy_loss.dppo import dppo_kl, dppo_tv
from hybridflow.algorithms.policy_loss.dro import dro
from hybridflow.algorithms.policy_loss.gmpo import gmpo
from hybridflow.algorithms.policy_loss.gspo import gspo, gspo_token
from hybridflow.algorithms.policy_loss.kl_cov import kl_cov, kl_cov_columns
from hybridflow.algorithms.policy_loss.ppo_clip import ppo_clip
from hybridflow.algorithms.policy_loss.reinforce import reinforce
from hybridflow.algorithms.policy_loss.sapo import sapo
from hybridflow.algorithms.policy_loss.sppo import sppo
from hybridflow.algorithms.policy_loss.topr import topr

POLICY_LOSSES: dict[str, Callable[..., tuple[Tensor, dict[str, Tensor]]]] = {
    "ppo_clip": ppo_clip,
    "reinforce": reinforce,
    "gspo": gspo,
    "gspo_token": gspo_token,
    "gmpo": gmpo,
    "sapo": sapo,
    "cispo": cispo,
    "clip_cov": clip_cov,
    "kl_cov": kl_cov,
    "dppo_tv": dppo_tv,
    "dppo_kl": dppo_kl,
    "dro": dro,
    "topr": topr,
    "decoupled_ppo": decoupled_ppo,
    "sppo": sppo,
}

STATISTICS: dict[str, Callable[..., dict[str, Tensor]]] = {"clip_cov": clip_cov_columns, "kl_cov": kl_cov_columns}
