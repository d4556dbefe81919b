"""Per-token policy losses, by name: (logp_M, old_logp_M, advantage_M, **their own values) to (loss_M, metrics)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from hybridflow.algorithms.policy_loss.ppo_clip import ppo_clip

POLICY_LOSSES: dict[str, Callable[..., tuple[Tensor, dict[str, Tensor]]]] = {"ppo_clip": ppo_clip}
