"""The whole recipe: fine-tuning, preferences, a reward model and PPO, measured by the true preference.

    python recipes/rlhf/rlhf.py runs/rlhf 0

The arguments are a new folder and the seed.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from hybridflow.commands.evaluate import evaluate_model
from hybridflow.config.kinds.eval import EvalConfig
from hybridflow.config.kinds.reward_model import RewardModelConfig
from hybridflow.config.kinds.sft import SftConfig
from hybridflow.config.load import load_config
from hybridflow.tracking.jsonl import read_metrics
from hybridflow.trainers.reward_model import train_reward_model
from hybridflow.trainers.rl.loop import train
from hybridflow.trainers.sft import train_sft

from prefer import write_pairs

HERE = Path(__file__).parent
MEAN = "val-core/animals/reward/mean@"


def run_rlhf(folder: Path, seed: int, *, live: bool = True, more: dict[str, list[str]] | None = None) -> dict[str, Any]:
    """Runs all stages with one seed; returns the true preference before and after, and the seconds of each stage.

    Args:
        folder: of all runs.
        seed: of everything.
        live: show progress.
        more: further overrides by the name of the YAML file.
    """
    more = more or {}
    seconds: dict[str, float] = {}
    sft, samples, scorer, ppo = (folder / name for name in ("sft", "samples", "reward-model", "ppo"))

    def overrides(name: str, run: Path, *own: str) -> list[str]:
        return [f"run.folder={run}", f"run.seed={seed}", *own, *more.get(name, [])]

    def timed(name: str, began: float) -> None:
        seconds[name] = round(time.process_time() - began, 1)

    console = f"track.console={str(live).lower()}"
    began = time.process_time()
    train_sft(load_config(HERE / "sft.yaml", overrides("sft", sft, console), kind=SftConfig))
    timed("sft", began)
    start = f"model.path={sft / 'model'}"
    began = time.process_time()
    evaluate_model(load_config(HERE / "samples.yaml", overrides("samples", samples, start), kind=EvalConfig))
    pairs = write_pairs(samples, seed)
    timed("preferences", began)
    began = time.process_time()
    rows = [f"data.train={samples / 'pairs.jsonl'}", f"data.eval={samples / 'held-out-pairs.jsonl'}"]
    own = overrides("reward-model", scorer, start, console, *rows)
    train_reward_model(load_config(HERE / "reward-model.yaml", own, kind=RewardModelConfig))
    timed("reward_model", began)
    began = time.process_time()
    reward = f"reward.model.path={scorer / 'model'}"
    train(load_config(HERE / "ppo.yaml", overrides("ppo", ppo, start, console, reward)))
    timed("ppo", began)
    truth = {}
    for name, model in [("before", sft), ("after", ppo)]:
        own = overrides("eval", folder / f"eval-{name}", f"model.path={model / 'model'}")
        result = evaluate_model(load_config(HERE / "eval.yaml", own, kind=EvalConfig))
        truth[name] = next(value for key, value in result["metrics"].items() if key.startswith(MEAN))
    learned = {
        int(m["step"]): value
        for m in read_metrics(ppo / "metrics.jsonl")
        for key, value in m.items()
        if key.startswith(MEAN)
    }
    last = read_metrics(scorer / "metrics.jsonl")[-1]
    return {
        "seed": seed,
        "pairs": pairs,
        "reward_model_accuracy": last["val/accuracy"],
        "before": truth["before"],
        "after": truth["after"],
        "learned_reward": learned,
        "cpu_seconds": seconds,
    }


if __name__ == "__main__":
    print(json.dumps(run_rlhf(Path(sys.argv[1]), int(sys.argv[2])), indent=1))
