"""The carry job for three steps with vLLM or SGLang generating: the same loop, another engine, the right weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hybridflow.config.kinds.rl import RlConfig
from hybridflow.config.kinds.sft import SftConfig
from hybridflow.config.load import load_config
from hybridflow.tracking.jsonl import read_metrics
from hybridflow.tracking.rollouts import read_rollouts
from hybridflow.trainers.rl.loop import estimate, next_groups, publish_weights, record, train, update
from hybridflow.trainers.rl.run import open_run
from hybridflow.trainers.sft import train_sft

CARRY = Path(__file__).parents[2] / "recipes/carry"
FEW = ["train.prompts_per_step=4", "train.sequences_per_update=16", "train.samples_per_prompt=4", "eval.max_rows=4"]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learned enough of both workers to be right now and then; the recipe trains it longer."""
    folder = tmp_path_factory.mktemp("sft")
    overrides = [f"run.folder={folder}", "train.steps=300", "checkpoint.every=0", "track.console=false"]
    return train_sft(load_config(CARRY / "sft.yaml", overrides, kind=SftConfig)) / "model"


def configured(folder: Path, start: Path, engine: str, *more: str) -> RlConfig:
    overrides = [f"run.folder={folder}", f"model.path={start}", f"rollout.engine={engine}", "train.steps=3", *more]
    return load_config(CARRY / "grpo.yaml", [*overrides, "eval.every=1", "track.console=false"])


def run(folder: Path, start: Path, engine: str, *more: str) -> Path:
    return train(configured(folder, start, engine, *more))


@pytest.mark.vllm
def test_carry_learns_through_vllm_with_verified_weights(start: Path, tmp_path: Path) -> None:
    through_vllm, inline = run(tmp_path / "vllm", start, "vllm"), run(tmp_path / "inline", start, "inline")
    metrics, reference = (read_metrics(f / "metrics.jsonl") for f in (through_vllm, inline))
    assert [m["step"] for m in metrics] == [0, 1, 2, 3]
    for m in metrics[1:]:
        # The trainer's probability of every sampled token, under the weights published before that step.
        assert m["training/rollout_probs_diff_max"] <= 1e-4
        assert m["actor/grad_norm"] > 0
    # Greedy answers do not depend on the engine: the same weights answer the same held-out problems alike.
    for ours, theirs in zip(read_rollouts(through_vllm / "evaluations/step-000000.parquet"),
                            read_rollouts(inline / "evaluations/step-000000.parquet"), strict=True):  # fmt: skip
        assert ours["token_ids"] == theirs["token_ids"]
    # Sampling is another stream of noise, so rewards agree as two samples of 128 answers do.
    assert abs(metrics[1]["critic/score/mean"] - reference[1]["critic/score/mean"]) < 0.2
    # After three updates vLLM answers with other weights than it began with.
    before, after = (read_rollouts(through_vllm / f"evaluations/step-00000{i}.parquet") for i in (0, 3))
    assert any(b["logps"] != a["logps"] for b, a in zip(before, after, strict=True))


def vllm(*overrides: str) -> Any:
    return pytest.param("vllm", overrides, marks=pytest.mark.vllm, id=" ".join(overrides) or "vllm")


def sglang(*overrides: str) -> Any:
    return pytest.param("sglang", (*overrides, *FEW), marks=pytest.mark.sglang, id=" ".join(("sglang", *overrides)))


SHARDED = ["placement.pools={all: 2}", "engine.strategy=fsdp2"]
ADAPTERS = ["model.lora.rank=8", "optim.lr=0.003"]


@pytest.mark.parametrize(
    ("engine", "overrides"),
    [
        vllm("rollout.mode=server"),
        vllm(*SHARDED),
        vllm(*SHARDED, "rollout.mode=workers", "rollout.tensor_parallel=2"),
        vllm(*ADAPTERS),
        vllm(*ADAPTERS, "rollout.lora=merged"),
        sglang(),
        sglang(*SHARDED, "rollout.mode=server"),
        sglang(*ADAPTERS, "rollout.lora=merged"),
    ],
)
def test_every_way_to_place_an_engine_samples_with_the_trainers_weights(
    start: Path, tmp_path: Path, engine: str, overrides: tuple[str, ...]
) -> None:
    assert_sampled_with_the_trainers_weights(run(tmp_path / "run", start, engine, *overrides))


@pytest.mark.vllm
def test_replicas_in_a_pool_are_checked_as_one_engine_is(start: Path, tmp_path: Path) -> None:
    """Their cache with a prompt that fills blocks of it, and their memory."""
    pools = ["placement.pools={train: 1, generate: 2}", "placement.roles={rollout: generate}"]
    more = ["data.max_prompt_tokens=64", "rollout.read_back_every=1"]
    with open_run(configured(tmp_path / "run", start, "vllm", *pools, *more)) as opened:
        assert (opened.source.engine.replicas, opened.source.engine.max_model_len) == (2, 96)
        assert len(opened.publisher.canary.prompt()) > 2 * opened.source.engine.cache_block > 0
        record(opened, 0, [], None, {})
        for step in opened.steps():
            groups, drawn = next_groups(opened, step)
            batch, estimated = estimate(opened, groups)
            learned = update(opened, batch)
            sent = publish_weights(opened, step)
            assert sent["rollout_sync/read_back_tensors"] >= 3
            record(opened, step, groups, batch, learned | drawn | estimated | sent)
    assert_sampled_with_the_trainers_weights(tmp_path / "run")


def assert_sampled_with_the_trainers_weights(folder: Path) -> None:
    metrics = read_metrics(folder / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [0, 1, 2, 3]
    for m in metrics[1:]:
        assert m["training/rollout_probs_diff_max"] <= 1e-4 and m["actor/grad_norm"] > 0
    before, after = (read_rollouts(folder / f"evaluations/step-00000{i}.parquet") for i in (0, 3))
    assert any(b["logps"] != a["logps"] for b, a in zip(before, after, strict=True))
