"""Known right and wrong answers for the built-in rewards of questions with an answer, and what each does by design.

Those whose answers are documents or programs are in `audit_documents`; `CASES` has all.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hybridflow.rewards.audit.audit import CaseSet
from hybridflow.rewards.audit.documents import DOCUMENTS
from hybridflow.rewards.audit.mutations import NOTHING_AFTER, WRONG_THEN_RIGHT, Expected, KnownCase

Design = dict[str, tuple[Expected, str]]

_LAST: Design = {WRONG_THEN_RIGHT: ("right", "the last answer counts")}
_LAST_NUMBER = "the last number counts, wherever it stands"

_SUMS = (
    ("Jo picks 9 apples a day. How many does she pick in 2 days?", "18", "9 * 2 = <<9*2=18>>18 apples.", "20"),
    ("A shop sells 40 pens at $27 each. What does it take in?", "1,080", "40 * 27 = 1080 dollars.", "1,800"),
    ("It is 3 degrees and grows 8 degrees colder. How cold is it?", "-5", "3 - 8 = -5", "-11"),
    ("A pizza costs $6 and is shared by 4. What does each pay?", "1.5", "6 / 4 = 1.5", "15"),
    ("What is left of 7 cakes when 7 are eaten?", "0", "7 - 7 = 0", "7"),
    ("A town of 1,200,000 people doubles. How many live there?", "2400000", "2 * 1,200,000 = 2,400,000", "240000"),
)


def _sums(form: str) -> tuple[KnownCase, ...]:
    """Returns word problems whose responses end as `form` says."""
    return tuple(
        KnownCase(question, truth, f"{reasoning}\n{form.replace('@', truth)}", truth, wrong)
        for question, truth, reasoning, wrong in _SUMS
    )


def _math(question: str, truth: str, wrong: str, same: tuple[str, ...], different: tuple[str, ...]) -> KnownCase:
    response = f"Let us work it out.\nThe answer is $\\boxed{{{truth}}}$."
    return KnownCase(question, truth, response, truth, wrong, same, different)


_EXPRESSIONS = (
    _math(
        "What is 9 + 9?",
        "18",
        "19",
        ("18.0", "\\frac{36}{2}", "1.8 \\times 10^{1}"),
        ("9+9", "2 \\cdot 9", "1.8", "18+0"),
    ),
    _math(
        "What is 1 / 2?", "\\frac{1}{2}", "2", ("0.5", "1/2", "\\frac12", "\\frac{2}{4}"), ("\\frac{2}{1}", "0.05", "1")
    ),
    _math(
        "Solve for x, with x^2 = 18 and x > 0.",
        "3\\sqrt{2}",
        "2\\sqrt{3}",
        ("\\sqrt{18}", "3 \\sqrt 2"),
        ("\\sqrt{6}", "3", "-3\\sqrt{2}"),
    ),
    _math(
        "Expand (x + 1)^2.", "x^2+2x+1", "x^2+1", ("1+2x+x^2", "(x+1)^2", "x^{2} + 2x + 1"), ("x^2+2x", "y^2+2y+1", "4")
    ),
    _math(
        "Where do the lines meet?",
        "(3, -2)",
        "(-2, 3)",
        ("(3,-2)", "\\left(3, -2\\right)"),
        ("(3, 2)", "3, 2", "\\{3, -2\\}"),
    ),
    _math("For which x is it defined?", "[2, 5)", "(2, 5]", ("[2,5)",), ("[2, 5]", "(2, 5)", "2, 5")),
    _math(
        "How large is the angle in radians?",
        "\\frac{\\pi}{3}",
        "\\frac{\\pi}{6}",
        ("\\pi/3", "\\frac{1}{3}\\pi"),
        ("\\pi", "60", "3"),
    ),
    _math(
        "Which of them is it?", "\\text{Monday}", "\\text{Tuesday}", ("Monday", "\\text{monday}"), ("\\text{Mon}", "1")
    ),
    _math("Add up 1000 and 80.", "1080", "1800", ("1{,}080", "1,080", "1\\,080"), ("1.080", "108", "1,08")),
    _math(
        "It is 3 degrees and grows 8 degrees colder. How cold is it?",
        "-5",
        "5",
        ("-5.0", "-5^\\circ"),
        ("5", "3-8", "--5"),
    ),
)

_STRUCTURES = (
    _math(
        "Which vector is it?",
        "\\begin{pmatrix} 2 \\\\ 3 \\end{pmatrix}",
        "\\begin{pmatrix} 3 \\\\ 2 \\end{pmatrix}",
        ("\\begin{pmatrix}2\\\\3\\end{pmatrix}", "\\begin{bmatrix} 2.0 \\\\ \\frac{6}{2} \\end{bmatrix}", "[[2], [3]]"),
        ("\\begin{pmatrix} 5 \\end{pmatrix}", "(2, 3)", "23", "2, 3"),
    ),
    _math(
        "Square the matrix.",
        "\\begin{pmatrix} 1 & 2 \\\\ 0 & 4 \\end{pmatrix}",
        "\\begin{pmatrix} 1 & 0 \\\\ 2 & 4 \\end{pmatrix}",
        ("[[1,2],[0,4]]", "\\left[\\begin{array}{cc} 1 & 2 \\\\ 0 & 4 \\end{array}\\right]"),
        ("[[1,0],[2,4]]", "1, 2, 0, 4", "7"),
    ),
    _math(
        "Which roots are there?", "1, 1, 2", "1, 2, 2", ("2, 1, 1", "1,1,2", "1, 1 \\text{ and } 2"), ("1, 2", "112")
    ),
    _math(
        "Write 10 in base 2.", "1010_2", "1011_2", ("1010_{2}", "(1010)_2", "1010 \\text{ base }2"), ("10", "1010_4")
    ),
)

_CAPITALS = (
    (
        "Which city is the capital of France?",
        {"target": ["Paris"]},
        "Paris",
        "Rome",
        ("paris", "PARIS"),
        ("Par", "Paris Hilton"),
    ),
    (
        "Who wrote Emma?",
        {"target": ["Jane Austen", "Austen"]},
        "Jane Austen",
        "Emily Bronte",
        ("Austen",),
        ("Jane", "Emma"),
    ),
    (
        "In which year did the war end?",
        {"target": ["1945"]},
        "1945",
        "1918",
        ("1945.",),
        ("194", "45", "1945-1946", "19.45", "-1945"),
    ),
    ("Which band sang it?", {"target": ["The Who"]}, "The Who", "The Doors", ("Who", "the who"), ("The", "Whoever")),
)


def _short_answers() -> tuple[KnownCase, ...]:
    return tuple(
        KnownCase(question, truth, f"I looked it up. <answer>{answer}</answer>", answer, wrong, same, different)
        for question, truth, answer, wrong, same, different in _CAPITALS
    )


def _choices(form: str) -> tuple[KnownCase, ...]:
    question = "Which gas do plants take in?\n(A) oxygen\n(B) nitrogen\n(C) carbon dioxide\n(D) helium"
    return tuple(
        KnownCase(
            question.replace("(C)", f"({right})") if right != "C" else question,
            right,
            f"Plants take in one and give off another.\n{form.replace('@', right)}",
            right,
            wrong,
            same=(f"({right})",) if form == "Answer: @" else (),
            different=("A, B, C and D", "ABCD", "E", "none", "not " + right),
        )
        for right, wrong in (("A", "B"), ("B", "D"), ("C", "A"), ("D", "C"))
    )


def _countdown(target: int, numbers: list[int], right: str, wrong: str, **more: Any) -> KnownCase:
    return KnownCase(
        f"Make {target} from {numbers}, each used once, with + - * / and brackets.",
        {"target": target, "numbers": numbers},
        f"<think>Let me try.</think>\n<answer>{right}</answer>",
        right,
        wrong,
        **more,
    )


_GAMES = (
    _countdown(
        98,
        [44, 19, 35],
        "44 + 19 + 35",
        "44 + 19 - 35",
        same=("(44+19)+35", "35 + 44 + 19 = 98", "19+35+44", "-(-44) + 19 + 35"),
        different=(
            "98",
            "44 + 54",
            "44 + 19 + 35 + 0",
            "44 + 19 + 35 + 19 - 19",
            "98 = 98",
            "4419 + 35",
            "44 + 19 + 3.5e1",
            "44 + 19 + 35 = 97",
            "44 + 19 = 63",
            "sum([44, 19, 35])",
            "44 + 19 + 35 if True else 0",
            "0x2C + 19 + 35",
        ),
    ),
    _countdown(
        6,
        [2, 4, 12],
        "12 * 2 / 4",
        "12 / 2 * 4",
        same=("12 / (4 / 2)", "12 \\times 2 \\div 4", "(2*12)/4"),
        different=("12 // (4 // 2)", "2 + 4", "2 ** 4 - 12", "6 + 0 * (2 + 4 + 12)", "12 / 4 / 2", "12, 2, 4"),
    ),
    _countdown(
        10,
        [5, 5],
        "5 + 5",
        "5 * 5",
        same=("(5)+(5)", "5 + 5 = 10"),
        different=("5 * 2", "10", "5", "5 + 5 + 5 - 5", "55 - 45"),
    ),
)

CASES: dict[str, CaseSet] = {
    "gsm8k": CaseSet(_sums("#### @"), ("text", "answer", "number", "end"), by_design=_LAST),
    "gsm8k_flexible": CaseSet(
        _sums("The answer is @"),
        ("text", "answer", "number", "end"),
        by_design=_LAST
        | {
            "the ground truth quoted": ("any", _LAST_NUMBER),
            "the ground truth as an object": ("right", _LAST_NUMBER),
            "wrong or right": ("right", _LAST_NUMBER),
            "no answer": ("any", _LAST_NUMBER),
            NOTHING_AFTER: ("any", _LAST_NUMBER),
            "words for nothing": ("any", _LAST_NUMBER),
            "code as the answer": ("any", _LAST_NUMBER),
            "huge numbers": ("any", _LAST_NUMBER),
        },
    ),
    "math": CaseSet(_EXPRESSIONS + _STRUCTURES, ("text", "answer", "number", "latex"), by_design=_LAST),
    "math_dapo": CaseSet(
        _sums("Answer: $@$"),
        ("text", "answer", "number", "end"),
        by_design=_LAST,
    ),
    "geo3k": CaseSet(
        tuple(
            replace(case, response=f"<think>I see a triangle.</think>\n{case.response}")
            for case in _EXPRESSIONS[:5] + _STRUCTURES
        ),
        ("text", "answer", "number", "latex"),
        by_design=_LAST,
    ),
    "multiple_choice": CaseSet(
        (*_choices("Answer: @"), *_choices("The answer is (@)."), *_choices("\\boxed{@}")),
        ("text", "answer"),
        by_design=_LAST | {"the ground truth quoted": ("any", "a letter that is stated counts, also in a quotation")},
    ),
    "countdown": CaseSet(_GAMES, ("text", "answer"), by_design=_LAST),
    "qa_em": CaseSet(_short_answers(), ("text", "answer", "words"), by_design=_LAST),
    "qa_f1": CaseSet(_short_answers(), ("text", "answer", "words"), by_design=_LAST, partial=True),
    **DOCUMENTS,
}
