"""Trajectories that go on as things come: no request waits for another trajectory's tool, and none is lost."""

from __future__ import annotations

from pathlib import Path

from scripted import played, things

TOOLS = '''

def wait(seconds: float) -> str:
    """Waits.

    Args:
        seconds: how long
    """
    time.sleep(seconds)
    return "done"
'''


def call(seconds: float) -> str:
    return f'<tool_call>\n{{"name": "wait", "arguments": {{"seconds": {seconds}}}}}\n</tool_call>'


def test_a_request_is_not_held_back_or_lost_by_a_tool_of_another_trajectory(tmp_path: Path) -> None:
    def say(sample: int, number: int) -> str:
        return "end" if number == 3 else call(0.3 if sample else 0.01)

    found = played(say, samples=2, order="free", playback=True, tools=[f"{things(tmp_path, TOOLS)}:wait"])
    assert [len(t.sequences[0].turns) for t in found.trajectories] == [4, 4]
    order = [request.noise.sample for request in found.engine.requests]
    assert order[2:5] == [0, 0, 0] and order[5:] == [1, 1, 1]  # the first ends while the other's first call runs
