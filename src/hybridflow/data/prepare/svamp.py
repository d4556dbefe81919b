"""SVAMP: one-step word problems. Patel et al. 2021, arXiv 2103.07191. Reward: gsm8k."""

from __future__ import annotations

from hybridflow.data.prepare.gsm8k import INSTRUCTION
from hybridflow.data.prepare.schema import Published, Split, prepared_row
from hybridflow.data.rows import Row


def convert(row: Row, split: Split, index: int) -> Row:
    """Makes the answer, a number, the ground truth; 145.0 is written 145."""
    body, number = row["Body"].strip(), float(row["Answer"])
    body += "" if body.endswith((".", "?", "!")) else ","  # "If he has 14 tickets left", the question follows
    return prepared_row(
        "ChilleD/SVAMP",
        f"{body} {row['Question'].strip()} {INSTRUCTION}",
        ability="math",
        ground_truth=str(int(number)) if number.is_integer() else str(number),
        split=split,
        index=index,
        id=row["ID"],
        type=row["Type"],
    )


SVAMP = Published(
    "ChilleD/SVAMP", ("ID", "Body", "Question", "Answer", "Type"), {"train": "train", "test": "test"}, convert
)
