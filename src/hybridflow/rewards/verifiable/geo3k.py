r"""The reward of Geometry3K: 0.9 for the right answer and 0.1 for the form. Lu et al. 2021, arXiv 2105.04165.

The answer is right as in `math`: its last ``\boxed{...}`` equals the right one. The form is ``<think>...</think>`` at
the very beginning and a closed box after it. Scores are verl's; there mathruler compares answers.
"""

from __future__ import annotations

from typing import Any

from hybridflow.rewards.verifiable import math
from hybridflow.rewards.verifiable.text import last_boxed

FORM_WEIGHT = 0.1


def score(response: str, ground_truth: Any, symbolic: bool = True) -> dict[str, float]:
    r"""Returns ``score`` between 0 and 1, its parts ``accuracy`` and ``format``, and ``undecided`` as in `math`.

    >>> score(r"<think>2 + 2</think> \boxed{4}", "4")
    {'score': 1.0, 'accuracy': 1.0, 'format': 1.0, 'undecided': 0.0}
    >>> score(r"\boxed{4}", "4")["score"], score(r"<think></think>\boxed{5}", "4")["score"], score("4", "4")["score"]
    (0.9, 0.1, 0.0)

    Raises:
        ValueError: there is no ground truth.
    """
    graded = math.score(response if "\\boxed" in response else "", ground_truth, symbolic)
    box = last_boxed(response)
    thought, closed, _ = response.partition("</think>")
    well_formed = thought.startswith("<think>") and bool(closed) and box is not None and box[1] > len(thought)
    accuracy, form = graded["score"], float(well_formed)
    return {
        "score": (1 - FORM_WEIGHT) * accuracy + FORM_WEIGHT * form,
        "accuracy": accuracy,
        "format": form,
        "undecided": graded["undecided"],
    }
