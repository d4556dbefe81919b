"""Test cases of programs: the forms of a ground truth, and whether a program's result is right.

The ground truth, or the JSON text of it, is one of these. Each form is read as the data sets with that form mean it.

- ``{"inputs": [...], "outputs": [...]}``, or ``[{"input": ..., "output": ...}, ...]``: texts for standard input (a list
  is its lines, None is nothing), and what must come out. At least one output says something.
- the same with ``"fn_name"`` (also of a method of a class ``Solution``): the arguments of each call and its result.
    - Arguments as a **list** are values, as APPS and TACO have them, and so is the result: a text is a text. A result
      that is a list of one value may also mean that value, unless another result is a list of several or none.
    - Arguments as a **text** have one JSON value a line, as LiveCodeBench and verl have them, and the result is the
      JSON text of a value; a text that is no JSON stays a text. None is no arguments.
- ``["assert f(1) == 2", ...]``, ``{"assert_case": [...]}`` or MBPP's ``{"test_list": [...], "test_setup_code": ...}``:
  Python texts, each on its own (`code_tests` says which are refused); a text with ``assert`` is one.
- HumanEval's ``{"test": ..., "entry_point": ...}``: its ``check`` is called with that function. An ``entry_point`` may
  also be a column of the row, or of its ``extra_info``.

**Output** is compared token by token, where white space separates tokens; a number that is expected with a point or an
exponent may be off by 1e-6 of itself. **Results** are values of JSON: tuples and named ones are lists; Counter,
defaultdict and OrderedDict are dicts, names of dicts are texts; Decimal, Fraction and complex are numbers, and an Enum
of them is its number; floats may be off by 1e-6 of themselves, nan is nan. Sets, bytes, dates, generators and other
objects are no values of JSON, and so never what is expected.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any

from hybridflow.errors import UserError
from hybridflow.rewards.sandbox.outcome import Outcome, Sandbox
from hybridflow.rewards.verifiable.code_tests import whole_test

TOLERANCE = 1e-6
_FORMS = (
    'give {"inputs": [...], "outputs": [...]} (with "fn_name" for calls), [{"input": ..., "output": ...}, ...], '
    'a list of assert statements, or {"test": ..., "entry_point": ...}'
)


@dataclass(frozen=True, slots=True)
class ProgramTest:
    """One test: how to run a program on it, and whether the result is right."""

    run: Callable[[Sandbox, str], Outcome]
    right: Callable[[Outcome], bool]


def read_cases(ground_truth: Any, row: Mapping[str, Any] | None = None) -> list[ProgramTest]:
    """Reads the test cases that a ground truth stands for, at least one.

    >>> len(read_cases('{"inputs": ["1", "2"], "outputs": ["1", "4"]}')), len(read_cases(["assert f(1) == 2"]))
    (2, 1)

    Args:
        ground_truth: see the head of this file.
        row: where `entry_point` may be.

    Raises:
        UserError: it is none of the forms, or a test that no program, or every one, passes.
    """
    given = ground_truth
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError:
            given = [given] if "assert" in given else given
    entry = _entry_point(given, row)
    if isinstance(given, Mapping):
        given = _named_tests(given)
    if isinstance(given, Mapping) and given.get("inputs") is not None and given.get("outputs") is not None:
        cases = _paired(_list(given["inputs"]), _list(given["outputs"]), given.get("fn_name"))
    elif isinstance(given, Sequence) and not isinstance(given, str):
        pairs = [item for item in given if isinstance(item, Mapping) and "input" in item and "output" in item]
        paired = iter(_paired([item["input"] for item in pairs], [item["output"] for item in pairs], None))
        cases = [
            next(paired) if isinstance(item, Mapping) and item in pairs else _check_case(item, entry) for item in given
        ]
    else:
        raise UserError(f"the reward 'code' finds no test cases in the ground truth {_short(ground_truth)}", fix=_FORMS)
    if not cases:
        raise UserError("the ground truth of the reward 'code' has no test cases in it", fix=_FORMS)
    return cases


def _entry_point(given: Any, row: Mapping[str, Any] | None) -> str | None:
    """Returns the name of the function that is tested, from the ground truth or the row."""
    row = row or {}
    for place in (given, row, row.get("extra_info")):
        if isinstance(place, Mapping) and isinstance(place.get("entry_point"), str):
            return str(place["entry_point"])
    return None


def _named_tests(given: Mapping[str, Any]) -> Any:
    """Returns the list of tests of a mapping that names them; else the mapping."""
    if given.get("assert_case") is not None:
        return _list(given["assert_case"])
    if given.get("test_list") is not None:
        setup = [*_list(given.get("test_imports") or []), given.get("test_setup_code") or ""]
        before = "".join(f"{text}\n" for text in setup if text)
        return [before + test for test in _list(given["test_list"])]
    return [given["test"]] if isinstance(given.get("test"), str) else given


def _paired(inputs: list[Any], outputs: list[Any], name: Any) -> list[ProgramTest]:
    """Pairs inputs with the outputs that they must give."""
    if len(inputs) != len(outputs):
        raise UserError(f"the ground truth has {len(inputs)} inputs and {len(outputs)} outputs", fix=_FORMS)
    if name:
        typed = [wanted for given, wanted in zip(inputs, outputs) if not isinstance(given, str)]
        wrapped = all(len(wanted) == 1 for wanted in typed if isinstance(wanted, list))
        return [_call_case(str(name), given, wanted, wrapped) for given, wanted in zip(inputs, outputs)]
    if inputs and not any(_text(wanted).strip() for wanted in outputs):
        raise UserError(
            "no output in the ground truth says anything, so a program that does nothing would pass", fix=_FORMS
        )
    return [_stdin_case(_text(given), _text(wanted)) for given, wanted in zip(inputs, outputs)]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:100] + "..."


def _list(value: Any) -> list[Any]:
    return [value] if isinstance(value, str) else list(value)


def _text(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _stdin_case(given: str, wanted: str) -> ProgramTest:
    return ProgramTest(lambda s, program: s.run(program, given), lambda outcome: same_output(outcome.stdout, wanted))


def _call_case(name: str, given: Any, expected: Any, wrapped: bool) -> ProgramTest:
    if isinstance(given, str):
        try:
            arguments = [json.loads(line) for line in given.split("\n") if line.strip()]
        except ValueError as error:
            raise UserError(
                f"the arguments {_short(given)} of {name} are not JSON: {error}", fix="one JSON value a line, or a list"
            ) from error
        wanted, wrapped = (_loads(expected) if isinstance(expected, str) else expected), False
    elif given is None or isinstance(given, list | tuple):
        arguments, wanted = list(given or []), expected
    else:
        raise UserError(f"the arguments of {name} are {_short(given)}, not a list", fix="give [...] for each call")
    return ProgramTest(
        lambda s, program: s.call(program, name, arguments), lambda outcome: _returned(outcome, wanted, wrapped)
    )


def _check_case(test: Any, entry: str | None) -> ProgramTest:
    if not isinstance(test, str):
        raise UserError(f"the reward 'code' finds no test case in {_short(test)}", fix=_FORMS)
    whole = whole_test(test, entry)
    return ProgramTest(lambda s, program: s.check(program, whole), lambda outcome: True)


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:  # a text that is meant as it stands
        return text


# --- comparison ---


def same_output(said: str, expected: str) -> bool:
    r"""Returns whether two outputs have the same tokens.

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


def _returned(outcome: Outcome, expected: Any, wrapped: bool) -> bool:
    """Returns whether a function returned what is expected. The text of the returned value comes from the program, and
    can be anything.
    """
    try:
        value = _json_like(json.loads((outcome.result or "").split("\n", 1)[0])["value"])
        if same_value(value, expected):
            return True
        return wrapped and isinstance(expected, list) and len(expected) == 1 and same_value(value, expected[0])
    except (ValueError, TypeError, KeyError, ArithmeticError, RecursionError):  # also of a Decimal that signals
        return False


def is_plain(outcome: Outcome) -> bool:
    """Returns whether everything in an outcome can be compared: no object in a result or before a test."""
    try:
        if outcome.result is not None:
            _json_like(json.loads(outcome.result.split("\n", 1)[0]).get("value"))
    except (ValueError, TypeError, KeyError, ArithmeticError, AttributeError, RecursionError) as error:
        return not isinstance(error, NotPlain)
    return not outcome.strange


class NotPlain(ValueError):
    """A function returned an object that is no value of JSON."""


def _json_like(value: Any) -> Any:
    """Returns what `values.Wire` wrote, as values of JSON; only texts are hashed."""
    if isinstance(value, list):
        return [_json_like(v) for v in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1:
        raise NotPlain("an object of the program's")
    ((tag, held),) = value.items()
    if tag in ("float", "complex"):
        return (float if tag == "float" else complex)(held)
    if tag == "int":
        return int(held, 16)
    if tag == "tuple":
        return [_json_like(v) for v in held]
    if tag == "decimal.Decimal":
        return Decimal(held)
    if tag == "fractions.Fraction":
        return Fraction(*held)
    if tag in ("dict", "collections.Counter", "collections.OrderedDict", "collections.defaultdict"):
        pairs = held[tag == "collections.defaultdict" :]
        made = {k if isinstance(k, str) else str(_json_like(k)): _json_like(v) for k, v in pairs}
        if len(made) < len(pairs):
            raise NotPlain("a dict in which a number and a text are the same name")
        return made
    raise NotPlain(f"{tag} is not a value of JSON")


def same_value(said: Any, expected: Any) -> bool:
    """Returns whether two values of JSON are equal, floats within the tolerance.

    >>> same_value([1, {"a": 0.1 + 0.2}], [1, {"a": 0.3}]), same_value([1, 2], [1]), same_value("1", 1)
    (True, False, False)
    """
    if isinstance(expected, list | tuple) and isinstance(said, list):
        return len(said) == len(expected) and all(map(same_value, said, expected))
    if isinstance(expected, dict) and isinstance(said, dict):
        return said.keys() == expected.keys() and all(same_value(said[k], v) for k, v in expected.items())
    if isinstance(expected, float) and isinstance(said, float | int):
        try:
            return math.isclose(said, expected, rel_tol=TOLERANCE, abs_tol=TOLERANCE * TOLERANCE) or (
                math.isnan(said) and math.isnan(expected)
            )
        except OverflowError:  # an int that no float can hold
            return False
    return bool(said == expected)
