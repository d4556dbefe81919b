"""Advantage estimators, by name: functions of (reward_N, group_N, **their own values) to ``[N]``."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from hybridflow.algorithms.advantage.grpo import grpo

ADVANTAGES: dict[str, Callable[..., Tensor]] = {"grpo": grpo}
