"""Checkpoints of engines that are cut over real processes: whoever wrote them, and whoever goes on with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from hybridflow.engines.shards import saved_shapes, whole_tensors
from hybridflow.errors import UserError
from hybridflow.models import files

from on_ranks.checkpoints import (
    begin,
    export,
    load_what_does_not_fit,
    save_from_wrecks,
    save_then_wreck,
    save_where_there_is_no_room,
    state_of,
    step,
    take_over,
    train_while_saving,
)
from on_ranks.engines import Case
from ranks import shared_ranks

FSDP2, FSDP1 = {"strategy": "fsdp2"}, {"strategy": "fsdp1"}
WAYS = {
    "FSDP2, 1": (1, FSDP2),
    "FSDP2, 2": (2, FSDP2),
    "FSDP1, 2": (2, FSDP1),
    "FSDP2, 4": (4, FSDP2),
    "HSDP, 4": (4, FSDP2 | {"shard_size": 2}),
    "FSDP1 HSDP, 4": (4, FSDP1 | {"shard_size": 2}),
}
KINDS = {
    "experts": {"kind": "qwen3_moe"},
    "tied": {"kind": "gemma2"},
    "saved buffers": {"kind": "deepseek_v3"},
    "adapters": {"lora": True},
    "critic": {"head": True},
}


def case(kind: str, section: dict[str, object] | None = None) -> Case:
    # AdamW's eps bounds what rounding of a gradient near zero may do to a weight.
    return Case(**KINDS[kind], section=section or {}, optim={"lr": 1e-3, "eps": 1e-4})  # type: ignore[arg-type]


def made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and expected
    assert [n for n, t in expected.items() if not t.equal(found[n])] == []


def gap(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[n] - t).abs().max()) for n, t in expected.items())


def go_through(kind: str, ways: list[str], folder: Path) -> None:
    """Checkpoints of two ranks and of a local engine are taken over in each of the ways, and by a local engine."""
    straight = case(kind).local()
    losses = [step(straight) for _ in range(3)]
    local = case(kind).local()
    step(local)
    local.save(made(folder / "local"))
    saved = {"local": state_of(local)}
    saved["sharded"] = shared_ranks(2).run(begin, case(kind, FSDP2), made(folder / "sharded"))[0]
    assert gap(saved["sharded"], saved["local"]) < 1e-6
    for way in ways:
        ranks, section = WAYS[way]
        for source, state in saved.items():
            target = made(folder / f"{way} from {source}")
            parts = shared_ranks(ranks).run(take_over, case(kind, section), folder / source, target, 2)
            loaded, after, end = parts[0]
            assert_same(loaded, state)
            assert after == pytest.approx(losses[1:], abs=1e-6) and gap(end, state_of(straight)) < 1e-6
            other = case(kind).local()
            step(other)
            other.load(target)
            assert_same(state_of(other), state)


# Of the others test_every_way_takes_over_every_checkpoint shows it, and of experts the next test.
@pytest.mark.parametrize("kind", ["saved buffers", "adapters", "critic"])
def test_a_checkpoint_is_taken_over_by_another_strategy_and_training_goes_on_equal(kind: str, tmp_path: Path) -> None:
    go_through(kind, ["FSDP1, 2"], tmp_path)


def test_a_checkpoint_of_two_ranks_is_taken_over_by_any_number(tmp_path: Path) -> None:
    go_through("experts", ["FSDP2, 1", "HSDP, 4"], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_way_takes_over_every_checkpoint(kind: str, tmp_path: Path) -> None:
    go_through(kind, list(WAYS), tmp_path)


def test_a_checkpoint_has_every_tensor_once_and_no_rank_writes_all(tmp_path: Path) -> None:
    state = shared_ranks(2).run(begin, case("tied", FSDP2), tmp_path)[0]
    assert saved_shapes(tmp_path / "shards") == {name: tuple(t.shape) for name, t in state.items()}
    assert not any("lm_head" in name for name in state)
    sizes = [p.stat().st_size for p in (tmp_path / "shards").iterdir()]
    assert len(sizes) == 2 and max(sizes) < 0.6 * sum(sizes)
    assert json.loads((tmp_path / "engine.json").read_text()) == {"steps_done": 1}
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["config.json", "generation_config.json"]


def test_large_files_are_cut_and_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = shared_ranks(2).run(begin, case("tied", FSDP2), tmp_path)[0]
    monkeypatch.setattr("hybridflow.engines.shards.FILE_BYTES", 10_000)
    names = {name.removeprefix("exp_avg/") for name in state if name.startswith("exp_avg/")}
    again = dict(whole_tensors(tmp_path / "shards", "exp_avg/"))
    assert_same(again, {name: state[f"exp_avg/{name}"] for name in names})


@pytest.mark.parametrize("section", [FSDP2, FSDP1], ids=["fsdp2", "fsdp1"])
@pytest.mark.parametrize("kind", ["experts", "tied", "adapters"])
def test_an_export_is_what_transformers_would_save(
    kind: str, section: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared_ranks(2).run(export, case(kind, section), made(tmp_path / "streamed"))
    local = case(kind).local()
    step(local)
    local.export(made(tmp_path / "saved"))
    streamed, saved = (load_file(tmp_path / name / "model.safetensors") for name in ("streamed", "saved"))
    assert gap(streamed, saved) < 1e-6
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("streamed", "saved")]
    assert configs[0] == configs[1]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "streamed").state_dict()
    assert gap(loaded, AutoModelForCausalLM.from_pretrained(tmp_path / "saved").state_dict()) < 1e-6


def test_an_export_in_several_files_reads_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = case("experts").model()
    monkeypatch.setattr(files, "FILE_BYTES", 20_000)
    files.write_streamed(model, model.state_dict().items(), tmp_path, torch.bfloat16)
    parts = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert len(parts) > 2 and parts[0] == f"model-00001-of-{len(parts):05d}.safetensors"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert_same(loaded.state_dict(), {n: t.bfloat16() for n, t in model.state_dict().items()})


def test_a_checkpoint_of_another_model_is_refused_by_name_on_every_rank(tmp_path: Path) -> None:
    shared_ranks(2).run(begin, case("experts", FSDP2), made(tmp_path / "sharded"))
    local = case("experts").local()
    local.save(made(tmp_path / "local"))
    for source in ("sharded", "local"):
        folder = tmp_path / source
        for said in shared_ranks(2).run(load_what_does_not_fit, case("tied", FSDP2), folder):
            assert f"the checkpoint {folder} is from another model: it lacks model." in said
        for said in shared_ranks(2).run(load_what_does_not_fit, case("adapters", FSDP2), folder):
            assert f"the checkpoint {folder} holds all weights, the configuration trains adapters" in said
        with pytest.raises(UserError, match="is from another model: it lacks model"):
            case("tied").local().load(folder)


@pytest.mark.parametrize("background", [False, True])
def test_a_disk_that_refuses_is_told_on_every_rank(background: bool, tmp_path: Path) -> None:
    (tmp_path / "shards").write_text("no folder")
    for said in shared_ranks(2).run(save_where_there_is_no_room, case("tied", FSDP2), tmp_path, background):
        assert said.startswith(("FileExistsError", "NotADirectoryError"))


@pytest.mark.parametrize("section", [FSDP2, FSDP1], ids=["fsdp2", "fsdp1"])
def test_what_is_saved_in_the_background_is_the_state_of_then(section: dict[str, str], tmp_path: Path) -> None:
    state = shared_ranks(2).run(train_while_saving, case("tied", section), tmp_path)[0]
    other = case("tied").local()
    other.load(tmp_path)
    assert_same(state_of(other), state)


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_local_engine_writes_in_the_background_what_nothing_live_is_read_for(kind: str, tmp_path: Path) -> None:
    engine = case(kind).local()
    step(engine)
    engine.save(made(tmp_path / "at once"))
    save_then_wreck(engine, made(tmp_path / "beside"))
    assert files_in(tmp_path / "beside") == files_in(tmp_path / "at once")
    for config in tmp_path.glob("*/adapter/adapter_config.json"):  # names of modules, in no order of chance
        names = json.loads(config.read_text())["target_modules"]
        assert len(names) > 2 and names == sorted(names)


@pytest.mark.parametrize("section", [FSDP2, FSDP1], ids=["fsdp2", "fsdp1"])
@pytest.mark.parametrize("kind", ["saved buffers", "critic"])
def test_a_sharded_engine_writes_in_the_background_what_nothing_live_is_read_for(
    kind: str, section: dict[str, object], tmp_path: Path
) -> None:
    shared_ranks(2).run(save_from_wrecks, case(kind, section), made(tmp_path / "at once"), made(tmp_path / "beside"))
    at_once, beside = files_in(tmp_path / "at once"), files_in(tmp_path / "beside")
    shards = {name for name in at_once if name.startswith("shards/")}  # the order in their headers is free
    assert beside.keys() == at_once.keys() and all(beside[n] == at_once[n] for n in at_once.keys() - shards)
    assert "model/config.json" in beside and shards
    assert_same(*(dict(whole_tensors(tmp_path / name / "shards", "")) for name in ("beside", "at once")))
