"""Checkpoints of runs whose models are cut over processes: gone on with elsewhere, exported, damaged, killed."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from hybridflow.checkpoint.store import saved_steps

import commands
from runs import assert_same_tensors, configuration, metrics, mistake, succeed

Output = pytest.CaptureFixture[str]
SHARDED: dict[str, Any] = {"placement": {"pools": {"all": 2}}, "engine": {"strategy": "fsdp2"}}
ASYNCHRONOUS = "checkpoint.asynchronous=true"


def gap(one: Path, other: Path) -> float:
    a, b = load_file(one), load_file(other)
    assert a.keys() == b.keys()
    return max(float((a[n] - t).abs().max()) for n, t in b.items())


@pytest.mark.parametrize(
    "model",
    [pytest.param({}, id="all weights"), pytest.param({"lora": {"rank": 4}}, id="adapters", marks=pytest.mark.slow)],
)
def test_a_run_goes_on_with_other_processes_and_is_exported(
    model: dict[str, Any], tmp_path: Path, capsys: Output
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    optim = {"lr": 1e-3, "eps": 1e-4}
    succeed(capsys, "sft", configuration(whole, "sft", model=model, optim=optim), "checkpoint.every=1")
    sections = {"model": model, "optim": optim}
    config = configuration(parts, "sft", **sections, **SHARDED)
    succeed(capsys, "sft", config, "train.steps=2", ASYNCHRONOUS)
    checkpoint = parts / "run/checkpoints/step-000002"
    assert (checkpoint / "shards").is_dir() and (checkpoint / "model").is_dir() == (not model)
    succeed(capsys, "export", parts / "run", parts / "out")
    assert_same_tensors(parts / "out/model.safetensors", parts / "run/model/model.safetensors")
    assert (parts / "out/tokenizer.json").is_file()
    succeed(capsys, "sft", configuration(parts, "sft", **sections))  # the third step in one process
    assert gap(parts / "run/model/model.safetensors", whole / "run/model/model.safetensors") < 1e-6
    losses = [[m["train/loss"] for m in metrics(f / "run")] for f in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


@pytest.mark.slow
def test_a_damaged_shard_is_named(tmp_path: Path, capsys: Output) -> None:
    config = configuration(tmp_path, "sft", **SHARDED)
    succeed(capsys, "sft", config, "train.steps=1")
    shard = sorted((tmp_path / "run/checkpoints/step-000001/shards").iterdir())[1]
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
    said = mistake(capsys, "sft", config)
    assert f"is damaged: shards/{shard.name} was altered since it was written" in said


@pytest.mark.slow
def test_a_run_killed_while_ranks_write_ends_bit_identical(tmp_path: Path, capsys: Output) -> None:
    folders = [tmp_path / "whole", tmp_path / "killed"]
    for folder in folders:
        folder.mkdir()
    sections = SHARDED | {"critic": {"optim": {"lr": 1e-3}}, "algorithm": {"preset": "ppo"}, "train": {"steps": 3}}
    configs = [configuration(folder, **sections) for folder in folders]
    arguments = ["checkpoint.every=1", ASYNCHRONOUS]
    succeed(capsys, "train", configs[0], *arguments)
    killed = commands.run(["train", configs[1], *arguments], folders[1], HYBRIDFLOW_FAULT="kill@step2:save")
    assert killed.status == -signal.SIGKILL, killed.complained
    assert saved_steps(folders[1] / "run/checkpoints") == [1]
    succeed(capsys, "train", configs[1], *arguments)
    assert_same_tensors(*(f / "run/model/model.safetensors" for f in folders))
    for part in ("shards", "critic/shards"):
        shards = [sorted((f / "run/checkpoints/step-000003" / part).iterdir()) for f in folders]
        assert len(shards[0]) == 2
        for one, other in zip(*shards):
            assert_same_tensors(one, other)
