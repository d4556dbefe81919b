"""The reward of programs: 1 if a program passes every test case, else 0; or the share that it passes.

The program runs in a sandbox (docs/sandbox.md). What is expected of it never enters the place where it runs: output and
returned values come out and are compared here; tests that are assert statements run in a jail of their own, where the
program's functions are stand-ins that send their arguments over. So a program cannot earn anything by ending early, by
changing the comparison, or by reading files.

**The program** is the last fenced block that says python (or py, python3); where none does, the last fenced block;
where there is none, the whole response.

**The ground truth** has one of the forms at the head of `code_cases.py`, which also says what counts as equal. If no
test uses anything that the program defines, the score is 0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from hybridflow.rewards.sandbox.open import open_sandbox
from hybridflow.rewards.verifiable.code_cases import is_plain, read_cases

_FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL)
_PYTHON = ("python", "py", "python3")


def score(
    response: str,
    ground_truth: Any,
    row: Mapping[str, Any] | None = None,
    sandbox: Mapping[str, Any] | None = None,
    partial: bool = False,
) -> dict[str, float]:
    """Runs the program in a response against its test cases.

    Cases run in their order, `sandbox["parallel"]` at a time. Without `partial` the first one that fails ends it; with
    it, the first one that takes too long does, and what was not run counts as failed.

    Args:
        response: what the policy generated.
        ground_truth: the test cases, see above.
        row: where the name of the tested function may be (`entry_point`).
        sandbox: the keys of `reward.sandbox`.
        partial: whether passing some of the cases earns their share, instead of nothing.

    Returns:
        score; passed: the share of cases that passed before the end; timeouts: how many of them took too long;
        not_plain: how many failed after the program gave an object that cannot be compared outside of it.

    Raises:
        UserError: the ground truth is none of the forms, or programs cannot be contained here.
        SandboxError: the sandbox failed, so that there is no score.
    """
    cases = read_cases(ground_truth, row)
    program = extract(response)
    where = open_sandbox(sandbox)
    passed = timeouts = not_plain = done = 0
    ended = asked = False
    with ThreadPoolExecutor(where.parallel) as threads:
        while done < len(cases) and not ended:
            batch = cases[done : done + where.parallel]
            # An outcome counts only if no earlier one ended the run, so the result does not depend on `parallel`.
            for case, outcome in zip(batch, threads.map(lambda c: c.run(where, program), batch)):
                right = outcome.status == "ok" and case.right(outcome)
                passed += right
                asked = asked or outcome.asked
                not_plain += outcome.status != "timeout" and not right and not is_plain(outcome)
                late = outcome.status == "timeout"
                timeouts += late
                ended = late or not (right or partial)
                if ended:
                    break
            done += len(batch)
    share = passed / len(cases) if asked else 0.0
    return {
        "score": share if partial else float(share == 1),
        "passed": share,
        "timeouts": float(timeouts),
        "not_plain": float(not_plain),
    }


def check(kwargs: Mapping[str, Any]) -> None:
    """Checks that programs can be run with these arguments of the reward.

    Raises:
        UserError: they cannot.
    """
    open_sandbox(kwargs.get("sandbox"))


def check_row(ground_truth: Any, row: Mapping[str, Any]) -> None:
    """Checks that a row's tests can be read, and can tell a right program from a wrong one.

    Raises:
        UserError: they cannot.
    """
    read_cases(ground_truth, row)


def extract(response: str) -> str:
    r"""Returns the program in a response.

    >>> extract("First:\n```python\nprint(1)\n```\nBetter:\n```python\nprint(2)\n```\nIt prints:\n```\n2\n```")
    'print(2)\n'
    >>> extract("```\nprint(1)\n```"), extract("print(1)"), extract("```python\nprint(1)")
    ('print(1)\n', 'print(1)', 'print(1)')
    """
    blocks = _FENCE.findall(response)
    named = [text for language, text in blocks if language.lower() in _PYTHON]
    return (named or [text for _, text in blocks] or [response])[-1]
