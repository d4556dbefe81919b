"""Trajectories that go on as things come: no request waits for another trajectory's tool, and none is lost."""

from __future__ import annotations

from pathlib import Path

from scripted import played, things

TOOLS = '''
import threading
third = threading.Event()

def fast(number: int) -> str:
    """Answers at once.

    Args:
        number: of the call
    """
    if number == 2:
        third.set()
    return "done"

def slow(number: int) -> str:
    """Answers once the other tool was called a third time.

    Args:
        number: of the call
    """
    return "done" if third.wait(20) else "nobody called"
'''


def test_a_request_is_not_held_back_or_lost_by_a_tool_of_another_trajectory(tmp_path: Path) -> None:
    def say(sample: int, number: int) -> str:
        called = f'{{"name": "{"slow" if sample else "fast"}", "arguments": {{"number": {number}}}}}'
        return "end" if number == 3 else f"<tool_call>\n{called}\n</tool_call>"

    file = things(tmp_path, TOOLS)
    found = played(say, samples=2, order="free", playback=True, tools=[f"{file}:fast", f"{file}:slow"])
    assert [len(t.turns) for t in found.trajectories] == [4, 4]
    assert not any("nobody called" in str(t.messages) for t in found.trajectories)
    assert [request.noise.sample for request in found.engine.requests][2:4] == [0, 0]
