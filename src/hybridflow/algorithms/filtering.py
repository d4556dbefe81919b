"""Filters and penalties that apply before anything is learned.

    dynamic sampling      groups whose responses are all worth the same      DAPO, arXiv 2503.14476, equation 11
    a band                groups whose mean says that they are too hard or too easy
    overlong punishment   -penalty clip((length - (limit - buffer)) / buffer, 0, 1)            DAPO, equation 13
    overlong filtering    responses cut at the limit carry no loss                             DAPO, section 3.4

DAPO's penalty is 1 where a response is longer than the limit; responses here cannot be. verl's keeps growing there.

Shapes: T tokens, B sequences, N trajectories.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor


def drop_reason(
    values: Sequence[float], *, equal_rewards: bool, min_mean: float | None, max_mean: float | None
) -> Literal["equal", "too hard", "too easy"] | None:
    """Returns why a group is left out, or None if it is trained on. A mean out of the band is named before equal
    values.

    Args:
        values: the value to compare, of each response of the group; there must be one.
        equal_rewards: whether groups are left out whose values are all the same; a single response is one of these.
        min_mean: groups with a mean below this are too hard; None for no bound.
        max_mean: groups with a mean above this are too easy; None for no bound.
    """
    low, high = min(values), max(values)
    mean = low if low == high else sum(values) / len(values)  # the sum of equal values may round
    if min_mean is not None and mean < min_mean:
        return "too hard"
    if max_mean is not None and mean > max_mean:
        return "too easy"
    return "equal" if equal_rewards and low == high else None


def overlong_penalty_N(length_N: Tensor, max_response_tokens: int, buffer: int, penalty: float) -> Tensor:
    """Computes the term that is added to the reward of each response ``[N]``: 0 down to ``-penalty``.

    Args:
        length_N: number of generated tokens.
        max_response_tokens: the limit.
        buffer: the penalty grows over this many tokens before the limit.
        penalty: its size at the limit.
    """
    return penalty * ((max_response_tokens - buffer - length_N) / buffer).clamp(-1, 0)
