r"""The reward of answers in JSON (RFC 8259): valid, of the required form, and equal to the right value.

The whole response is the answer, or its last block between lines of three backticks; nothing is searched for in running
text. Stricter than Python's reader: NaN, Infinity and a key given twice are not JSON. Whole numbers and decimals of the
same value are equal (1 and 1.0), truth values are no numbers, the order of keys does not count. verl has no reward for
these.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from hybridflow.errors import UserError
from hybridflow.rewards.verifiable.text import required

_FENCE = re.compile(r"^```[a-zA-Z0-9]{0,20}[ \t]{0,9}$", re.MULTILINE)  # a line that opens or closes a block


def score(
    response: str,
    ground_truth: Any = None,
    required_keys: Sequence[str] = (),
    schema: Mapping[str, Any] | None = None,
    compare: bool = True,
) -> dict[str, float]:
    """Returns ``score`` 1.0 for a response that meets all conditions, else 0.0; ``valid`` 1.0 for JSON of the required
    form.

    >>> score('{"a": [1, true]}', '{"a": [1.0, true]}'), score('{"a": [1, 1]}', {"a": [1, True]})
    ({'score': 1.0, 'valid': 1.0}, {'score': 0.0, 'valid': 1.0})
    >>> score("Here it is:\\n```json\\n[1]\\n```", [1]), score("it is [1]", [1])
    ({'score': 1.0, 'valid': 1.0}, {'score': 0.0, 'valid': 0.0})
    >>> score('{"name": "x"}', required_keys=["name", "age"], compare=False)
    {'score': 0.0, 'valid': 0.0}

    Args:
        response: what the policy generated.
        ground_truth: the right value, or its JSON text.
        required_keys: keys that the answer, an object, must have.
        schema: a JSON schema that it must satisfy (needs jsonschema).
        compare: whether it must equal the ground truth.

    Raises:
        ValueError: there is no ground truth to compare with, or its text is not JSON.
    """
    truth = _truth(required(ground_truth, "json (with compare)")) if compare else None
    try:
        found = read(_answer(response))
    except (ValueError, RecursionError):
        return {"score": 0.0, "valid": 0.0}
    valid = (not required_keys or (isinstance(found, dict) and set(required_keys) <= found.keys())) and (
        schema is None or _satisfies(found, schema)
    )
    return {"score": float(valid and (not compare or same(found, truth))), "valid": float(valid)}


def same(left: Any, right: Any) -> bool:
    """Returns whether two JSON values are equal.

    >>> same([1, {"a": None}], [1.0, {"a": None}]), same(True, 1), same("1", 1), same({"a": 1}, {"a": 1, "b": 2})
    (True, False, False, False)
    """
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right))
    return isinstance(left, bool) == isinstance(right, bool) and bool(left == right)


def check(kwargs: Mapping[str, Any]) -> None:
    """Checks that the schema can be used.

    Raises:
        UserError: jsonschema is not installed, or the schema is none.
    """
    if kwargs.get("schema") is None:
        return
    if importlib.util.find_spec("jsonschema") is None:
        raise UserError(
            "the reward json has a schema, and jsonschema is not installed", fix="pip install 'hybridflow[json]'"
        )
    import jsonschema

    try:
        jsonschema.validators.validator_for(kwargs["schema"]).check_schema(kwargs["schema"])
    except jsonschema.SchemaError as error:
        raise UserError(
            f"the schema of the reward json is not a JSON schema: {error.message}", fix="see json-schema.org"
        ) from error


def _answer(response: str) -> str:
    fences = list(_FENCE.finditer(response))
    if not fences or len(fences) % 2:
        return response
    return response[fences[-2].end() : fences[-1].start()]


def read(text: str) -> Any:
    """Reads a JSON value. Raises ValueError where the text is none, as RFC 8259 has it."""
    return json.loads(text, parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=_unique)


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"{digits} is too large")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is given twice")
    return found


def _truth(ground_truth: Any) -> Any:
    if not isinstance(ground_truth, str):
        return ground_truth
    try:
        return read(ground_truth)
    except ValueError as error:
        raise ValueError(f"the ground truth {ground_truth[:200]!r} is not JSON: {error}") from None


def _satisfies(found: Any, schema: Mapping[str, Any]) -> bool:
    import jsonschema

    return bool(jsonschema.validators.validator_for(schema)(schema).is_valid(found))
