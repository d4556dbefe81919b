"""Advice where a model that acts stops acting, meets broken tools, or runs out of room."""

from __future__ import annotations

from collections.abc import Mapping

BUDGETS = {
    "max_turns": "agent.max_turns",
    "length": "rollout.max_response_tokens",
    "context": "agent.max_tokens, or the model's context",
    "timeout": "agent.timeout",
}
MOST = 0.8  # share of trajectories that end at one budget
CALLED, LEFT = 0.5, 0.05  # calls per trajectory: that were common before, and that count as none
BROKEN = ("raised", "timeout")  # errors of calls that are not the model's


class AgentWatch:
    """Takes the metrics of every step; each advice is given once."""

    def __init__(self) -> None:
        self._called = 0.0
        self._told: set[str] = set()

    def observe(self, metrics: Mapping[str, float]) -> str | None:
        """Returns advice after the step with these metrics, if there is any."""
        calls = metrics.get("tool_call_counts/mean")
        if calls is None:
            return None
        self._called = max(self._called, calls)
        broken = sum(metrics.get(f"agent/tool_errors/{kind}", 0.0) for kind in BROKEN)
        made = sum(value for name, value in metrics.items() if name.startswith("agent/calls"))
        for reason, key in BUDGETS.items():
            if metrics.get(f"agent/endings/{reason}", 0.0) >= MOST:
                share = metrics[f"agent/endings/{reason}"]
                return self._once(
                    reason, f"{share:.0%} of trajectories ended at a budget; raise {key} if they need more"
                )
        if made and broken >= MOST * made:
            return self._once("broken", f"{broken:.0f} of {made:.0f} calls failed in their tools; look at the report")
        if self._called >= CALLED and calls <= LEFT:
            return self._once(
                "calls", "the model has stopped calling tools: look at responses, and whether the reward needs calls"
            )
        return None

    def _once(self, what: str, advice: str) -> str | None:
        if what in self._told:
            return None
        self._told.add(what)
        return advice
