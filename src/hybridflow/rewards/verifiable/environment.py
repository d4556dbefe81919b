"""The reward that the environment of a run gives by itself: what each turn earned, on that turn."""

from __future__ import annotations

from typing import Any


def score(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the environment's rewards of the turns; 0 where it gave none.

    Args:
        turns: of the trajectory.
    """
    return {"score": 0.0, "turns": [(i, turn["reward"]) for i, turn in enumerate(turns) if turn["reward"] is not None]}
