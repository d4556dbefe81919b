r"""MATH: competition problems whose solution ends in ``\boxed{...}``. Hendrycks et al. 2021, arXiv 2103.03874."""

from __future__ import annotations

from hybridflow.data.prepare.schema import Published, Split, prepared_row
from hybridflow.data.rows import Row
from hybridflow.errors import UserError

INSTRUCTION = r"Think step by step, and put the final answer into \boxed{}."


def last_boxed(solution: str) -> str | None:
    r"""Returns the content of the last ``\boxed{...}`` (or ``\fbox{...}``, or after ``\boxed`` and a space); None
    without one.

    >>> last_boxed(r"so $x = \boxed{\frac{1}{2}}$."), last_boxed(r"it is $\boxed 7$"), last_boxed("7")
    ('\\frac{1}{2}', '7', None)
    """
    start = max(solution.rfind(r"\boxed"), solution.rfind(r"\fbox"))
    if start < 0:
        return None
    rest = solution[start:].partition("box")[2].removeprefix("ed")
    if not rest.startswith("{"):
        return rest.split("$")[0].strip() or None
    depth = 0
    for place, letter in enumerate(rest):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return rest[1:place]
    return None


def convert(row: Row, split: Split, index: int) -> Row:
    """Makes the boxed answer the ground truth."""
    truth = last_boxed(row["solution"])
    if truth is None:
        raise UserError("the solution has no \\boxed answer")
    return prepared_row(
        "DigitalLearningGmbH/MATH-lighteval",
        f"{row['problem']} {INSTRUCTION}",
        ability="math",
        ground_truth=truth,
        split=split,
        index=index,
        level=row["level"],
        type=row["type"],
    )


MATH = Published(
    "DigitalLearningGmbH/MATH-lighteval",
    ("problem", "solution", "level", "type"),
    {"train": "train", "test": "test"},
    convert,
)
