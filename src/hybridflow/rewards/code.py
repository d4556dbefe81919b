"""The reward of programs: 1 if a program passes every test case, else 0; or the share that it passes.

The program runs in a sandbox (docs/sandbox.md). What is expected of it never enters the place where it runs: output and
returned values come out and are compared here; tests that are assert statements run in a jail of their own, where the
program's functions are stand-ins that send their arguments over. So a program cannot earn anything by ending early, by
changing what compares, or by looking around.

**The program** is the last fenced block that says python (or py, python3); where none does, the last fenced block;
where there is none, the whole answer.

**The ground truth**, or the JSON text of it, is one of:

- ``{"inputs": [...], "outputs": [...]}``: texts for standard input, and what must come out;
- the same with ``"fn_name"``: the arguments of each call (a list, or a text with one JSON value a line) and its result.
  A method of that name of a class ``Solution`` is called where there is no such function;
- ``[{"input": ..., "output": ...}, ...]``: as the first;
- ``["assert f(1) == 2", ...]`` or ``{"assert_case": [...]}``: tests, each on its own; a text with ``assert`` is one.

**Output** is compared token by token, where white space separates tokens; a number that is expected with a point or an
exponent may be off by 1e-6 of itself. **Results** are compared by value: tuples are lists, names of a dict are texts,
floats may be off by 1e-6 of themselves; as APPS has it, an expected list of one value may also mean that value.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from hybridflow.errors import UserError
from hybridflow.rewards.sandbox import open_sandbox
from hybridflow.rewards.sandbox.outcome import Outcome, Sandbox

TOLERANCE = 1e-6
_FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL)
_PYTHON = ("python", "py", "python3")
_FORMS = (
    'give {"inputs": [...], "outputs": [...]} (with "fn_name" for calls), [{"input": ..., "output": ...}, ...], or '
    "a list of assert statements"
)


@dataclass(frozen=True, slots=True)
class Case:
    """One test: how to run a program on it, and whether what came of it is right."""

    run: Callable[[Sandbox, str], Outcome]
    right: Callable[[Outcome], bool]


def score(
    response: str,
    ground_truth: Any,
    row: Mapping[str, Any] | None = None,
    sandbox: Mapping[str, Any] | None = None,
    partial: bool = False,
) -> dict[str, float]:
    """Runs the program in an answer against its test cases.

    Cases run in their order, `sandbox["parallel"]` at a time. Without `partial` the first one that fails ends it; with
    it, the first one that takes too long does, and what was not run counts as failed.

    Args:
        response: the answer.
        ground_truth: the test cases, see above.
        row: not used.
        sandbox: the keys of `reward.sandbox`.
        partial: whether passing some of the cases is worth their share, instead of nothing.

    Returns:
        score; passed: the share of cases that passed before the end; timeouts: how many of them took too long.

    Raises:
        UserError: the ground truth is none of the forms, or programs cannot be contained here.
        SandboxError: the sandbox failed, so that there is no score.
    """
    cases = read_cases(ground_truth)
    program = extract(response)
    where = open_sandbox(sandbox)
    passed = timeouts = done = 0
    ended = False
    with ThreadPoolExecutor(where.parallel) as threads:
        while done < len(cases) and not ended:
            batch = cases[done : done + where.parallel]
            # An outcome counts only if all before it let the run go on, so the result does not depend on `parallel`.
            for case, outcome in zip(batch, threads.map(lambda c: c.run(where, program), batch)):
                right = outcome.status == "ok" and case.right(outcome)
                passed += right
                late = outcome.status == "timeout"
                timeouts += late
                ended = late or not (right or partial)
                if ended:
                    break
            done += len(batch)
    share = passed / len(cases)
    return {"score": share if partial else float(share == 1), "passed": share, "timeouts": float(timeouts)}


def check(kwargs: Mapping[str, Any]) -> None:
    """Whether programs can be run with these arguments of the reward.

    Raises:
        UserError: they cannot.
    """
    open_sandbox(kwargs.get("sandbox"))


def extract(response: str) -> str:
    r"""The program in an answer.

    >>> extract("First:\n```python\nprint(1)\n```\nBetter:\n```python\nprint(2)\n```\nIt prints:\n```\n2\n```")
    'print(2)\n'
    >>> extract("```\nprint(1)\n```"), extract("print(1)"), extract("```python\nprint(1)")
    ('print(1)\n', 'print(1)', 'print(1)')
    """
    blocks = _FENCE.findall(response)
    named = [text for language, text in blocks if language.lower() in _PYTHON]
    return (named or [text for _, text in blocks] or [response])[-1]


# --- test cases ---


def read_cases(ground_truth: Any) -> list[Case]:
    """The test cases that a ground truth stands for, at least one.

    >>> len(read_cases('{"inputs": ["1", "2"], "outputs": ["1", "4"]}')), len(read_cases(["assert f(1) == 2"]))
    (2, 1)

    Raises:
        UserError: it is none of the forms.
    """
    given = ground_truth
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError:
            given = [given] if "assert" in given else given
    if isinstance(given, Mapping) and given.get("assert_case") is not None:
        given = _list(given["assert_case"])
    if isinstance(given, Mapping) and given.get("inputs") is not None and given.get("outputs") is not None:
        inputs, outputs, name = _list(given["inputs"]), _list(given["outputs"]), given.get("fn_name")
        if len(inputs) != len(outputs):
            raise UserError(f"the ground truth has {len(inputs)} inputs and {len(outputs)} outputs", fix=_FORMS)
        make = _stdin_case if not name else lambda i, o: _call_case(str(name), i, o)
        cases = [make(i, o) for i, o in zip(inputs, outputs)]
    elif isinstance(given, Sequence) and not isinstance(given, str):
        cases = [_listed_case(item, ground_truth) for item in given]
    else:
        raise UserError(f"the reward 'code' finds no test cases in the ground truth {_short(ground_truth)}", fix=_FORMS)
    if not cases:
        raise UserError("the ground truth of the reward 'code' has no test cases in it", fix=_FORMS)
    return cases


def _listed_case(item: Any, ground_truth: Any) -> Case:
    if isinstance(item, str) and "assert" in item:
        return _check_case(item)
    if isinstance(item, Mapping) and "input" in item and "output" in item:
        return _stdin_case(item["input"], item["output"])
    raise UserError(f"the reward 'code' finds no test case in {_short(item)}", fix=_FORMS)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:100] + "..."


def _list(value: Any) -> list[Any]:
    return [value] if isinstance(value, str) else list(value)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _stdin_case(given: Any, expected: Any) -> Case:
    wanted = _text(expected)
    return Case(lambda s, program: s.run(program, _text(given)), lambda outcome: same_output(outcome.stdout, wanted))


def _call_case(name: str, given: Any, expected: Any) -> Case:
    arguments = (
        [json.loads(line) for line in given.split("\n") if line.strip()] if isinstance(given, str) else list(given)
    )
    wanted = _loads(expected) if isinstance(expected, str) else expected
    return Case(lambda s, program: s.call(program, name, arguments), lambda outcome: _returned(outcome, wanted))


def _check_case(test: str) -> Case:
    return Case(lambda s, program: s.check(program, test), lambda outcome: True)


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:  # a text that is meant as it stands
        return text


# --- comparison ---


def same_output(said: str, expected: str) -> bool:
    r"""Whether two outputs have the same tokens.

    >>> same_output("1 2\n", " 1\n2"), same_output("0.3333333", "0.33333333"), same_output("NO", "No")
    (True, True, False)
    >>> same_output("1000000008", "1000000007"), same_output("2", "2.0"), same_output("2.0", "2"), same_output("", "1")
    (False, True, False, False)
    """
    have, want = said.split(), expected.split()
    return len(have) == len(want) and all(h == w or _close(h, w) for h, w in zip(have, want))


def _close(said: str, expected: str) -> bool:
    if not re.fullmatch(r"[+-]?(\d+\.\d*|\.\d+|\d+(\.\d*)?[eE][+-]?\d+)", expected):
        return False
    try:
        return math.isclose(float(said), float(expected), rel_tol=TOLERANCE, abs_tol=TOLERANCE * TOLERANCE)
    except ValueError:
        return False


def _returned(outcome: Outcome, expected: Any) -> bool:
    """Whether a function returned what is expected. What it returned is a text of the program's: anything at all."""
    try:
        reply = json.loads((outcome.result or "").split("\n", 1)[0])
        value = _json_like(reply["value"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return False
    if same_value(value, expected):
        return True
    return isinstance(expected, list) and len(expected) == 1 and same_value(value, expected[0])


def _json_like(value: Any) -> Any:
    """What `calls.encode` wrote, without tuples; nothing is hashed but texts."""
    if isinstance(value, list):
        return [_json_like(v) for v in value]
    if not isinstance(value, dict):
        return value
    ((tag, held),) = value.items()
    if tag == "float":
        return float(held)
    if tag == "tuple":
        return [_json_like(v) for v in held]
    if tag == "dict":
        return {k if isinstance(k, str) else str(_json_like(k)): _json_like(v) for k, v in held}
    raise ValueError(f"{tag} is not a value of JSON")


def same_value(said: Any, expected: Any) -> bool:
    """Whether two values of JSON are equal, floats within the tolerance.

    >>> same_value([1, {"a": 0.1 + 0.2}], [1, {"a": 0.3}]), same_value([1, 2], [1]), same_value("1", 1)
    (True, False, False)
    """
    if isinstance(expected, list) and isinstance(said, list):
        return len(said) == len(expected) and all(map(same_value, said, expected))
    if isinstance(expected, dict) and isinstance(said, dict):
        return said.keys() == expected.keys() and all(same_value(said[k], v) for k, v in expected.items())
    if isinstance(expected, float) and isinstance(said, float | int):
        try:
            return math.isclose(said, expected, rel_tol=TOLERANCE, abs_tol=TOLERANCE * TOLERANCE)
        except OverflowError:  # an int that no float can hold
            return False
    return bool(said == expected)
