"""HellaSwag: which of four endings continues a text. Zellers et al. 2019, arXiv 1905.07830.

The published test split has no labels; the validation split becomes the test file.
"""

from __future__ import annotations

import re

from hybridflow.data.prepare.schema import Published, Split, prepared_row
from hybridflow.data.rows import Row

LETTERS = "ABCD"


def convert(row: Row, split: Split, index: int) -> Row | None:
    """Makes the letter of the right ending the ground truth; a row without a label is left out."""
    if str(row["label"]) == "":
        return None
    context = f"{_clean(row['activity_label'])}: {_clean(row['ctx'])}"
    endings = [f"{letter}. {_clean(ending)}" for letter, ending in zip(LETTERS, row["endings"], strict=True)]
    question = "\n".join(["Which ending continues the text best? Answer with its letter.", "", context, *endings])
    return prepared_row(
        "Rowan/hellaswag",
        question,
        ability="nlp",
        ground_truth=LETTERS[int(row["label"])],
        split=split,
        index=index,
    )


def _clean(text: str) -> str:
    """Removes the marks that the WikiHow half has left of its headings.

    >>> _clean("[header] How to wait [title] Sit.  [step] Look.")
    'How to wait. Sit. Look.'
    """
    text = re.sub(r"\s*\[title\]\s*", ". ", text)
    return re.sub(r"\s+", " ", re.sub(r"\[[a-z ]*\]", "", text)).strip()


HELLASWAG = Published(
    "Rowan/hellaswag",
    ("activity_label", "ctx", "endings", "label"),
    {"train": "train", "test": "validation"},
    convert,
)
