"""The watch over models that act: what it says, and that it says it once."""

from __future__ import annotations

from hybridflow.tracking.agent_watch import AgentWatch


def test_each_advice_is_given_once_and_where_it_holds() -> None:
    def line(calls: float, **more: float) -> dict[str, float]:
        return {"tool_call_counts/mean": calls, "agent/calls/add": 64 * calls} | {
            f"agent/{name.replace('__', '/')}": value for name, value in more.items()
        }

    watch = AgentWatch()
    assert watch.observe({"critic/score/mean": 1.0}) is None  # no agent
    assert watch.observe(line(0.0)) is None  # it never called
    assert watch.observe(line(1.0, endings__done=0.9, endings__max_turns=0.1)) is None
    assert "raise agent.max_turns" in str(watch.observe(line(1.0, endings__max_turns=0.85)))
    assert watch.observe(line(1.0, endings__max_turns=0.85)) is None
    assert "60 of 64 calls failed in their tools" in str(watch.observe(line(1.0, tool_errors__raised=60)))
    assert watch.observe(line(1.0, tool_errors__arguments=60)) is None  # the model's own mistakes
    assert "stopped calling" in str(watch.observe(line(0.01)))
    assert watch.observe(line(0.0)) is None
