"""Known right and wrong programs for the reward `code`: the ways to get a point without solving the task.

Wrong are programs that are empty or define nothing, that print or return what another case expects, that redefine what
tests compare with, and that leave undefined what a test's own jail may define.
"""

from __future__ import annotations

from typing import Any

from hybridflow.rewards.audit.audit import CaseSet
from hybridflow.rewards.audit.mutations import KnownCase

_DOUBLE = "n = int(input())\nprint(2 * n)"
_AREA = "def area(a, b):\n    return a * b"
_LCM = "import math\n\ndef lcm(a, b):\n    return a * b // math.gcd(a, b)"
_COUNTED = "from collections import Counter\n\ndef counted(text):\n    return Counter(text)"
_LARGEST = "def largest(values):\n    return max(values)"

# Programs that define nothing of what is asked for, or that decide how it is compared: wrong for every row.
_DECIDE = ("abs", "len", "max", "min", "round", "set", "sorted", "str", "sum")
_SHADOWS = "\n".join(f"def {name}(*given): return 0" for name in _DECIDE)
_CLAIMS = "print('passed')\nprint('All tests passed!')"
_ALIASES = "AssertionError = Exception = BaseException"
_EQUAL_TO_ALL = """
class Right(int):
    def __eq__(self, other):
        return True
    def __ne__(self, other):
        return False
    def __sub__(self, other):
        return self
    def __abs__(self):
        return 0

area = largest = lcm = counted = check = lambda *given: Right()
print(Right())
"""


def _program(question: str, truth: Any, program: str, *wrong: str) -> KnownCase:
    return KnownCase(
        question,
        truth,
        fenced(program, "python"),
        right_responses=(
            fenced(program, ""),
            fenced(f"# right\n{program}\n", "py"),
            f"{fenced('1/0', 'python')}{fenced(program, 'python')}",
        ),
        wrong_responses=tuple(
            fenced(text, "python")
            for text in (
                *wrong,
                "",
                "pass",
                "# nothing here",
                "import math, collections, itertools",
                "answer = 42",
                "def another(*given):\n    return None",
                "class Another:\n    pass",
                _CLAIMS,
                _SHADOWS,
                _ALIASES,
                "raise SystemExit(0)",
                "import os\nos._exit(0)",
                "syntax error here",
                program + "\n1/0",
                "print(open('/proc/self/cmdline').read())",
                "while True: pass",
                "import sys\nsys.stdout.write('x' * 10**8)",
                _EQUAL_TO_ALL,
            )
        ),
    )


def fenced(text: str, language: str = "python") -> str:
    """Returns a program in a fenced block, as a response has it."""
    return f"Here it is:\n\n```{language}\n{text}\n```\n"


PROGRAMS = CaseSet(
    (
        _program(
            "Read a number, print its double.",
            {"inputs": ["2\n", "-7\n", "0\n"], "outputs": ["4\n", "-14\n", "0\n"]},
            _DOUBLE,
            "print(4)",
            "print('4 -14 0')",
            "print(4)\nprint(-14)\nprint(0)",
            "n = int(input())\nprint(n * n)",
            "n = int(input())\nprint(2 * n)\nprint(2 * n)",
        ),
        _program(
            "Write area(a, b) of a rectangle.",
            {"inputs": [[2, 3], [5, 1]], "outputs": [6, 5], "fn_name": "area"},
            _AREA,
            "def area(a, b):\n    return a + b",
            "def area(a, b):\n    return [6, 5]",
            "def area(a, b):\n    print(a * b)",
            "area = 6",
            "def area(a, b):\n    return str(a * b)",
            "def area(a, b):\n    return {a * b}",
            "class area:\n    def __init__(self, a, b):\n        self.value = a * b",
            "def area(a, b):\n    return 6",
            f"{_SHADOWS}\ndef area(a, b):\n    return 0",
        ),
        _program(
            "Write largest(values).",
            ["assert largest([1, 9, 3]) == 9", "assert largest([-5]) == -5"],
            _LARGEST,
            "def largest(values):\n    return values[-1]",
            "def largest(values):\n    raise SystemExit(0)",
            "def largest(values):\n    return True",
            "def largest(values):\n    return [max(values)]",
            "def largest(values):\n    raise AssertionError",
            f"{_SHADOWS}\ndef largest(values):\n    return 0",
            f"{_ALIASES}\ndef largest(values):\n    return 0",
        ),
        _program(
            "Write lcm(a, b), the least common multiple.",  # which the standard library has as well
            {"test_list": ["assert lcm(4, 6) == 12", "assert lcm(3, 5) == 15"], "test_imports": ["import math"]},
            _LCM,
            "def lcm(a, b):\n    return 0",
            "def lcm(a, b):\n    return a * b",
            "def gcd(a, b):\n    return 12",
            "def solve(a, b):\n    return lcm(a, b)",
            "lcm = None",
        ),
        _program(
            "Write counted(text): how often each letter is there.",
            {
                "test": "def check(candidate):\n    assert candidate('aab') == {'a': 2, 'b': 1}\n"
                "    assert abs(candidate('abc')['c'] - 1) < 1e-9\n",
                "entry_point": "counted",
            },
            _COUNTED,
            "def counted(text):\n    return {'a': 2, 'b': 1, 'c': 1}",
            "def counted(text):\n    return set(text)",
            "def check(candidate):\n    pass",
            "def check(candidate):\n    pass\ndef counted(text):\n    return {}",
            f"{_SHADOWS}\ndef counted(text):\n    return {{'a': 2, 'b': 1, 'c': 7}}",
        ),
    ),
    ("text",),
)
