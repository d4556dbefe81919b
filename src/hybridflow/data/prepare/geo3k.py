"""Geometry3K: geometry problems with a figure. Lu et al. 2021, arXiv 2105.04165.

``<image>`` in the prompt marks the figure; the figures are kept as they are stored, in the column ``images``.
"""

from __future__ import annotations

from hybridflow.data.prepare.math import INSTRUCTION
from hybridflow.data.prepare.schema import Published, Split, prepared_row
from hybridflow.data.rows import Row


def convert(row: Row, split: Split, index: int) -> Row:
    """Makes the answer the ground truth."""
    made = prepared_row(
        "hiyouga/geometry3k",
        f"{row['problem']} {INSTRUCTION}",
        ability="math",
        ground_truth=row["answer"],
        split=split,
        index=index,
        question=row["problem"],
    )
    return made | {"images": row["images"]}


GEO3K = Published("hiyouga/geometry3k", ("images", "problem", "answer"), {"train": "train", "test": "test"}, convert)
