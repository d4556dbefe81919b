"""Held-out evaluation: greedy answers to fixed prompts, scored by the run's reward."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

from hybridflow.data.prompts import PromptSet
from hybridflow.errors import UserError
from hybridflow.noise import NoiseKey
from hybridflow.protocols import Request, RolloutEngine, Sampling, generate
from hybridflow.rewards.function import RewardFunction


def evaluate(
    engine: RolloutEngine,
    prompts: PromptSet,
    reward: RewardFunction,
    *,
    decode: Callable[[list[int]], str],
    sampling: Sampling,
    seed: int,
    max_rows: int | None = None,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Answers every prompt once.

    Args:
        engine: holds the weights to evaluate.
        prompts: the evaluation set.
        reward: scores the answers.
        decode: token ids to text.
        sampling: greedy, as a rule. Noise, where there is any, is of the stream "eval", never the training's.
        seed: the run's seed.
        max_rows: use only the first rows.

    Returns:
        ``val-core/<data source>/reward/mean@1`` for each source, and one record per answer for `tracking.rollouts`.
    """
    count = len(prompts) if max_rows is None else min(max_rows, len(prompts))
    asked = [prompts[i] for i in range(count)]
    requests = [Request(p.token_ids, sampling, NoiseKey(seed, "eval", i)) for i, p in enumerate(asked)]
    by_source: dict[str, list[float]] = defaultdict(list)
    records = []
    for i, (prompt, result) in enumerate(zip(asked, generate(engine, requests))):
        response = decode(result.token_ids)
        try:
            value = reward([response], ground_truth=prompt.ground_truth, prompt=prompt.messages, row=prompt.row)[0]
        except UserError as error:
            raise UserError(f"row {i} of the evaluation data: {error.what}", why=error.why, fix=error.fix) from error
        by_source[prompt.data_source].append(value)
        records.append(
            {
                "draw": i,
                "sample": 0,
                "data_source": prompt.data_source,
                "prompt": prompt.text,
                "response": response,
                "reward": value,
                "advantage": None,
                "finish_reason": result.finish_reason,
                "ground_truth": str(prompt.ground_truth),
                "token_ids": result.token_ids,
                "logps": result.logps,
            }
        )
    metrics = {f"val-core/{name}/reward/mean@1": sum(v) / len(v) for name, v in by_source.items()}
    return metrics, records
