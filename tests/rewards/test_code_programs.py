"""246 reference programs and their mutants: the reward `code` says of each what plain Python says, in every form."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from hybridflow.rewards.sandbox.open import open_sandbox
from hybridflow.rewards.verifiable.code import score
from programs import Program, programs

SETTINGS = {"backend": "local", "seconds": 30, "parallel": 2}
PROGRAMS = programs()


def asserts(program: Program) -> list[str]:
    """The calls as MBPP writes them."""
    return [f"assert {program.name}({', '.join(map(repr, args))}) == {wanted!r}" for args, wanted in program.calls]


def test_there_are_enough_programs_and_each_has_mutants() -> None:
    assert len(PROGRAMS) >= 240 and all(len(p.calls) >= 2 and any(p.mutants()) for p in PROGRAMS)


def test_assert_statements_say_of_every_program_and_mutant_what_plain_python_says() -> None:
    """All of them as functions of one program, and all assert statements as one test, so that two jails are enough."""
    texts, lines = (
        [],
        ["def said(text):", "    try: exec(text)", "    except Exception: return False", "    return True"],
    )
    for n, program in enumerate(PROGRAMS):
        for m, text in enumerate([program.text, *program.mutants()]):
            name = f"{program.name}_{n}_{m}"
            texts.append(text.replace(f"def {program.name}(", f"def {name}(", 1))
            test = "\n".join(asserts(program)).replace(f"assert {program.name}(", f"assert {name}(")
            lines.append(f"assert said({test!r}) is {m == 0}, {name!r}")
    assert len(texts) > 1000
    outcome = open_sandbox(SETTINGS).check("\n".join(texts), "\n".join(lines))
    assert (outcome.status, outcome.asked, outcome.strange) == ("ok", True, False), outcome


def forms(program: Program) -> Iterator[tuple[Any, str, bool]]:
    """Ground truths of all forms, what follows the program's text, and whether a result must be a value of JSON."""
    name, calls = program.name, program.calls
    yield {"assert_case": asserts(program)}, "", False
    body = "".join(f"    assert candidate({', '.join(map(repr, args))}) == {wanted!r}\n" for args, wanted in calls)
    yield {"test": f"def check(candidate):\n{body}", "entry_point": name}, "", False
    values = [json.loads(json.dumps(wanted)) for _, wanted in calls]
    yield {"fn_name": name, "inputs": [list(args) for args, _ in calls], "outputs": [[v] for v in values]}, "", True
    texts = ["\n".join(map(json.dumps, args)) for args, _ in calls]
    yield {"fn_name": name, "inputs": texts, "outputs": [json.dumps(v) for v in values]}, "", True
    reads = f"\nimport json, sys\nprint(json.dumps({name}(*map(json.loads, sys.stdin.read().splitlines()))))\n"
    yield {"inputs": texts, "outputs": [json.dumps(v) for v in values]}, reads, True


def differs_as_json(program: Program, mutant: str) -> bool:
    """Whether a mutant is wrong in what JSON can say: not in a tuple for a list, or True for 1."""
    space: dict[str, Any] = {}
    exec(mutant, space)
    for args, wanted in program.calls:
        try:
            said = space[program.name](*json.loads(json.dumps(args)))
            if json.dumps(said) != json.dumps(wanted) and json.loads(json.dumps(said)) != json.loads(
                json.dumps(wanted)
            ):
                return True
        except Exception:
            return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize("form", range(5))
def test_every_form_of_row_says_what_plain_python_says(form: int) -> None:
    def give(work: tuple[str, Any, bool]) -> tuple[float, bool, str]:
        text, truth, right = work
        return score(f"```python\n{text}\n```", json.dumps(truth), sandbox=SETTINGS)["score"], right, text

    work = []
    for program in PROGRAMS[
        form::5
    ]:  # each in one form: all in all forms take five minutes, and nothing else came of it
        truth, after, as_json = list(forms(program))[form]
        work.append((program.text + after, truth, True))
        wrong = [m for m in program.mutants() if not as_json or differs_as_json(program, m)]
        work += [(mutant + after, truth, False) for mutant in wrong[:1]]
    with ThreadPoolExecutor(2) as threads:
        given = list(threads.map(give, work))
    assert [text for got, right, text in given if got != right] == []
    assert sum(right for _, right, _ in given) >= 49 and sum(not right for _, right, _ in given) >= 40
