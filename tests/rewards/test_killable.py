"""A call in a process that can be killed: what it returns, what it may not do, and that the next call goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from hybridflow.rewards.verifiable.killable import Undecided, call


def test_a_call_has_the_value_of_the_function() -> None:
    assert call("math:gcd", 12, 18) == 6
    assert call("os.path:basename", "a/" + "b" * 10**6) == "b" * 10**6
    assert call("os:getpid") != os.getpid()
    assert call("os:getpid") == call("os:getpid")


@pytest.mark.parametrize(
    ("function", "arguments", "why"),
    [
        ("re:fullmatch", ["(a+)+b", "a" * 60], "more than 0.2 seconds of CPU time"),
        ("operator:mul", ["a", 4 << 30], "MemoryError"),
        ("os:_exit", [3], "its process ended with code 3"),
        ("os:abort", [], "its process ended with code -6"),
        ("builtins:print", ["what is called may print"], ""),
    ],
)
def test_what_comes_to_no_end_is_undecided_and_the_next_call_goes_on(
    function: str, arguments: list[object], why: str
) -> None:
    if why:
        with pytest.raises(Undecided, match=why):
            call(function, *arguments, seconds=0.2)
    else:
        assert call(function, *arguments) is None
    assert call("math:gcd", 12, 18) == 6


def test_what_sleeps_is_given_up_by_the_clock() -> None:
    with pytest.raises(Undecided, match="more than 1 seconds"):
        call("time:sleep", 100, seconds=0.05)
    assert call("math:gcd", 12, 18) == 6


def test_a_mistake_is_told_apart_from_a_limit() -> None:
    with pytest.raises(RuntimeError, match=r"math:sqrt raised ValueError: math domain error"):
        call("math:sqrt", -1)
    with pytest.raises(ImportError, match="no attribute 'nope'"):
        call("math:nope")
    with pytest.raises(ImportError, match="No module named 'nowhere'"):
        call("nowhere:nope")


def test_a_child_that_was_killed_is_replaced() -> None:
    os.kill(call("os:getpid"), signal.SIGKILL)
    for _ in range(100):
        try:
            assert call("math:gcd", 12, 18) == 6
            break
        except Undecided:  # the kill may arrive in the middle of a call
            time.sleep(0.01)
    else:
        pytest.fail("no new child")


def test_threads_take_turns() -> None:
    found: list[int] = []
    threads = [threading.Thread(target=lambda n=n: found.append(call("operator:add", n, 1))) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == list(range(1, 21))


def test_a_fork_has_a_child_of_its_own() -> None:
    mine = call("os:getpid")
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(write, str(call("os:getpid")).encode())
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    theirs = int(os.read(read, 100))
    os.close(read)
    os.close(write)
    assert theirs != mine == call("os:getpid")


def test_no_child_is_left_behind_when_its_process_is_killed() -> None:
    program = """
import time
from hybridflow.rewards.verifiable.killable import call
print(call("os:getpid"), flush=True)
time.sleep(99)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        os.kill(child, 0)
        parent.kill()
    for _ in range(1000):
        try:
            with open(f"/proc/{child}/stat", encoding="ascii") as stat:
                if stat.read().rpartition(")")[2].split()[0] == "Z":  # where nobody reaps
                    return
        except FileNotFoundError:
            return
        time.sleep(0.01)
    pytest.fail(f"process {child} is still there")
