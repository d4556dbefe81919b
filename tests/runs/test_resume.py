"""Going on: adapters bit for bit, and checkpoints that cannot be gone on with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from hybridflow.cli.main import main
from hybridflow.config.locate import load_function

from runs import assert_same_tensors, configuration, metrics, mistake, succeed
from tiny import CARRY

Output = pytest.CaptureFixture[str]


@pytest.mark.parametrize("command", ["train", "sft"])
def test_a_run_with_adapters_goes_on_bit_for_bit_and_trains_only_them(
    command: str, tmp_path: Path, capsys: Output
) -> None:
    folders = [tmp_path / "whole", tmp_path / "parts"]
    for folder in folders:
        folder.mkdir()
    whole, parts = (
        configuration(f, command, model={"lora": {"rank": 4}}, optim={"lr": 1e-2}, train={"steps": 3}) for f in folders
    )
    succeed(capsys, command, whole, "checkpoint.every=1")
    succeed(capsys, command, parts, "train.steps=2")
    succeed(capsys, command, parts)
    for file in ("adapter/adapter_model.safetensors", "optimizer.safetensors"):
        assert_same_tensors(*(f / "run/checkpoints/step-000003" / file for f in folders))
    assert_same_tensors(*(f / "run/model/model.safetensors" for f in folders))
    measured = [
        [{k: v for k, v in m.items() if not k.startswith(("timing_s", "perf", "val-"))} for m in metrics(f / "run")]
        for f in folders
    ]
    assert measured[0] == measured[1]

    first, last = (
        load_file(folders[0] / f"run/checkpoints/step-00000{s}/adapter/adapter_model.safetensors") for s in (2, 3)
    )
    assert all("lora_" in n for n in last) and any(not last[n].equal(first[n]) for n in last)
    moments = load_file(folders[0] / "run/checkpoints/step-000003/optimizer.safetensors")
    assert moments and all("lora_" in n for n in moments)
    base = load_function(f"{CARRY}:tiny_qwen3")(seed=3)[0].state_dict()
    merged = load_file(folders[0] / "run/model/model.safetensors")
    moved = {n for n, t in merged.items() if not t.equal(base[n])}
    assert moved and all(n.endswith("proj.weight") for n in moved)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of two steps, a checkpoint after each."""
    folder = tmp_path_factory.mktemp("saved")
    assert main(["train", configuration(folder), "checkpoint.every=1"]) == 0
    return folder


def copy_of(saved: Path, folder: Path) -> tuple[str, Path]:
    """The run in a folder of its own: its configuration, which goes on for a third step, and the newest checkpoint."""
    shutil.copytree(saved / "run", folder / "run", ignore=lambda *_: [".lock"])
    settings = (folder / "run/config.yaml").read_text().replace(str(saved), str(folder))
    (folder / "run/config.yaml").write_text(settings)
    config = configuration(folder, train={"steps": 3})
    return config, folder / "run/checkpoints/step-000002"


@pytest.mark.parametrize(
    ("name", "damage", "expected"),
    [
        ("model/model.safetensors", "cut", "model/model.safetensors has"),
        ("optimizer.safetensors", "altered", "optimizer.safetensors was altered since it was written"),
        ("state.json", "gone", "state.json is missing"),
        ("manifest.json", "cut", "manifest.json cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_can_be_used(
    name: str, damage: str, expected: str, saved: Path, tmp_path: Path, capsys: Output
) -> None:
    config, newest = copy_of(saved, tmp_path)
    content = (newest / name).read_bytes()
    (newest / name).unlink()
    if damage == "cut":
        (newest / name).write_bytes(content[:-10])
    elif damage == "altered":
        (newest / name).write_bytes(content[:-1] + b"\xff")
    for arguments in (["train", config], ["export", tmp_path / "run", tmp_path / "target"]):
        said = mistake(capsys, *arguments)
        assert f"the checkpoint {newest} is damaged: {expected}" in said
        assert f"fix: delete {newest} to resume from the checkpoint before it" in said
    assert [m["step"] for m in metrics(tmp_path / "run")] == [0, 1, 2]
    shutil.rmtree(newest)
    succeed(capsys, "train", config)
    assert [m["step"] for m in metrics(tmp_path / "run")] == [0, 1, 2, 3]


def test_a_checkpoint_of_another_model_or_kind(saved: Path, tmp_path: Path, capsys: Output) -> None:
    config, newest = copy_of(saved, tmp_path)
    (tmp_path / "run/config.yaml").unlink()  # it would have refused both, by its keys
    said = mistake(capsys, "train", config, "model.lora.rank=2")
    assert f"the checkpoint {newest} holds all weights, the configuration trains adapters (model.lora)" in said
    assert "fix: give the model.lora that the run began with" in said
    model, tokenizer = load_function(f"{CARRY}:tiny_qwen3")()
    model.resize_token_embeddings(len(tokenizer) + 1)
    model.save_pretrained(tmp_path / "wider")
    tokenizer.save_pretrained(tmp_path / "wider")
    said = mistake(capsys, "train", config, f"model.path={tmp_path / 'wider'}")
    assert f"the checkpoint {newest} is from another model: " in said
    assert "is (100, 128) there and (101, 128) here" in said and "fix: give the model.path" in said


def test_a_checkpoint_of_adapters_does_not_fit_all_weights_or_another_rank(tmp_path: Path, capsys: Output) -> None:
    config = configuration(tmp_path)
    succeed(capsys, "train", config, "model.lora.rank=2", "train.steps=1")
    newest = tmp_path / "run/checkpoints/step-000001"
    (tmp_path / "run/config.yaml").unlink()
    said = mistake(capsys, "train", config)
    assert f"the checkpoint {newest} holds adapters only, the configuration trains all weights" in said
    said = mistake(capsys, "train", config, "model.lora.rank=3")
    assert "are of another shape than model.lora says" in said and "fix: give the model.path and model.lora" in said


def test_export_of_a_run_without_its_configuration(saved: Path, tmp_path: Path, capsys: Output) -> None:
    copy_of(saved, tmp_path)
    (tmp_path / "run/config.yaml").unlink()
    assert f"{tmp_path / 'run'} has no config.yaml" in mistake(capsys, "export", tmp_path / "run", tmp_path / "target")
    for damaged in ("model: [", "", "model: 1", "model: {path: x}"):
        (tmp_path / "run/config.yaml").write_text(damaged)
        said = mistake(capsys, "export", tmp_path / "run", tmp_path / "target")
        assert f"{tmp_path / 'run/config.yaml'} cannot be read any more: " in said and "fix: restore it" in said


def test_the_records_of_steps_after_the_checkpoint_are_dropped(saved: Path, tmp_path: Path, capsys: Output) -> None:
    config, newest = copy_of(saved, tmp_path)
    shutil.rmtree(newest)
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    (tmp_path / "run/metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 3, "torn')
    succeed(capsys, "train", config, "train.steps=2")
    again = metrics(tmp_path / "run")
    assert [m["step"] for m in again] == [0, 1, 2]
    assert again[2]["actor/grad_norm"] == json.loads(lines[2])["actor/grad_norm"]
    assert_same_tensors(tmp_path / "run/model/model.safetensors", saved / "run/model/model.safetensors")
