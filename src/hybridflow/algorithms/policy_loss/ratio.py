"""The log-ratio of two policies, kept where its exponential is a number. Shapes: M scored tokens."""

from __future__ import annotations

from torch import Tensor

LOG_RATIO_BOUND = 20.0  # exp(20) is far outside any clip; the bound keeps a broken ratio from becoming inf - inf


def bounded(log_ratio: Tensor) -> Tensor:
    """Keeps the log-ratio within the bound; outside of it there is no gradient."""
    return log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
