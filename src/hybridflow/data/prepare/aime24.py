"""AIME 2024: thirty competition problems with whole numbers from 0 to 999 as answers. A test set."""

from __future__ import annotations

from hybridflow.data.prepare.math import INSTRUCTION
from hybridflow.data.prepare.schema import Published, Split, prepared_row
from hybridflow.data.rows import Row


def convert(row: Row, split: Split, index: int) -> Row:
    """Makes the answer the ground truth, without leading zeros."""
    return prepared_row(
        "HuggingFaceH4/aime_2024",
        f"{row['problem']} {INSTRUCTION}",
        ability="math",
        ground_truth=str(int(row["answer"])),
        split=split,
        index=index,
        url=row["url"],
    )


AIME24 = Published("HuggingFaceH4/aime_2024", ("problem", "answer", "url"), {"test": "train"}, convert)
