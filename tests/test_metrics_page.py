"""docs/metrics.md and the metrics that runs write are the same list, in both directions.

Names come from four runs (PPO with a critic and adapters, fine-tuning, a reward model, an agent), from the functions
that name the metrics of corrections, policy losses and ranks, and from the source, for those that only some machines or
failures write. `<...>` in a name stands for any text.

Shapes: M tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest
import torch

import hybridflow
from agents.test_environments import sums
from hybridflow.algorithms.correction import correct
from hybridflow.algorithms.losses import policy
from hybridflow.algorithms.policy_loss.registry import POLICY_LOSSES
from hybridflow.balance import seqlen_metrics
from hybridflow.config.kinds.sft import SftConfig
from hybridflow.config.load import load_config
from hybridflow.trainers.reward_model import train_reward_model
from hybridflow.trainers.rl.loop import train
from hybridflow.trainers.sft import train_sft

from preferences import config_of
from runs import configuration, metrics

PAGE = Path(__file__).resolve().parents[1] / "docs/metrics.md"
LEVELS = {"token_k1": [0.5, 2.0], "seq_mean_k3": [0.1]}
COMPONENTS = """
def score(response, ground_truth):
    return {"score": sum(map(ord, response)) % 101 / 101, "length": len(response)}
"""
SAMPLED = {"samples_per_prompt": 2, "temperature": 1.0, "max_rows": 2}
PPO = {
    "train": {"steps": 1, "prompts_per_step": 2, "samples_per_prompt": 2},
    "model": {"lora": {"rank": 2}},
    "critic": {},
    "algorithm": {
        **{"preset": "ppo", "kl_reward_coef": 0.1, "kl_loss_coef": 0.1, "entropy_coef": 0.1},
        "correction": {"preset": "decoupled_token_is"},
    },
    "filter": {"equal_rewards": True, "max_rounds": 9, "overlong": False},
    "eval": SAMPLED,
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> frozenset[str]:
    """Every name in metrics.jsonl of the runs."""
    folders = [tmp_path_factory.mktemp(name) for name in ("ppo", "sft", "reward_model", "agent")]
    config = load_config(configuration(folders[0], **PPO))
    (folders[0] / "reward.py").write_text(COMPONENTS)
    train(config)
    train_sft(
        load_config(configuration(folders[1], "sft", train={"steps": 1, "sequences_per_update": 4}), kind=SftConfig)
    )
    train_reward_model(config_of(folders[2], train={"steps": 1, "pairs_per_update": 60}))
    train(load_config(sums(folders[3], tasks=2)))
    return frozenset(name for folder in folders for line in metrics(folder / "run") for name in line if name != "step")


@cache
def on_the_page() -> frozenset[str]:
    """What stands between backticks in the first column of a table of metrics."""
    tables = re.findall(r"^\| Metric \|.*\n\|[- |]+\n((?:\|.*\n)+)", PAGE.read_text(encoding="utf-8"), re.M)
    cells = [row.split(" | ")[0] for table in tables for row in table.splitlines()]
    return frozenset(name for cell in cells for name in re.findall(r"`([^`]+)`", cell))


@cache
def in_the_source() -> frozenset[str]:
    """Texts in src that begin as a metric does, and phases of a step; `<>` is what an f-string or a reader fills in."""
    prefixes = "|".join(sorted({name.split("/")[0] for name in on_the_page()}))
    found: set[str] = set()
    for file in Path(hybridflow.__path__[0]).rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        found |= {m[1] for m in re.finditer(rf'"((?:{prefixes})/[^"\s(]+)"', text)}
        found |= {f"timing_s/{m[1]}" for m in re.finditer(r'(?:\.phase\(|clock\.seconds\[)"(\w+)"', text)}
    return frozenset(re.sub(r"\{[^}]*\}|[A-Z]{2,}", "<>", name) for name in found)


@cache
def of_functions() -> frozenset[str]:
    """The metrics of a correction, of every policy loss and of ranks; the values do not matter."""
    x_M, sequence_M, every_M = torch.linspace(-2, -1, 4), torch.tensor([0, 0, 1, 1]), torch.ones(4, dtype=torch.bool)
    names = set(seqlen_metrics([3, 4], [[0], [1]]))
    found = correct(
        x_M, 1.1 * x_M, every_M, sequence_M, 2, weights="token", weight_floor=0.5, normalize=True, reject=LEVELS
    )
    names |= found.metrics.keys()
    columns = {f"{name}_T": x_M for name in ("policy_weight", "advantage", "rollout_logp", "cov_keep", "cov_penalty")}
    for loss in POLICY_LOSSES:
        params = {"policy_loss": loss, "values": {"clip_dual": 3.0, "behaviour_cap": 2.0}}
        terms = policy({"logp": x_M, "entropy": x_M}, columns | {"sequence_T": sequence_M}, params)
        names |= terms.means.keys() | terms.sums.keys()
    return frozenset(names)


def alike(one: str, other: str) -> bool:
    """Whether two names can be of one metric."""
    patterns = (".+".join(map(re.escape, re.split("<[^>]*>", name))) for name in (one, other))
    return any(re.fullmatch(pattern, name) for pattern, name in zip(patterns, (other, one)))


def missing(names: Iterable[str], known: Iterable[str]) -> list[str]:
    """The names that none of the known ones can be."""
    known = [*known]
    return sorted(name for name in names if not any(alike(name, other) for other in known))


def test_every_metric_that_is_written_is_on_the_page(written: frozenset[str]) -> None:
    assert len(written) > 100
    assert missing(written | of_functions(), on_the_page()) == []
    # A text may name a metric without the mean, max or min at its end.
    page = on_the_page() | {name.rpartition("/")[0] for name in on_the_page()}
    assert missing(in_the_source(), page) == []


def test_every_metric_on_the_page_is_written(written: frozenset[str]) -> None:
    known = written | of_functions() | in_the_source()
    families = {name for name in on_the_page() if "<" in name}
    assert sorted(on_the_page() - families - known) == []
    assert missing(families, known) == []
