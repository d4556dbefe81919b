"""The reward of programs, from an answer and a row's test cases to a number."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from hybridflow.errors import UserError
from hybridflow.rewards.verifiable.code import extract, score
from hybridflow.rewards.verifiable.code_cases import same_output, same_value
from hybridflow.rewards.verifiable.registry import CHECKS, builtin

SETTINGS = {"backend": "local", "seconds": 10, "parallel": 2}
SQUARES = {"inputs": ["3\n", "4\n", "-5\n"], "outputs": ["9\n", "16\n", "25\n"]}
TWO_SUM = {
    "fn_name": "twoSum",
    "inputs": [[[2, 7, 11, 15], 9], [[3, 2, 4], 6], [[3, 3], 6]],
    "outputs": [[0, 1], [1, 2], [0, 1]],
}
TWO_SUM_PROGRAM = """Use a table of what was seen.

```python
class Solution:
    def twoSum(self, nums: List[int], target: int) -> List[int]:
        seen = defaultdict(int)
        for i, n in enumerate(nums):
            if target - n in seen:
                return (seen[target - n], i)
            seen[n] = i
```
"""
HUMAN_EVAL = """
METADATA = {'author': 'x'}
import random

def check(candidate):
    assert candidate([1, 2, 3]) == 6
    for _ in range(3):
        n = random.randint(1, 9)
        assert candidate([n] * 3) == 3 * n, "three times"
    try:
        candidate("abc")
        assert False
    except TypeError:
        pass

check(total)
"""


def give(program: str, truth: Any, **options: Any) -> dict[str, float]:
    return score(program, truth, sandbox=SETTINGS | options.pop("sandbox", {}), **options)


def test_programs_that_read_and_write() -> None:
    truth = json.dumps(SQUARES)
    assert give("```python\nprint(int(input()) ** 2)\n```", truth) == {
        "score": 1,
        "passed": 1,
        "timeouts": 0,
        "not_plain": 0,
    }
    assert give("print(int(input()) * 3)", truth) == {"score": 0, "passed": 1 / 3, "timeouts": 0, "not_plain": 0}
    assert give("print(abs(int(input())) * 4)", truth)["passed"] == 0  # right for 4 only, and 3 comes first
    assert give("print(abs(int(input())) * 4)", truth, partial=True)["score"] == pytest.approx(1 / 3)
    assert give("this is no program", truth) == {"score": 0, "passed": 0, "timeouts": 0, "not_plain": 0}
    assert give("print(int(input()) ** 2); raise SystemExit(3)", truth)["score"] == 0
    assert give("print(int(input()) ** 2)\nexit()", truth)["score"] == 1
    assert give("import sys\nfor line in sys.stdin: print(int(line) ** 2)", truth)["score"] == 1
    assert give("if __name__ == '__main__':\n    print(int(open(0).read()) ** 2)", truth)["score"] == 1


def test_a_program_that_is_slow_for_one_case_costs_one_time_limit() -> None:
    slow = "n = int(input())\nwhile n == 4: pass\nprint(n * n)"
    given = give(slow, SQUARES, partial=True, sandbox={"seconds": 1})
    assert given == {"score": pytest.approx(1 / 3), "passed": pytest.approx(1 / 3), "timeouts": 1, "not_plain": 0}
    one_by_one = give(slow, SQUARES, partial=True, sandbox={"seconds": 1, "parallel": 1})
    assert one_by_one == given


def test_functions_that_are_called() -> None:
    assert give(TWO_SUM_PROGRAM, TWO_SUM) == {"score": 1, "passed": 1, "timeouts": 0, "not_plain": 0}
    assert give(TWO_SUM_PROGRAM.replace("return (", "return (1 + "), TWO_SUM)["score"] == 0
    assert give("def other(): pass", TWO_SUM)["score"] == 0
    plain = {"fn_name": "f", "inputs": ["[1, 2]\n3", '"a"\n2'], "outputs": ["6", '"aa"']}
    assert give("def f(x, n): return sum(x) * 2 if n == 3 else x * n", plain)["score"] == 1
    apps = {"fn_name": "f", "inputs": [["ab"]], "outputs": [["ba"]]}  # APPS wraps a result in a list
    assert give("print('noise')\ndef f(s): return s[::-1]", apps)["score"] == 1
    kinds = {"fn_name": "f", "inputs": [[1]], "outputs": [{"1": [0.3, None, True, "\u00e9"]}]}
    assert give("def f(x): return {x: (0.1 + 0.2, None, x == 1, '\\u00e9')}", kinds)["score"] == 1


def test_assert_statements() -> None:
    tests = ["assert f(2) == {4}", "assert f(3) == {9}", "assert isinstance(f(1), set) and len(f(0)) == 1"]
    assert give("def f(x): return {x * x}", tests) == {"score": 1, "passed": 1, "timeouts": 0, "not_plain": 0}
    assert give("def f(x): return {x + x}", {"assert_case": tests}, partial=True)["score"] == pytest.approx(2 / 3)
    assert give("def total(xs): return sum(xs)", HUMAN_EVAL)["score"] == 1
    assert give("def total(xs): return len(xs) * xs[0]", HUMAN_EVAL)["score"] == 0
    hangs = give("def total(xs):\n    while True: pass", HUMAN_EVAL, sandbox={"seconds": 1})
    assert hangs == {"score": 0, "passed": 0, "timeouts": 1, "not_plain": 0}


def test_objects_with_a_state() -> None:
    test = "c = Counter_(5)\nc.add(3)\nc.add(n=4)\nassert c.value() == 12\nassert Counter_(1).value() == 1"
    program = """
class Counter_:
    def __init__(self, start): self.n = start
    def add(self, n): self.n += n
    def value(self): return self.n
"""
    assert give(program, [test])["score"] == 1
    assert give(program.replace("+=", "-="), [test])["score"] == 0


def test_forty_at_once_each_get_their_own_score() -> None:
    programs = {
        "right": ("print(int(input()) ** 2)", 1.0, 1.0),
        "wrong": ("print(int(input()) ** 2 + 1)", 0.0, 0.0),
        "partly": ("n = int(input())\nprint(n * n if n > 0 else 0)", 0.0, 2 / 3),
        "crash": ("import ctypes\nctypes.string_at(0)", 0.0, 0.0),
    }
    work = [(name, i) for i in range(10) for name in programs]
    with ThreadPoolExecutor(40) as threads:
        given = list(threads.map(lambda w: give(programs[w[0]][0], SQUARES, sandbox={"parallel": 4}), work))
    for (name, _), got in zip(work, given):
        assert (got["score"], got["passed"]) == (programs[name][1], pytest.approx(programs[name][2])), name
    assert len(os.listdir("/proc/self/fd")) < 100


def test_equal_programs_have_equal_outcomes() -> None:
    truth = {"inputs": [""], "outputs": [give_order()]}
    assert all(give("print(*{'ab', 'cd', 'ef', 'gh', 'ij'})", truth)["score"] == 1 for _ in range(3))


def give_order() -> str:
    from hybridflow.rewards.sandbox.open import open_sandbox

    return open_sandbox(SETTINGS).run("print(*{'ab', 'cd', 'ef', 'gh', 'ij'})", "").stdout


def test_which_block_is_the_program() -> None:
    assert extract("```python\na\n```\n```Python3\nb\n```\n```text\nc\n```") == "b\n"
    assert extract("```\na\n```\nor\n```\nb\n```") == "b\n"
    assert extract("no block") == "no block"
    assert extract("```python\nprint('''\n```py''')") == "print('''\n"  # a fence at the head of a line ends it


def test_outputs_are_compared_by_tokens() -> None:
    assert same_output("1\t2 \n\n3", "1 2\n3\n") and not same_output("1 2", "12")
    assert same_output("0.500000001", "0.5") and same_output("5e-1", "0.5") and not same_output("0.51", "0.5")
    assert not same_output("10000000000000001", "10000000000000000") and not same_output("nan", "nan0")
    assert same_value([1, [2.0000000001]], [1, [2.0]]) and not same_value(float("nan"), 1.0)
    assert not same_value(10**400, 1.5) and not same_value({"a": 1}, {"a": 1, "b": 2})


@pytest.mark.parametrize(
    ("truth", "said"),
    [
        ("no tests here", "finds no test cases"),
        (None, "finds no test cases"),
        ({"inputs": ["1"], "outputs": []}, "1 inputs and 0 outputs"),
        ([], "no test cases in it"),
        ([{"in": 1}], "finds no test case in"),
        (["print(1)"], "finds no test case in"),
    ],
)
def test_a_ground_truth_without_tests_is_refused(truth: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        score("print(1)", truth, sandbox=SETTINGS)


def test_the_reward_is_known_by_its_name_and_checked_at_start() -> None:
    assert builtin("code") is score
    CHECKS["code"]({"sandbox": SETTINGS})
