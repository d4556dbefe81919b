"""Cases for the audit of a user's reward, from rows: a right response is the ground truth in a form that the reward
reads.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from hybridflow.errors import UserError
from hybridflow.protocols.rewards import Grader
from hybridflow.rewards.audit.audit import CaseSet, Finding, answers_of, score_all
from hybridflow.rewards.audit.mutations import BOTH_ORDERS, Expected, KnownCase

FORMS = (
    "Let me think.\n#### {ground_truth}",
    "Let me think.\nThe answer is \\boxed{{ground_truth}}",
    "Let me think.\nAnswer: {ground_truth}",
    "Let me think.\n<answer>{ground_truth}</answer>",
    "<think>Let me think.</think>\n<answer>{ground_truth}</answer>",
    "Let me think.\nThe answer is {ground_truth}",
    "{ground_truth}",
)
HOLE = "{ground_truth}"
TRIED_ROWS = 5  # to find out which form a reward reads
# Which of two answers counts is the reward's choice, as long as it does not accept both orders: the audit checks that.
OPEN: Mapping[str, tuple[Expected, str]] = dict.fromkeys([name for both in BOTH_ORDERS for name in both], ("any", ""))


def case_of(question: str, truth: Any, row: Mapping[str, Any], form: str | None, response: str | None) -> KnownCase:
    """Returns a case that has no wrong answer yet.

    Args:
        question: the prompt as text.
        truth: the ground truth.
        row: the whole row.
        form: of a right response, with a hole for the ground truth.
        response: a right response, in the place of `form`.
    """
    answer = answer_in(truth)
    if response is None:
        assert form is not None
        response = form.replace(HOLE, answer)
    return KnownCase(question, truth, response, answer if answer and answer in response else "", row=dict(row))


def answer_in(truth: Any) -> str:
    """Returns the answer as text that a ground truth stands for: the ground truth itself, its ``target``, or the first
    of several; else "".
    """
    if isinstance(truth, Mapping):
        return answer_in(truth["target"]) if "target" in truth else ""
    if isinstance(truth, list | tuple):
        return answer_in(truth[0]) if truth else ""
    return "" if truth is None or isinstance(truth, bool) else str(truth)


def with_wrong_answers(cases: Sequence[KnownCase], seed: int) -> list[KnownCase]:
    """Gives every case a wrong answer: that of another case; of numbers, where no other has one, the next number.

    Raises:
        UserError: a case has no other with another ground truth.
    """
    draw, done = random.Random(seed), []
    for case in cases:
        others = [other for other in cases if other.ground_truth != case.ground_truth]
        if not others and case.number is None:
            raise UserError(
                "all rows have the same ground truth, so no answer is known to be wrong",
                fix="give rows with different ground truths",
            )
        other = draw.choice(others) if others else None
        if case.answer:
            wrong = str(case.number + 1) if other is None and case.number is not None else other.answer if other else ""
            done.append(replace(case, wrong=wrong or "nothing of that kind"))
        else:
            assert other is not None
            done.append(replace(case, wrong_responses=(other.response,)))
    return done


def find_form(rows: Sequence[tuple[str, Any, Mapping[str, Any]]], grader: Grader) -> str:
    """Returns the form of a right response that a reward reads: of `FORMS`, the one whose right responses score
    furthest above wrong ones.

    Args:
        rows: question, ground truth and row.
        grader: scores.

    Raises:
        UserError: none earns more than a wrong response.
    """
    best, gain = None, 0.0
    for form in FORMS:
        cases = with_wrong_answers([case_of(*row, form, None) for row in rows[: 4 * TRIED_ROWS]], 0)[:TRIED_ROWS]
        cases = [case for case in cases if case.answer]
        scored = score_all(grader, [answers_of(c, [text]) for c in cases for text in (c.response, c.wrong_response)])
        values = [0.0 if scores is None or scores[0].failure else scores[0].value for scores in scored]
        more = sum(values[::2]) - sum(values[1::2])
        if more > gain + 1e-9:
            best, gain = form, more
    if best is None:
        raise UserError(
            "in none of the usual forms does the ground truth earn more than another row's",
            why=f"tried: {'; '.join(repr(form) for form in FORMS)}",
            fix="say with --right how a right response looks, such as --right '#### {ground_truth}', or name the "
            "column that holds right responses with --response-key",
        )
    return best


def case_set_of(cases: Sequence[KnownCase], kwargs: Mapping[str, Any]) -> CaseSet:
    """Returns a set of cases from a user's rows: of numbers, if all answers are, and of LaTeX, if they are in boxes.

    Args:
        cases: with wrong answers.
        kwargs: of the reward.
    """
    numbers = all(case.number is not None for case in cases)
    latex = any("\\boxed" in case.response for case in cases)
    groups = ("text", "answer", *(["number"] if numbers else []), *(["latex"] if latex else []))
    return CaseSet(tuple(cases), groups, kwargs, OPEN)


def truth_in_prompt(cases: Sequence[KnownCase]) -> Finding | None:
    """Counts the prompts that contain the ground truth; None where none does."""
    shown = [c for c in cases if c.answer and re.search(rf"(?<![\w.]){re.escape(c.answer)}(?![\w]|\.\d)", c.question)]
    if not shown:
        return None
    shortest = min(shown, key=lambda case: len(case.question))
    example = {"question": shortest.question[:200], "ground truth": shortest.answer}
    return Finding("note", "the prompt holds the ground truth", len(shown), len(cases), example)
