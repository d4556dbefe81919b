"""Rewards that a program gives as objects: the name that the run's configuration records for them.

The name holds a fingerprint of the function (`config/fingerprints.py`). When the run is resumed with another function,
the setting has changed, and the run says so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from hybridflow.config.fingerprints import GIVEN, fingerprint
from hybridflow.config.kinds.rl import RlConfig
from hybridflow.rewards.graders.function import name_of

GivenReward: TypeAlias = Callable[..., Any] | Sequence[Callable[..., Any]]


def with_given(config: RlConfig, reward: GivenReward | None) -> RlConfig:
    """Returns a configuration that records a reward which a program gave, instead of those that it names.

    Args:
        config: the configuration.
        reward: a function, a callable object, or a list of them; None leaves the configuration as it is.
    """
    if reward is None:
        return config
    name = recorded_name(reward)
    if config.reward.function.partition("@")[0] == name.partition("@")[0]:
        return config  # recorded before the reward was tried: an object may count its calls
    recorded: dict[str, Any] = {"function": name, "terms": None, "kwargs": {}}
    return config.model_copy(update={"reward": config.reward.model_copy(update=recorded)})


def named(functions: Sequence[Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """Names every function of a list; of several with one name the later ones have a number."""
    names: dict[str, Callable[..., Any]] = {}
    for function in functions:
        name, number = name_of(function), 2
        while name in names:
            name, number = f"{name_of(function)}_{number}", number + 1
        names[name] = function
    return names


def recorded_name(reward: GivenReward) -> str:
    """Returns what stands for a reward in the configuration of a run: ``given:NAME@FINGERPRINT``.

    Args:
        reward: a function, a callable object, or a list of them.
    """
    functions = list(reward) if isinstance(reward, Sequence) else [reward]
    names = "+".join(re.sub(r"\W", "", name_of(function)) for function in functions)
    return f"{GIVEN}{names}@{fingerprint(functions)}"
