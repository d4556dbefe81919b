"""The pool, with real processes: what a reward does to one answer stays with that answer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hybridflow.config.sections.rewards import RewardPoolSection
from hybridflow.errors import UserError
from hybridflow.protocols.rewards import Answers, Score
from hybridflow.rewards.graders.function import FunctionSpec
from hybridflow.rewards.graders.in_process import InProcessGrader
from hybridflow.rewards.pool.grader import ProcessGrader
from hybridflow.rewards.pool.process import PoolProcess

from at_once import at_once
from children import children, left_of

FILE = '''
"""Rewards that do what their answer says."""
import asyncio, json, os, sys, threading, time

def number(response):
    return float(response)

def act(response, **more):
    word, _, rest = response.partition(" ")
    if word == "hang":
        time.sleep(float(rest))
    elif word == "spin":
        until = time.monotonic() + float(rest)
        while time.monotonic() < until:
            pass
    elif word == "exit":
        os._exit(int(rest))
    elif word == "segfault":
        import ctypes
        ctypes.string_at(0)
    elif word == "memory":
        return len(bytearray(int(rest) << 20))
    elif word == "print":
        for _ in range(int(rest)):
            print("x" * 1000)
            sys.stderr.write("y" * 1000)
    elif word == "fork":
        if os.fork() == 0 and rest == "exit":
            os._exit(3)
    elif word == "threads":
        for _ in range(3):
            threading.Thread(target=time.sleep, args=(60,)).start()
    elif word == "cd":
        os.chdir("/")
    elif word == "read":
        return len(sys.stdin.read()) + len(os.read(0, 10))
    elif word == "stdout":
        os.write(1, b"garbage" * 100)
    elif word == "close":
        os.closerange(3, 4096)
    elif word == "pid":
        return os.getpid()
    elif word == "child":
        import subprocess
        subprocess.Popen(["sleep", "600"])
    elif word == "log":
        with open(rest, "a") as file:
            file.write("scored\\n")
    elif word == "once":
        if not os.path.exists(rest):
            open(rest, "w").close()
            os._exit(1)
    return 1.0

def group(responses):
    if "hang" in responses:
        time.sleep(60)
    return [len(responses)] * len(responses)

async def later(response):
    word, _, rest = response.partition(" ")
    if word == "block":
        time.sleep(float(rest))
    elif word == "exit":
        os._exit(1)
    elif word == "raise":
        raise ValueError(rest)
    elif word == "cancelled":
        raise asyncio.CancelledError
    else:
        await asyncio.sleep(float(rest))
    return 1.0

inside = most = 0

async def crowd(response):
    global inside, most
    inside += 1
    most = max(most, inside)
    await asyncio.sleep(0.2)
    inside -= 1
    return most

def garbage(response):
    plan = json.loads(response)
    if plan[0] == "raise":
        raise [ValueError, KeyError, MemoryError, SystemExit, RuntimeError][plan[1] % 5](plan[2])
    if plan[0] == "object":
        return object
    return plan[1]

def garbage_group(responses):
    plan = json.loads(responses[0])
    if plan[0] == "raise":
        raise ValueError(plan[2])
    return [garbage(r) for r in responses] if plan[0] == "value" else plan[1]
'''


def answers(*responses: str) -> Answers:
    return Answers(list(responses), "4", [{"role": "user", "content": "2+2="}], {"ground_truth": "4"})


def drain(grader: Any) -> dict[int, list[Score]]:
    """All that was submitted; fails where something comes twice."""
    found: dict[int, list[Score]] = {}
    while came := grader.wait():
        for key, scores in came:
            assert key not in found
            found[key] = scores
    return found


Make = Callable[..., ProcessGrader]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Graders of functions in a file; none may leave a process behind."""
    (tmp_path / "mine.py").write_text(FILE)
    graders: list[ProcessGrader] = []
    before = children()

    def made(*names: str, kwargs: Mapping[str, Any] | None = None, **pool: Any) -> ProcessGrader:
        functions = {n: FunctionSpec(f"{tmp_path}/mine.py:{n}", kwargs or {}) for n in names or ("act",)}
        graders.append(ProcessGrader(functions, RewardPoolSection(**pool)))
        return graders[-1]

    yield made
    began = children() - before
    for grader in graders:
        grader.close()
        grader.close()
    assert not left_of(began, 5.0)


def test_thousands_of_answers_are_scored_each_once(make: Make) -> None:
    grader = make("number", processes=2)
    for key in range(400):
        grader.submit(key, answers(*(str(key * 8 + i) for i in range(8))))
    found = drain(grader)
    assert found == {key: [Score(float(key * 8 + i)) for i in range(8)] for key in range(400)}
    assert grader.wait() == [] and grader.ready() == []
    grader.submit(7, answers())
    assert grader.wait() == [(7, [])]


def scores_come_while_others_are_computed(make: Make) -> None:
    grader = make(processes=2)
    grader.submit(0, answers("hang 3"))
    grader.submit(1, answers("fine"))
    began = time.monotonic()
    assert grader.wait() == [(1, [Score(1.0)])]
    assert time.monotonic() - began < 2.5
    assert grader.ready() == []
    assert grader.wait() == [(0, [Score(1.0)])]


def what_hangs_delays_only_its_own_row(make: Make) -> None:
    grader = make(processes=1, timeout=30)
    for key in range(100):
        grader.submit(key, answers("fine", "hang 30" if key == 50 else "fine"))
    began, found = time.monotonic(), {}
    while len(found) < 99:
        found.update(grader.wait())
    assert time.monotonic() - began < 10  # it is 1 or 2: one is passed over after a second
    assert set(range(100)) - found.keys() == {50}
    assert all(scores == [Score(1.0)] * 2 for scores in found.values())


def a_call_that_has_had_its_time_ends_alone(make: Make) -> None:
    grader = make(processes=1, timeout=0.6)
    grader.submit(0, answers("fine", "hang 60", "fine", "spin 60"))
    grader.submit(1, answers("fine"))
    began = time.monotonic()
    found = drain(grader)
    assert time.monotonic() - began < 10
    assert [s.kind for s in found[0]] == ["", "timeout", "", "timeout"] and found[1] == [Score(1.0)]
    failure = found[0][1].failure
    assert failure is not None and failure.what.endswith("mine.py:act took longer than 0.6 s")
    assert failure.scoring == "'hang 60' against '4'"


def of_a_function_for_groups_the_group_has_its_time(make: Make) -> None:
    grader = make("group", processes=1, timeout=0.5)
    for key in range(3):
        grader.submit(key, answers("a", "hang" if key == 1 else "b", "c"))
    found = drain(grader)
    assert found[0] == found[2] == [Score(3.0)] * 3
    assert [s.kind for s in found[1]] == ["timeout"] * 3 and "scoring 3 responses" in str(found[1][0].failure)


@pytest.mark.parametrize(
    ("does", "how"), [("exit 0", "exit code 0"), ("exit 7", "exit code 7"), ("segfault", "SIGSEGV")]
)
def test_a_call_that_ends_its_process_is_the_only_one_lost(make: Make, does: str, how: str) -> None:
    grader = make(processes=1)
    for key in range(10):
        grader.submit(key, answers("fine", does if key == 4 else "fine", "fine"))
    found = drain(grader)
    lost = found[4].pop(1)
    assert lost.kind == "died" and "lost its process, which" in str(lost.failure) and how in str(lost.failure)
    assert all(score == Score(1.0) for scores in found.values() for score in scores)


def test_a_process_that_something_else_kills_loses_nothing(make: Make, tmp_path: Path) -> None:
    grader = make(processes=2)
    grader.submit(-1, answers("pid"))
    for key in range(60):
        grader.submit(key, answers("hang 0.02", "hang 0.02"))
    found: dict[int, list[Score]] = {}
    while -1 not in found:
        found.update(grader.wait())
    killed: list[PoolProcess] = []
    while len(found) < 61:
        for key, scores in grader.wait():
            assert key not in found
            found[key] = scores
        if len(found) > 5 * (len(killed) + 1) and len(killed) < 5:
            with grader._lock:
                # A call that loses two processes has no score. Those killed at once may die one after the other on a
                # busy machine, and the second gets what the first one had: one at a time, when no call has lost any.
                processes, calls = grader._processes, [c for p in grader._processes for c in p.calls.values()]
                dying = any(p in killed for p in processes) or any(c.deaths for c in [*calls, *grader._queue])
                ready = [p for p in processes if p.ready]
                if ready and not dying:
                    killed.append(ready[len(killed) % len(ready)])
                    killed[-1].process.kill()
    assert len(killed) == 5
    del found[-1]
    assert all(scores == [Score(1.0)] * 2 for scores in found.values())

    grader.submit(0, answers(f"once {tmp_path}/flag"))  # dies the first time only
    assert drain(grader) == {0: [Score(1.0)]}


def test_a_process_that_stood_still_before_it_took_its_calls_still_answers(make: Make) -> None:
    """As on a busy machine: what it reads at last is its calls, and then that others have taken all but the first."""
    grader = make(processes=1, timeout=30)
    grader.submit(0, answers("hang 0"))
    assert drain(grader) == {0: [Score(1.0)]}
    (pid,) = _workers()
    os.kill(pid, signal.SIGSTOP)
    for key in range(1, 9):
        grader.submit(key, answers("hang 0", "hang 0"))
    found: dict[int, list[Score]] = {}
    while len(found) < 7:  # another process has taken over what waited
        found.update(grader.wait())
    os.kill(pid, signal.SIGCONT)
    began = time.monotonic()
    assert found | drain(grader) == {key: [Score(1.0)] * 2 for key in range(1, 9)}
    assert time.monotonic() - began < 20, "the call that it had was lost, and only its time limit showed it"


def _workers() -> list[int]:
    found = []
    for pid in children():
        try:
            if b"pool.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
        except OSError:
            continue
    return found


def test_memory_has_its_limit_and_the_function_hears_of_it(make: Make) -> None:
    grader = make(processes=1, memory_mb=512)
    grader.submit(0, answers("memory 100", "memory 2000", "memory 100"))
    fine, more, again = drain(grader)[0]
    assert fine.value == again.value == 100 << 20
    assert more.kind == "raised" and "raised MemoryError" in str(more.failure)


@pytest.mark.parametrize(
    "does", ["print 300", "fork", "fork exit", "threads", "cd", "read", "stdout", "child"]
)  # fmt: skip
def test_what_a_function_does_besides_does_not_disturb(make: Make, does: str) -> None:
    grader = make(processes=1, timeout=20)
    before = children()
    for key in range(3):
        grader.submit(key, answers("fine", does, "fine"))
    found = drain(grader)
    assert [s.failure for scores in found.values() for s in scores] == [None] * 9
    until = time.monotonic() + 5
    while len(_workers()) > 1 and time.monotonic() < until:  # a copy of the process that goes on would answer too
        time.sleep(0.01)
    assert len(_workers()) == 1
    started = children() - before
    grader.close()
    assert not left_of(started, 5.0)  # nor does what it started stay


def test_endless_print_has_its_time(tmp_path: Path) -> None:
    """Into a pipe that nobody reads too."""
    (tmp_path / "mine.py").write_text("def score(response):\n    while response: print('x' * 10000)\n    return 1.0\n")
    program = f"""
from hybridflow.config.sections.rewards import RewardPoolSection
from hybridflow.protocols.rewards import Answers
from hybridflow.rewards.graders.function import FunctionSpec
from hybridflow.rewards.pool.grader import ProcessGrader
grader = ProcessGrader({{"r": FunctionSpec({f"{tmp_path}/mine.py:score"!r})}}, RewardPoolSection(timeout=0.5))
grader.submit(0, Answers(["x", ""], "", [], {{}}))
print([s.kind for s in grader.wait()[0][1]])
grader.close()
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.read() == b"['timeout', '']\n"  # without a line of the function's
    process.stderr.close()
    assert process.wait() == 0


def test_a_function_that_closes_our_socket_is_the_only_one_lost(make: Make) -> None:
    grader = make(processes=1)
    grader.submit(0, answers("fine", "close", "fine"))
    assert [s.kind for s in drain(grader)[0]] == ["", "died", ""]


def async_calls_overlap_up_to_the_limit(make: Make) -> None:
    grader = make("crowd", processes=2, concurrency=32)
    for key in range(16):
        grader.submit(key, answers(*"abcdefgh"))
    began = time.monotonic()
    found = drain(grader)
    assert max(s.value for scores in found.values() for s in scores) == 32
    assert time.monotonic() - began < 10  # one after the other: 26


def async_calls_have_their_own_time(make: Make) -> None:
    grader = make("later", "number", processes=1, timeout=1)
    grader.submit(0, answers("sleep 60", "sleep 0.1", "raise no", "cancelled", "sleep 0"), "later")
    grader.submit(1, answers("2"), "number")  # in another process
    began = time.monotonic()
    found = drain(grader)
    assert time.monotonic() - began < 10
    assert [s.kind for s in found[0]] == ["timeout", "", "raised", "raised", ""] and found[1] == [Score(2.0)]


def an_async_call_that_stops_its_loop_or_process_is_the_only_one_lost(make: Make) -> None:
    for does, kind in (("block 60", "timeout"), ("exit", "died")):
        an_async_call_is_the_only_one_lost(make, does, kind)


def an_async_call_is_the_only_one_lost(make: Make, does: str, kind: str) -> None:
    grader = make("later", timeout=1, concurrency=8)
    grader.submit(0, answers("sleep 0.1", does, "sleep 0.1", "sleep 0.1"))
    grader.submit(1, answers("sleep 0.1"))
    found = drain(grader)
    assert [s.kind for s in found[0]] == ["", kind, "", ""] and found[1] == [Score(1.0)]


def test_every_call_has_its_own_time(make: Make) -> None:
    at_once(
        scores_come_while_others_are_computed,
        what_hangs_delays_only_its_own_row,
        a_call_that_has_had_its_time_ends_alone,
        of_a_function_for_groups_the_group_has_its_time,
        async_calls_have_their_own_time,
        an_async_call_that_stops_its_loop_or_process_is_the_only_one_lost,
        async_calls_overlap_up_to_the_limit,
        make=make,
    )


def test_what_is_cancelled_never_comes(make: Make) -> None:
    grader = make("act", "later", processes=1)
    for key in range(20):
        grader.submit(key, answers("hang 0.3", "hang 0.3"), "act")
        grader.submit(100 + key, answers("sleep 0.3"), "later")
    first = grader.wait()
    assert first
    grader.cancel()
    assert grader.wait() == [] and grader.ready() == []
    grader.submit(3, answers("fine"), "act")
    grader.submit(103, answers("sleep 0"), "later")
    began = time.monotonic()
    assert drain(grader) == {3: [Score(1.0)], 103: [Score(1.0)]}
    assert time.monotonic() - began < 5  # 40 calls of 0.3 s are not made


def test_closing_does_not_wait_for_calls(make: Make) -> None:
    grader = make("act", processes=2)
    for key in range(4):
        grader.submit(key, answers("hang 600"))
    while len(_workers()) < 2:
        time.sleep(0.01)
    began = time.monotonic()
    grader.close()
    assert time.monotonic() - began < 3


def test_processes_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FILE)
    program = f"""
import os, sys, time
from hybridflow.config.sections.rewards import RewardPoolSection
from hybridflow.protocols.rewards import Answers
from hybridflow.rewards.graders.function import FunctionSpec
from hybridflow.rewards.pool.grader import ProcessGrader
grader = ProcessGrader({{"r": FunctionSpec({f"{tmp_path}/mine.py:act"!r})}}, RewardPoolSection(processes=2))
for key in range(2):
    grader.submit(key, Answers(["pid"], "", [], {{}}))
for _ in range(2):
    for _, (score,) in grader.wait():
        print(int(score.value), flush=True)
for key in range(2):
    grader.submit(2 + key, Answers(["spin 600"], "", [], {{}}))
print("torch" in sys.modules, flush=True)
time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = [process.stdout.readline().strip() for _ in range(3)]
    assert said[2] == "False"  # nothing here needs torch
    time.sleep(0.2)
    process.kill()
    process.wait()
    process.stdout.close()
    assert not left_of({int(pid) for pid in said[:2]}, 5.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def score(response): return 1.0\nimport nowhere", "cannot be imported .*No module named 'nowhere'"),
        ("def scor(response): return 1.0", "has no function 'score'"),
        ("def score(answer): return 1.0", "wants 'answer'"),
        ("import os\nos._exit(5)", "a reward process ended with exit code 5 while it loaded"),
        ("import sys\nsys.exit(5)", "cannot be imported .*SystemExit: 5"),
        ("def score(response, weight): return 1.0", "wants 'weight'"),
    ],
)
def test_what_cannot_be_loaded_is_told_at_the_start(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "mine.py").write_text(text)
    grader = ProcessGrader({"r": FunctionSpec(f"{tmp_path}/mine.py:score", {})}, RewardPoolSection())
    with pytest.raises(UserError, match=message):
        grader.check()
    grader.submit(0, answers("x"))
    with pytest.raises(UserError, match=message):
        grader.wait()
    grader.close()


def test_check_loads_and_leaves_a_process_that_scores(make: Make) -> None:
    grader = make("number", processes=1)
    grader.check()
    grader.check()
    (pid,) = _workers()
    grader.submit(0, answers("3"))
    assert drain(grader) == {0: [Score(3.0)]} and _workers() == [pid]


def test_arguments_of_the_section_arrive(tmp_path: Path) -> None:
    (tmp_path / "near.py").write_text(
        "def score(response, row, weight):\n    return {'score': weight, 'n': len(row)}\n"
    )
    grader = ProcessGrader({"r": FunctionSpec(f"{tmp_path}/near.py:score", {"weight": 0.25})}, RewardPoolSection())
    grader.submit(0, answers("x"))
    assert drain(grader) == {0: [Score(0.25, {"n": 1.0})]}
    grader.close()


NUMBERS = st.one_of(st.booleans(), st.integers(-5, 5), st.floats(), st.none(), st.text(max_size=3))
VALUES = st.one_of(
    NUMBERS,
    st.lists(NUMBERS, max_size=3),
    st.dictionaries(st.sampled_from(["score", "acc", "steps"]), st.one_of(NUMBERS, st.lists(st.lists(NUMBERS)))),
)
PLANS = st.one_of(
    st.tuples(st.just("value"), VALUES),
    st.tuples(st.just("raise"), st.integers(0, 9), st.text(max_size=5)),
    st.just(("object",)),
)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ProcessGrader, InProcessGrader]]:
    path = tmp_path_factory.mktemp("garbage") / "mine.py"
    path.write_text(FILE)
    functions = {n: FunctionSpec(f"{path}:{n}") for n in ("garbage", "garbage_group")}
    graders = ProcessGrader(functions, RewardPoolSection(processes=2)), InProcessGrader(functions)
    yield graders
    for grader in graders:
        grader.close()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(PLANS, min_size=1, max_size=4), min_size=1, max_size=4))
def test_the_pool_says_what_the_function_says_in_process(
    both: tuple[ProcessGrader, InProcessGrader], plans: list[list[Any]]
) -> None:
    found = []
    for grader in both:
        for key, plan in enumerate(plans):
            for i, name in enumerate(("garbage", "garbage_group")):
                grader.submit(2 * key + i, answers(*map(json.dumps, plan)), name)
        found.append({key: repr(scores) for key, scores in drain(grader).items()})
    assert found[0] == found[1] and len(found[0]) == 2 * len(plans)


def deep() -> list[Any]:
    found: list[Any] = []
    for _ in range(100_000):
        found = [found]
    return found


class Elsewhere:
    """What a process of rewards cannot import."""


Elsewhere.__module__ = "a_module_that_is_only_here"


def test_a_row_that_no_process_can_have_is_told_by_its_column(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def score(response): return 1.0\nasync def later(response): return 1.0\n")
    sys.modules[Elsewhere.__module__] = module = ModuleType(Elsewhere.__module__)
    vars(module)["Elsewhere"] = Elsewhere
    wrong = [lambda: 1, (x for x in "ab"), {"a": [open(__file__)]}, deep(), Elsewhere]  # noqa: SIM115
    grader = ProcessGrader({"": FunctionSpec(f"{tmp_path}/mine.py:score")}, RewardPoolSection())
    try:
        for value in wrong[:-1]:
            for place, answers in [
                ("row['x y']", Answers(["a"], "1", [], {"x y": value})),
                ("the ground truth", Answers(["a"], value, [], {})),
            ]:
                with pytest.raises(UserError) as caught:
                    grader.submit(0, answers)
                assert caught.value.what.startswith(f"{place} cannot be sent to a reward process: ")
                assert "plain data" in caught.value.fix and "reward.pool.processes=0" in caught.value.fix
        grader.submit(0, Answers(["a"], "1", [], {"x": 1}))
        assert grader.wait() == [(0, [Score(1.0)])]  # it goes on
    finally:
        grader.close()
    for name in ("score", "later"):
        grader = ProcessGrader({"": FunctionSpec(f"{tmp_path}/mine.py:{name}")}, RewardPoolSection())
        try:
            grader.submit(0, Answers(["a"], "1", [], {"x": Elsewhere()}))
            with pytest.raises(UserError, match=r"cannot read the row .* No module named 'a_module_that_is_only_here'"):
                grader.wait()
        finally:
            grader.close()
    del sys.modules[Elsewhere.__module__], wrong
