"""Draws which of two sampled sentences a simulated person prefers, and writes the pairs beside the samples.

    python recipes/rlhf/prefer.py runs/rlhf-samples 0

The second argument is the seed. One pair in ten is held out, for the reward model's accuracy.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from hybridflow.tracking.rollouts import read_rollouts

from task import preferences


def write_pairs(samples: Path, seed: int) -> int:
    """Writes ``pairs.jsonl`` and ``held-out-pairs.jsonl``; returns the number of pairs in both."""
    responses = [
        {"prompt": r["ground_truth"], "response": r["response"]} for r in read_rollouts(samples / "answers.parquet")
    ]
    rows = preferences(responses, seed)
    cut = len(rows) // 10
    for name, part in [("held-out-pairs", rows[:cut]), ("pairs", rows[cut:])]:
        (samples / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)) + "\n")
    return len(rows)


if __name__ == "__main__":
    print(f"{write_pairs(Path(sys.argv[1]), int(sys.argv[2]))} pairs in {sys.argv[1]}")
