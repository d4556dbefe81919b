"""Tools and environments in processes: what hangs or dies costs its own trajectory, and the others are rebuilt."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from hybridflow.agents.processes import CallRaised, HostPool, ProcessDied
from hybridflow.agents.world import CallTimeout

from children import children, left_of

FILE = """
import os, sys, time

def add(a, b):
    return a + b

def act(how):
    if how == "hangs":
        time.sleep(600)
    if how == "raises":
        raise ValueError("no such thing")
    if how == "exits":
        sys.exit(3)
    if how == "dies":
        os._exit(7)
    if how == "is killed":
        os.kill(os.getpid(), 9)
    if how == "is large":
        return "x" * 10_000_000
    print("printed")
    return how

async def later(value):
    return value

class Counter:
    def __init__(self, start=0):
        self.count = start
    def step(self, by, how="returns"):
        act(how)
        self.count += by
        return self.count
    def close(self):
        pass
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "things.py"
    path.write_text(FILE)
    return str(path)


def run(pool: HostPool, coroutine: Coroutine[Any, Any, Any]) -> Any:
    async def go() -> Any:
        try:
            return await coroutine
        finally:
            pool.close()

    return asyncio.run(go())


def test_a_call_that_hangs_raises_dies_or_prints_fails_alone(file: str, capfd: pytest.CaptureFixture[str]) -> None:
    pool = HostPool(1, 1.0)

    async def told(how: str) -> Any:
        try:
            return await pool.function(f"{file}:act", {"how": how})
        except (CallTimeout, CallRaised, ProcessDied) as error:
            return f"{type(error).__name__}: {error}"

    async def all_of_them() -> list[Any]:
        first = await pool.function(f"{file}:add", {"a": 1, "b": 2})
        said = [await told(how) for how in ("raises", "exits", "dies", "is killed", "hangs", "prints")]
        large = await told("is large")
        return [first, *said, len(large), await pool.function(f"{file}:later", {"value": 5})]

    first, raises, exits, dies, killed, hangs, prints, large, later = run(pool, all_of_them())
    assert (first, prints, large, later) == (3, "prints", 10_000_000, 5)
    assert raises == "CallRaised: ValueError: no such thing"
    assert exits == "CallRaised: SystemExit: 3"
    assert dies.startswith("ProcessDied") and "ended with exit code 7" in dies
    assert killed.startswith("ProcessDied") and "SIGKILL" in killed
    assert hangs.startswith("CallTimeout") and "took longer than 1 seconds" in hangs
    out, error = capfd.readouterr()
    assert out == "" and "printed" in error


def test_objects_of_other_trajectories_are_rebuilt(file: str) -> None:
    pool = HostPool(1, 1.0)

    async def go() -> list[Any]:
        a, b = (pool.object(f"{file}:Counter", {"start": start}) for start in (0, 100))
        found = [await a.call("step", 1), await b.call("step", 1), await a.call("step", 2)]
        with pytest.raises(ProcessDied):
            await b.call("step", 1, how="dies")
        found.append(await a.call("step", 4))
        found.append(await b.call("step", 1))  # made again, without the call that ended it
        await a.close()
        await b.close()
        return found

    assert run(pool, go()) == [1, 101, 3, 7, 102]


def test_calls_wait_for_their_turn_without_losing_their_time(file: str) -> None:
    pool = HostPool(1, 1.0)

    async def go() -> list[Any]:
        held = [pool.object(f"{file}:Counter", {}) for _ in range(2)]
        await held[0].call("step", 0)
        hang, other = asyncio.create_task(held[0].call("step", 1, how="hangs")), held[1].call("step", 1)
        assert await other == 1
        with pytest.raises(CallTimeout):
            await hang
        return []

    began = time.monotonic()
    run(pool, go())
    assert time.monotonic() - began < 30


def test_nothing_is_left_of_the_processes(file: str) -> None:
    pool, before = HostPool(2, 30.0), children()

    async def go() -> set[int]:
        await asyncio.gather(*(pool.function(f"{file}:add", {"a": i, "b": i}) for i in range(4)))
        hang = asyncio.create_task(pool.function(f"{file}:act", {"how": "hangs"}))
        await asyncio.sleep(0.2)
        pids = children() - before
        hang.cancel()
        return pids

    pids = run(pool, go())
    assert len(pids) == 2 and os.getpid() not in pids
    assert left_of(pids) == set()
