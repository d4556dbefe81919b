"""The inputs of the golden numbers: four sequences in two groups, taken from a run of another implementation."""

from __future__ import annotations

from hybridflow.batch import Batch
from hybridflow.config.sections.algorithm import AlgorithmSection

LENGTHS = [3, 4, 2, 4]
OLD = [[-1, -0.5, -2], [-0.7, -0.3, -1.2, -0.9], [-0.2, -1.5], [-0.4, -0.8, -0.6, -2.2]]
CHANGE = [[0.1, -0.2, 0.3], [-0.05, 0.25, -0.4, 0.02], [0.5, -0.5], [0, 0.15, -0.15, 0.6]]
VALUE = [[0.1, 0.2, 0.3], [0, 0.1, 0.2, 0.1], [0.4, 0.3], [-0.1, 0, 0.1, 0.2]]
REF_CHANGE = [[0.02, 0.01, -0.03], [0, 0.05, -0.02, 0.01], [-0.1, 0.1], [0.04, -0.04, 0, 0.2]]
REWARD = [1.0, 0.0, 0.5, -0.25]
GROUP = [7, 7, 3, 3]

ALGORITHM = {
    name: field.get_default(call_default_factory=True) for name, field in AlgorithmSection.model_fields.items()
}
"""Every value of every piece of an algorithm, at its default."""


def golden_batch() -> Batch:
    """Responses of these lengths, each behind a prompt token that carries no loss."""
    batch = Batch.from_rows(
        {
            "loss_mask_T": [[False] + [True] * n for n in LENGTHS],
            "old_T": [[0.0, *row] for row in OLD],
            "change_T": [[0.0, *row] for row in CHANGE],
            "value_T": [[0.0, *row] for row in VALUE],
            "reward_T": [[0.0] * n + [reward] for n, reward in zip(LENGTHS, REWARD)],
            "trajectory_B": [0, 1, 2, 3],
            "reward_B": REWARD,
            "group_B": GROUP,
        }
    )
    batch["new_T"] = batch["old_T"] + batch["change_T"]
    return batch
