"""GSM8K: grade-school word problems with worked answers. Cobbe et al. 2021, arXiv 2110.14168. Reward: gsm8k."""

from __future__ import annotations

from hybridflow.data.prepare.schema import Published, Split, prepared_row, text_after
from hybridflow.data.rows import Row

INSTRUCTION = 'Think step by step, and give the final number after "####".'


def convert(row: Row, split: Split, index: int) -> Row:
    """Makes the number after ``####`` the ground truth, without thousands separators."""
    return prepared_row(
        "openai/gsm8k",
        f"{row['question']} {INSTRUCTION}",
        ability="math",
        ground_truth=text_after(row["answer"], "####").replace(",", ""),
        split=split,
        index=index,
        question=row["question"],
        answer=row["answer"],
    )


GSM8K = Published("openai/gsm8k:main", ("question", "answer"), {"train": "train", "test": "test"}, convert)
