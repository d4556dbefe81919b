"""The same run with its models in other processes: the loop cannot tell, and the numbers are the same."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from hybridflow.config.load import load_config
from hybridflow.config.locate import load_function
from hybridflow.trainers.rl.run import open_run
from hybridflow.weights.stream import fingerprint

from runs import assert_same_tensors, configuration, metrics, mistake, succeed
from tiny import CARRY

Output = pytest.CaptureFixture[str]

PPO: dict[str, Any] = {
    "algorithm": {"preset": "ppo", "kl_loss_coef": 0.1},
    "critic": {"optim": {"lr": 3e-3}},
    "train": {"steps": 3, "prompts_per_step": 4, "samples_per_prompt": 2, "sequences_per_update": 4},
}
FSDP2 = {"strategy": "fsdp2"}
PLACEMENTS: dict[str, dict[str, Any]] = {
    "in one worker": {"placement": {"pools": {"all": 1}}},
    "colocated": {"placement": {"pools": {"all": 2}}, "engine": FSDP2},
    "split": {
        "placement": {"pools": {"a": 2, "b": 1}, "roles": {"critic": "b", "reference": "b"}},
        "engine": FSDP2,
        "critic": {"optim": {"lr": 3e-3}, "engine": {"strategy": "local"}},
        "model": {"reference_engine": {"strategy": "local"}},
    },
    "standalone": {
        "placement": {
            "pools": {"a": 1, "c": 1, "r": 1, "g": 1},
            "roles": {"critic": "c", "reference": "r", "rollout": "g"},
        }
    },
    "replicas elsewhere, by broadcast": {
        "placement": {"pools": {"a": 2, "g": 2}, "roles": {"rollout": "g"}, "transport": "broadcast"},
        "engine": FSDP2,
    },
    "fsdp1": {"placement": {"pools": {"all": 2}}, "engine": {"strategy": "fsdp1"}},
    "hsdp": {"placement": {"pools": {"all": 4}}, "engine": FSDP2 | {"shard_size": 2}},
    "ulysses": {"placement": {"pools": {"all": 2}}, "engine": FSDP2 | {"sequence_parallel": 2}},
    "fsdp2 x ulysses": {"placement": {"pools": {"all": 4}}, "engine": FSDP2 | {"sequence_parallel": 2}},
    "offloaded between phases": {
        "placement": {"pools": {"all": 2}},
        "engine": FSDP2 | {"offload": ["parameters", "optimizer"]},
    },
    "ray": {"placement": {"pools": {"all": 2}, "backend": "ray"}, "engine": FSDP2},
}
FAST = {"in one worker", "colocated"}


@functools.cache
def plain(folder: Path) -> Path:
    """The run in one process, once for all tests."""
    from hybridflow.cli.main import main

    folder.mkdir()
    assert main(["train", configuration(folder, **PPO)]) == 0
    return folder / "run"


@pytest.fixture
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plain(tmp_path_factory.getbasetemp() / "plain")


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in PLACEMENTS]
)
def test_a_run_learns_the_same_wherever_its_models_are(
    name: str, reference: Path, tmp_path: Path, capsys: Output
) -> None:
    succeed(capsys, "train", configuration(tmp_path, **PPO | PLACEMENTS[name]))
    here = tmp_path / "run"
    for ours, theirs in zip(metrics(here), metrics(reference), strict=True):
        for key, value in theirs.items():
            if not key.startswith(("timing_s/", "perf/cpu_memory", "perf/time", "perf/throughput")):
                assert ours[key] == pytest.approx(value, rel=1e-4, abs=1e-5), f"step {ours['step']}: {key}"
        if ours["step"]:
            assert ours["global_seqlen/mean"] > 0
    first = [pq.read_table(run / "rollouts/step-000001.parquet")["token_ids"].to_pylist() for run in (here, reference)]
    assert first[0] == first[1]
    assert relative_change(here / "model", reference / "model") <= 1e-3


def relative_change(one: Path, other: Path) -> float:
    """||dW_a - dW_b|| / ||dW_b||, where dW is what a run changed the weights by that both began with."""
    a, b = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    start = load_function(f"{CARRY}:tiny_qwen3")(seed=3)[0].state_dict()
    assert a.keys() == b.keys()
    apart = sum(float((a[n] - b[n]).square().sum()) for n in a)
    changed = sum(float((b[n] - start[n]).square().sum()) for n in a)
    return (apart / changed) ** 0.5


@pytest.mark.slow
def test_a_run_goes_on_under_another_placement(tmp_path: Path, capsys: Output) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    succeed(capsys, "train", configuration(whole, **PPO))
    for steps, name in ((1, "colocated"), (2, "standalone"), (3, "split")):
        given = json.loads(json.dumps(PPO | PLACEMENTS[name]))
        given["train"]["steps"] = steps
        succeed(capsys, "train", configuration(parts, **given))
    assert relative_change(parts / "run/model", whole / "run/model") <= 1e-3
    assert metrics(parts / "run")[-1]["actor/loss"] == pytest.approx(metrics(whole / "run")[-1]["actor/loss"], abs=1e-5)


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
FINE_TUNING: dict[str, tuple[list[str], list[str]]] = {
    "torchrun": (TORCHRUN, ["engine.strategy=fsdp2"]),
    "ray": ([], ["engine.strategy=fsdp2", "placement.pools={all: 2}", "placement.backend=ray"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", FINE_TUNING)
def test_fine_tuning_by_torchrun_or_ray_is_that_of_one_process(way: str, tmp_path: Path) -> None:
    launcher, overrides = FINE_TUNING[way]
    for name, before, after in (("plain", [], []), ("placed", launcher, overrides)):
        (tmp_path / name).mkdir()
        config = configuration(tmp_path / name, "sft", optim={"lr": 1e-3, "eps": 1e-6})
        command = [sys.executable, *before, "-m", "hybridflow", "sft", config, *after]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stderr
    runs = [tmp_path / name / "run" for name in ("placed", "plain")]
    for ours, theirs in zip(*(metrics(run) for run in runs), strict=True):
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], abs=1e-5)
        assert ours["train/grad_norm"] == pytest.approx(theirs["train/grad_norm"], rel=1e-5)
    assert relative_change(runs[0] / "model", runs[1] / "model") <= 1e-3


def test_torchrun_with_a_model_that_is_not_cut_is_refused(
    tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("TORCHELASTIC_RUN_ID", "none"), ("WORLD_SIZE", "2"), ("RANK", "0")):
        monkeypatch.setenv(name, value)
    said = mistake(capsys, "sft", configuration(tmp_path, "sft"))
    assert "pool 'all' of the actor has 2 processes, but engine.strategy local is for one" in said


@pytest.mark.parametrize("publish", ["adapters", "merged"])
@pytest.mark.slow
def test_adapters_train_and_are_published(publish: str, tmp_path: Path, capsys: Output) -> None:
    lora = {"model": {"lora": {"rank": 2}}, "algorithm": {"kl_loss_coef": 0.1}, "train": {"steps": 3}}
    runs = []
    for name in ("plain", "placed"):
        folder = tmp_path / name
        folder.mkdir()
        placed = PLACEMENTS["colocated"] | {"rollout": {"lora": publish}} if name == "placed" else {}
        succeed(capsys, "train", configuration(folder, **lora | placed))
        runs.append(folder / "run")
    for ours, theirs in zip(metrics(runs[1])[1:], metrics(runs[0])[1:], strict=True):
        assert ours["actor/loss"] == pytest.approx(theirs["actor/loss"], abs=1e-5)
        assert ours["actor/kl_loss"] == pytest.approx(theirs["actor/kl_loss"], abs=1e-6)
    assert relative_change(runs[1] / "model", runs[0] / "model") <= 1e-3
    for run in runs:  # the adapters alone, which peft adds to the model that the run began with
        succeed(capsys, "export", run, tmp_path / f"{run.parent.name}-adapter", "--adapter")
        start = load_function(f"{CARRY}:tiny_qwen3")(seed=3)[0]
        whole = peft.PeftModel.from_pretrained(start, tmp_path / f"{run.parent.name}-adapter").merge_and_unload()
        exported = load_file(run / "model/model.safetensors")
        for name, tensor in whole.state_dict().items():
            if name in exported:
                torch.testing.assert_close(tensor, exported[name], rtol=0, atol=1e-6)


def test_an_engine_of_the_controllers_process_can_take_weights_that_are_elsewhere(tmp_path: Path) -> None:
    """vLLM and SGLang take them past it; one of a user's own need not know how. Replicas each say what they took."""
    path = Path(configuration(tmp_path, placement={"pools": {"all": 2}}, engine=FSDP2, track={"console": False}))
    with open_run(load_config(path)) as run:
        for _ in range(2):
            stream = run.engine.stream_weights()
            taken, num_bytes = dict[str, int](), 0
            for name, tensor in stream.tensors:
                taken[name] = fingerprint(tensor)
                num_bytes += tensor.nbytes
            assert taken.keys() == stream.names and taken == stream.published
        assert run.publisher.send(run.step) == 2 * num_bytes
        assert run.source.engine.read_back(sorted(taken)) == taken
        assert (run.source.engine.replicas, run.source.engine.cache_block) == (2, 0)


def test_all_weights_have_no_adapter_to_export(tmp_path: Path, capsys: Output) -> None:
    succeed(capsys, "train", configuration(tmp_path))
    assert "it has no adapter" in mistake(capsys, "export", tmp_path / "run", tmp_path / "out", "--adapter")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_same_placed_run_twice_is_the_same_bit_for_bit_also_when_it_was_stopped(
    tmp_path: Path, capsys: Output
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    succeed(capsys, "train", configuration(whole, **PPO | PLACEMENTS["colocated"]))
    config = configuration(parts, **PPO | PLACEMENTS["colocated"])
    for steps in (2, 3):
        succeed(capsys, "train", config, f"train.steps={steps}")
    assert_same_tensors(whole / "run/model/model.safetensors", parts / "run/model/model.safetensors")


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"engine": FSDP2}, "give placement.pools"),
        ({"placement": {"pools": {"all": 2}}}, "engine.strategy local is for one"),
        ({"placement": {"pools": {"all": 4}}, "engine": FSDP2 | {"shard_size": 3}}, "shard_size 3 does not divide"),
        ({"placement": {"pools": {"all": 2}}, "engine": FSDP2 | {"sequence_parallel": 4}}, "does not divide"),
        ({"placement": {"pools": {"all": 1}, "roles": {"aktor": "all"}}}, "did you mean 'actor'?"),
        ({"placement": {"pools": {"all:2": None}}}, "write {all: 2}, with a space"),
        (
            {
                "placement": {"pools": {"a": 1, "b": 1}, "roles": {"rollout": "b"}},
                "rollout": {"engine": "vllm", "mode": "workers"},
            },
            "rollout.mode workers has processes of its own: leave rollout out of placement.roles",
        ),
        (
            {
                "placement": {"pools": {"a": 2}, "roles": {"rollout": "a"}},
                "engine": {"strategy": "fsdp2"},
                "rollout": {"engine": "vllm"},
            },
            "pool 'a' has both vLLM and a sharded model",
        ),
        ({"placement": {"pools": {"all": 1}, "roles": {"actor": "train"}}}, "pool 'train', which does not exist"),
        ({"placement": {"pools": {"all": 1, "more": 2}}}, "nothing is placed in ['more']"),
        ({"placement": {"pools": {"all": 1}, "address": "10.0.0.1:6379"}}, "set placement.backend=ray"),
        ({"engine": {"offload": ["optimizer"]}}, "engine.offload is for fsdp2 or fsdp1, and this is local"),
        (
            {
                "critic": {"shared_trunk": True},
                "placement": {"pools": {"a": 1, "b": 1}, "roles": {"critic": "b"}},
            },
            "puts both in one pool",
        ),
        (
            {
                "model": {"lora": {"rank": 2}},
                "placement": {"pools": {"a": 1, "b": 1}, "roles": {"reference": "b"}},
            },
            "or name model.reference",
        ),
    ],
)
def test_a_placement_that_cannot_be_is_refused_before_anything_starts(
    sections: dict[str, Any], said: str, tmp_path: Path, capsys: Output
) -> None:
    assert said in mistake(capsys, "train", configuration(tmp_path, **PPO | sections))
    assert not (tmp_path / "run").exists()


def test_more_query_heads_than_sequence_parallelism_divides(tmp_path: Path, capsys: Output) -> None:
    wrong = {"placement": {"pools": {"all": 3}}, "engine": FSDP2 | {"sequence_parallel": 3}}
    assert "heads" in mistake(capsys, "train", configuration(tmp_path, **PPO | wrong))


def test_a_sharded_run_in_this_process_leaves_no_process_group(tmp_path: Path, capsys: Output) -> None:
    succeed(capsys, "train", configuration(tmp_path, **PPO | PLACEMENTS["in one worker"] | {"engine": FSDP2}))
    assert not torch.distributed.is_initialized()
