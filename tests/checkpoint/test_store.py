"""Checkpoints: whole or absent, checked file by file, the newest few kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hybridflow.checkpoint.store import (
    Best,
    NewCheckpoint,
    read_best,
    read_checkpoint,
    saved_steps,
    step_folder,
    whole_folder,
)
from hybridflow.errors import UserError


def save(
    folder: Path,
    step: int,
    *,
    keep: int = 2,
    write: Callable[[Path], None] | None = None,
    best: Best | None = None,
) -> Path:
    def write_engines(target: Path) -> None:
        (target / "model").mkdir()
        (target / "model/w.safetensors").write_bytes(bytes([step]) * 200)
        (target / "engine.json").write_text('{"steps_done": 4}')

    new = NewCheckpoint(folder, step, {"drawn": 12, "recent": [0.1]}, keep, best)
    with new.telling():
        new.begin()
        (write or write_engines)(new.folder)
        new.complete()
    return step_folder(folder, step)


def test_what_was_saved_reads_back_as_it_was(tmp_path: Path) -> None:
    folder = save(tmp_path / "checkpoints", 7)
    assert folder == step_folder(tmp_path / "checkpoints", 7) and folder.name == "step-000007"
    assert read_checkpoint(folder) == {"drawn": 12, "recent": [0.1], "step": 7}
    assert (folder / "model/w.safetensors").read_bytes() == b"\x07" * 200


def test_a_checkpoint_has_the_state_of_when_it_was_begun(tmp_path: Path) -> None:
    state: dict[str, Any] = {"drawn": 12, "recent": [0.1], "nonfinite_in_a_row": {}}
    new = NewCheckpoint(tmp_path, 7, state, keep=2)
    new.begin()
    state["drawn"] = 13
    state["recent"].append(0.2)
    state["nonfinite_in_a_row"]["actor"] = 1
    new.complete()
    expected = {"drawn": 12, "recent": [0.1], "nonfinite_in_a_row": {}, "step": 7}
    assert read_checkpoint(step_folder(tmp_path, 7)) == expected


def test_the_manifest_names_every_file(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    files = {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    entries = json.loads((folder / "manifest.json").read_text())
    assert files.keys() - entries.keys() == {"manifest.json"}
    assert {name: e["bytes"] for name, e in entries.items()} == {n: files[n] for n in entries}
    assert sorted(entries) == ["engine.json", "model/w.safetensors", "state.json"]


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (2, 4, 10, 6):
        save(tmp_path, step, keep=2)
    assert saved_steps(tmp_path) == [6, 10]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000006", "step-000010"]
    save(tmp_path, 12, keep=1)
    assert saved_steps(tmp_path) == [12]


def test_the_best_is_kept_until_another_is_better(tmp_path: Path) -> None:
    first, second = Best(2, "val-core/x/reward/mean@1", 0.5), Best(6, "val-core/x/reward/mean@1", 0.7)
    assert read_best(tmp_path) is None
    for step, best in [(1, None), (2, first), (3, first), (4, first), (5, first)]:
        save(tmp_path, step, keep=2, best=best)
    assert saved_steps(tmp_path) == [2, 4, 5] and read_best(tmp_path) == first
    save(tmp_path, 6, keep=2, best=second)
    assert saved_steps(tmp_path) == [5, 6] and read_best(tmp_path) == second
    shutil.rmtree(step_folder(tmp_path, 6))
    assert read_best(tmp_path) is None, "what it names is gone"


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    (folder / "stray").write_text("of the first time")
    save(tmp_path, 3)
    assert not (folder / "stray").exists() and read_checkpoint(folder)["step"] == 3


def test_no_space_leaves_nothing_and_the_old_one_stands(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"

    def full(target: Path) -> None:
        (target / "half").write_bytes(b"0" * 1000)
        with open("/dev/full", "wb") as disk:
            disk.write(b"0" * 100_000)

    with pytest.raises(UserError, match=r"the checkpoint of step 1 could not be saved: .*No space left") as caught:
        save(checkpoints, 1, write=full)
    assert caught.value.why == "there is no earlier checkpoint"
    assert list(checkpoints.iterdir()) == []
    save(checkpoints, 1)
    with pytest.raises(UserError, match=r"the checkpoint of step 2 could not be saved: .*No space left") as caught:
        save(checkpoints, 2, write=full, keep=1)
    assert caught.value.why == "the checkpoint of step 1 still stands"
    assert caught.value.fix == f"make room on the disk of {checkpoints} and run the same command again"
    assert [p.name for p in checkpoints.iterdir()] == ["step-000001"]
    read_checkpoint(step_folder(checkpoints, 1))


def test_ctrl_c_while_a_folder_is_written_leaves_nothing_and_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()

    def interrupted() -> None:
        with whole_folder(tmp_path / "model", lambda error: UserError("full")) as aside:
            (aside / "half").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_fault_of_another_kind_keeps_its_type_and_leaves_nothing(tmp_path: Path) -> None:
    def wrong(target: Path) -> None:
        (target / "half").write_text("half")
        raise KeyError("no such tensor")

    save(tmp_path, 1)
    with pytest.raises(KeyError):
        save(tmp_path, 2, write=wrong)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]


def test_a_folder_that_a_kill_left_half_written_does_not_count(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / ".partial-step-000002/model").mkdir(parents=True)
    (tmp_path / ".partial-step-000002/stale").write_text("x")
    (tmp_path / "step-000009").mkdir()
    assert saved_steps(tmp_path) == [1]
    assert not (save(tmp_path, 2) / "stale").exists()
    assert saved_steps(tmp_path) == [1, 2] and not (tmp_path / ".partial-step-000002").exists()
    assert saved_steps(tmp_path / "nowhere") == []


@pytest.mark.parametrize("name", ["engine.json", "model/w.safetensors", "state.json"])
def test_damage_names_the_file_and_says_how(name: str, tmp_path: Path) -> None:
    folder = save(tmp_path, 5)
    whole = (folder / name).read_bytes()
    cases: list[tuple[bytes | None, str]] = [
        (whole[:-3], f"{name} has {len(whole) - 3} bytes, {len(whole)} were written"),
        (whole[:-1] + bytes([whole[-1] ^ 1]), f"{name} was altered since it was written"),
        (None, f"{name} is missing"),
    ]
    for content, problem in cases:
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content)
        with pytest.raises(UserError) as caught:
            read_checkpoint(folder)
        assert caught.value.what == f"the checkpoint {folder} is damaged: {problem}"
        assert f"delete {folder} to resume from the checkpoint before it" in caught.value.fix
        (folder / name).write_bytes(whole)
    read_checkpoint(folder)


def test_a_cut_manifest_is_damage_too(tmp_path: Path) -> None:
    folder = save(tmp_path, 5)
    manifest = folder / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"is damaged: manifest\.json cannot be read"):
        read_checkpoint(folder)
