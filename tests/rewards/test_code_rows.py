"""Rows of the reward `code`: which tests are refused before a program runs, and what each form of row means."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hybridflow.config.kinds.rl import RlConfig
from hybridflow.data.prompts import load_prompts
from hybridflow.errors import UserError
from hybridflow.grading.make import check_rows
from hybridflow.rewards.sandbox.open import open_sandbox
from hybridflow.rewards.sandbox.outcome import Outcome
from hybridflow.rewards.verifiable.code import score
from hybridflow.rewards.verifiable.code_cases import read_cases

SETTINGS = {"backend": "local", "seconds": 10, "parallel": 2}
CHECK = "def check(candidate):\n    assert candidate(1) == 2\n"
NEVER, NOTHING, UNUSED = "defines check and never calls it", "it asserts nothing", "uses nothing of the program"


@pytest.mark.parametrize(
    ("test", "entry", "said"),
    [
        (CHECK, None, NEVER),  # HumanEval's column as it stands
        (CHECK + "METADATA = {'f': 1}", None, NEVER),
        (CHECK + "print(check)", None, UNUSED),
        (CHECK + "check(lambda x: x + 1)", None, UNUSED),
        (CHECK + "def mine(x): return 2\ncheck(mine)", None, UNUSED),
        (CHECK + "check(g)", "f", "never calls the entry point 'f'"),
        (CHECK, "f(1)", "not the name of a function"),
        ("# assert f(1) == 2", None, NOTHING),
        ('"""assert f(1) == 2"""', None, NOTHING),
        ("", None, NOTHING),
        ("pass", None, NOTHING),
        ("import math", None, NOTHING),
        ("print('assert', f(1))", None, NOTHING),
        ("f(1)", None, NOTHING),
        ("result = f(1) == 2  # assert", None, NOTHING),
        ("assert True", None, UNUSED),
        ("assert 1 == 1, 'assert'", None, UNUSED),
        ("assert math.factorial(5) == 120", None, UNUSED),
        ("import math\nassert math.pi > 3", None, UNUSED),
        ("def f(x): return 2\nassert f(1) == 2", None, UNUSED),
        ("f = abs_ = 2\nassert f == 2", None, UNUSED),
        ("def test_f():\n    assert f(1) == 2", None, "nothing calls test_f"),
        ("class TestF:\n    def test_f(self):\n        assert f(1) == 2", None, "nothing calls test_f"),
        ("async def test_f():\n    assert f(1) == 2", None, "nothing calls test_f"),
        ("def a():\n    assert f(1)\ndef b():\n    a()", None, "nothing calls"),
        ("import numpy as np\nassert np.allclose(f(1), 2)", None, "imports 'numpy'"),
        ("import pytest\nwith pytest.raises(ValueError):\n    f(1)", None, "imports 'pytest'"),
        ("from solution import f\nassert f(1) == 2", None, "imports 'solution'"),
        ("assert (f(1) == 2, 'wrong')", None, NOTHING),
        ("assert lambda: f(1) == 2", None, NOTHING),
        ("try:\n    assert f(1) == 2\nexcept AssertionError:\n    print('failed')", None, NOTHING),
        ("try:\n    assert f(1) == 2\nexcept:\n    pass", None, NOTHING),
        (
            "for n in (1, 2):\n    try:\n        assert f(n) == n + 1\n    except Exception:\n        continue",
            None,
            NOTHING,
        ),
        ("assert f(1) = 2", None, "not Python"),
        ("assert f(1) == 2\n  assert f(2) == 3", None, "not Python"),
    ],
)
def test_a_test_that_says_nothing_of_a_program_is_refused(test: str, entry: str | None, said: str) -> None:
    for truth in ([test], {"assert_case": [test]}, ["assert f(1) == 2", test]):
        with pytest.raises(UserError, match=said):
            read_cases(truth, {"entry_point": entry})


@pytest.mark.parametrize(
    ("test", "entry"),
    [
        ("assert f(1) == 2", None),
        (CHECK + "check(f)", None),
        (CHECK + "check(f)", "f"),
        (CHECK, "f"),
        (CHECK + "for g in [f]: check(g)", None),
        (CHECK + "if __name__ == '__main__': check(f)", None),
        ("def test_f():\n    assert f(1) == 2\ntest_f()", None),
        ("class T:\n    def test(self): assert f(1) == 2\nT().test()", None),
        ("for n in range(3):\n    assert f(n) == n + 1", None),
        ("assert all(f(n) == n + 1 for n in range(3))", None),
        ("assert (lambda g: g(1) == 2)(f)", None),
        ("assert sum([1, 2], 3) == 6", None),  # a built-in may be what the program is to define
        ("try:\n    f(None)\nexcept TypeError:\n    pass\nelse:\n    raise AssertionError", None),
        ("if f(1) != 2: raise ValueError", None),
        ("try:\n    assert f(1) == 2\nexcept AssertionError:\n    print('failed')\n    raise", None),
        ("bad = []\ntry:\n    assert f(1) == 2\nexcept AssertionError:\n    bad.append(1)\nassert not bad", None),
        ("try:\n    f(None)\nexcept Exception:\n    pass\nassert f(1) == 2", None),
        ("import unittest\nunittest.TestCase().assertEqual(f(1), 2)", None),
        ("try:\n    import numpy\nexcept ImportError:\n    numpy = None\nassert f(1) == 2", None),
        ("from __future__ import annotations\nassert f(1) == 2", None),
        ("assert LIMIT == 2", None),
    ],
)
def test_a_test_that_uses_the_program_is_read(test: str, entry: str | None) -> None:
    assert len(read_cases([test], {"extra_info": {"entry_point": entry}})) == 1


SUCCESSOR = "```python\ndef f(x):\n    return x + 1\n```"


def test_humaneval_and_mbpp_rows_are_read_as_they_are_published() -> None:
    human_eval = {"task_id": "HumanEval/0", "prompt": "def f(x):\n", "test": CHECK, "entry_point": "f"}
    mbpp = {
        "test_list": ["assert math.isclose(f(1), TWO)", "assert f(-1) == 0"],
        "test_setup_code": "TWO = 2",
        "test_imports": ["import math"],
        "challenge_test_list": [],
    }
    for truth, row in (
        (human_eval, {}),
        (json.dumps(mbpp), {}),
        (CHECK, human_eval),
        ([CHECK], {"extra_info": human_eval}),
    ):
        assert score(SUCCESSOR, truth, row, sandbox=SETTINGS)["score"] == 1
        assert score(SUCCESSOR.replace("+", "-"), truth, row, sandbox=SETTINGS)["score"] == 0
    for wrong in ("", "def g(x): return x + 1", "def check(candidate): pass\ndef f(x): pass"):
        assert score(wrong, human_eval, sandbox=SETTINGS)["score"] == 0


def write_rows(folder: Path, truths: list[Any]) -> str:
    path = folder / "rows.jsonl"
    rows = ({"prompt": "write f", "data_source": "taco", "ground_truth": truth} for truth in truths)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    "reward", [{"function": "code"}, {"function": "by_source"}, {"terms": {"a": {"function": "code"}}}]
)
def test_the_row_is_named_before_a_run_begins(reward: dict[str, Any], tiny_model: Any, tmp_path: Path) -> None:
    good, bad = json.dumps(["assert f(1) == 2"]), json.dumps([CHECK])
    source = write_rows(tmp_path, [good, bad, good, bad])
    config = RlConfig.model_validate(
        {
            "model": {"path": "x"},
            "data": {"train": source},
            "reward": reward,
            "train": {"steps": 1, "prompts_per_step": 1, "samples_per_prompt": 2},
            "run": {"folder": str(tmp_path / "run")},
        }
    )
    prompts = load_prompts(source, config.data, tiny_model[1], seed=0)
    with pytest.raises(UserError, match=rf"row 1 of {source}: .*{NEVER}.*of 2 such rows it is the first") as refused:
        check_rows(config, prompts)
    assert "entry_point" in refused.value.fix
    check_rows(config, prompts, function=lambda responses: [0.0])  # which may read them as it likes


# --- what a result means ---

TYPED: dict[str, tuple[Any, dict[str, bool]]] = {
    # what is expected, of arguments that are values (APPS, TACO): what is returned, and whether it is right
    "a text is a text": ("1", {"str(x)": True, "x": False, "[str(x)]": False}),
    "a number": (1, {"x": True, "str(x)": False, "float(x)": True, "x == 1": True, "[x]": False, "None": False}),
    "a text that looks like a list": ("[1]", {"str([x])": True, "[x]": False}),
    "one wrapped value": ([1], {"x": True, "[x]": True, "(x,)": True, "{x}": False}),
    "a wrapped list": ([[1, 2]], {"[1, 2]": True, "(1, 2)": True, "[[1, 2]]": True, "[2, 1]": False}),
    "nothing": (None, {"None": True, "0": False, "''": False, "[]": False}),
    "a dict": ({"a": 1}, {
        "{'a': x}": True, "Counter('a')": True, "OrderedDict(a=1)": True, "defaultdict(int, a=1)": True,
        "{'a': 2}": False, "{}": False, "[('a', 1)]": False,
    }),
    "names of a dict": ({"1": 2}, {"{1: 2}": True, "{'1': 2}": True, "{1: 2, '1': 2}": False}),
    "a float": (0.5, {"1 / 2": True, "0.5000000001": True, "0.51": False, "Fraction(1, 2) ": True, "'0.5'": False}),
    "infinity": (float("inf"), {"float('inf')": True, "-float('inf')": False, "10 ** 400": False, "'inf'": False}),
    "no number": (float("nan"), {"float('nan')": True, "Decimal('sNaN')": False, "0.0": False, "None": False}),
    "a great number": (10**30, {"10 ** 30": True, "10 ** 30 + 1": False, "1e30": False}),
    "many digits": (7, {"10 ** 5000": False, "Decimal(7)": True, "Fraction(7)": True, "7 + 0j": True, "E.SEVEN": True}),
    "a list of two": ([1, 2], {
        "Point(1, 2)": True, "deque([1, 2])": False, "{1, 2}": False, "(y for y in (1, 2))": False,
    }),
}  # fmt: skip
MORE = """
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from decimal import Decimal
from enum import IntEnum
from fractions import Fraction
Point = namedtuple("Point", "a b")
class E(IntEnum): SEVEN = 7
"""


def returned(expression: str) -> Outcome:
    """What came of a function that returns this for 1; each is run once."""
    if expression not in RETURNED:
        RETURNED.update(zip(ALL, open_returned()))
    return RETURNED[expression]


ALL = sorted({expression for _, said in TYPED.values() for expression in said})
RETURNED: dict[str, Outcome] = {}


def open_returned() -> list[Outcome]:
    """All of them from one jail: the program's text is what it would be alone, its result is taken apart here."""
    listed = ", ".join(f"(lambda x: {expression})" for expression in ALL)
    sandbox = open_sandbox(SETTINGS)
    whole = sandbox.call(f"{MORE}\ndef f(x): return [g(x) for g in [{listed}]]", "f", [1])
    assert whole.status == "ok" and whole.result is not None
    results = json.loads(whole.result)["value"]
    assert len(results) == len(ALL)
    return [Outcome("ok", result=json.dumps({"value": result})) for result in results]


@pytest.mark.parametrize("name", TYPED)
def test_what_a_result_means_where_arguments_are_values(name: str) -> None:
    expected, said = TYPED[name]
    (case,) = read_cases({"fn_name": "f", "inputs": [[1]], "outputs": [expected]})
    assert {expression: case.right(returned(expression)) for expression in said} == said


@pytest.mark.parametrize(
    ("expected", "said"),
    [
        ("1", {"x": True, "str(x)": False, "[x]": False}),
        ('"1"', {"x": False, "str(x)": True}),
        ("[1]", {"[x]": True, "x": False, "(x,)": True, "str([x])": False}),
        ("[1, 2]", {"[1, 2]": True, "(1, 2)": True, "[2, 1]": False}),
        ("null", {"None": True, "0": False}),
        ("NaN", {"float('nan')": True}),
        ('{"a": 1}', {"Counter('a')": True, "{'a': 2}": False}),
        ("not json", {"x": False, "str(x)": False}),
    ],
)
def test_what_a_result_means_where_arguments_are_json(expected: str, said: dict[str, bool]) -> None:
    """As LiveCodeBench and verl have rows; nothing is wrapped in them."""
    (case,) = read_cases(json.dumps({"fn_name": "f", "inputs": ["1"], "outputs": [expected]}))
    assert {expression: case.right(returned(expression)) for expression in said} == said


def test_forms_of_cases_may_stand_beside_each_other_in_a_list() -> None:
    both = [{"input": "1", "output": "2"}, "assert f(1) == 2"]
    program = "def f(x): return x + 1\nif __name__ == '__main__': print(f(int(input())))"
    assert score(program, both, sandbox=SETTINGS)["score"] == 1
    assert score(program.replace("+", "-"), both, sandbox=SETTINGS)["score"] == 0


def test_a_list_of_one_value_is_a_list_where_another_result_has_more() -> None:
    first, _ = read_cases({"fn_name": "f", "inputs": [[1], [2]], "outputs": [[1], [1, 2]]})
    assert first.right(returned("[x]")) and not first.right(returned("x"))


def test_what_is_no_value_of_json_is_named_in_the_score() -> None:
    truth = {"fn_name": "f", "inputs": [[1]], "outputs": [[1, 2]]}
    for expression, named in (("{1, 2}", 1), ("object()", 1), ("iter([1, 2])", 1), ("[2, 1]", 0), ("Point(1, 2)", 0)):
        given = score(f"{MORE}def f(x): return {expression}", truth, sandbox=SETTINGS)
        assert given["not_plain"] == named and given["score"] == (expression == "Point(1, 2)"), expression


def test_none_as_input_sends_nothing() -> None:
    silent = "import sys\nprint(repr(sys.stdin.read()))"
    for given in (None, "", []):
        assert score(silent, {"inputs": [given], "outputs": ["''"]}, sandbox=SETTINGS)["score"] == 1
    called = {"fn_name": "f", "inputs": [None], "outputs": [3]}
    assert score("def f(*xs): return 3 + len(xs)", called, sandbox=SETTINGS)["score"] == 1


@pytest.mark.parametrize(
    ("truth", "said"),
    [
        ({"inputs": ["1"], "outputs": [""]}, "a program that does nothing would pass"),
        ({"inputs": ["1", "2"], "outputs": [None, " \n"]}, "a program that does nothing would pass"),
        ([{"input": "1", "output": ""}], "a program that does nothing would pass"),
        ({"fn_name": "f", "inputs": [5], "outputs": [6]}, "arguments of f are 5, not a list"),
        ({"fn_name": "f", "inputs": [{"x": 5}], "outputs": [6]}, "not a list"),
        ({"fn_name": "f", "inputs": ["a b"], "outputs": ["6"]}, "are not JSON"),
        ({"inputs": [], "outputs": []}, "no test cases in it"),
        ({"assert_case": []}, "no test cases in it"),
        ({"test_list": []}, "no test cases in it"),
    ],
)
def test_cases_that_say_nothing_are_refused(truth: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_cases(truth)
