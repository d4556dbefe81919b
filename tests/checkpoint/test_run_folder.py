"""The folder of a run: one process, one configuration."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from hybridflow.checkpoint.run_folder import RunFolder, flatten, write_atomically
from hybridflow.errors import UserError

CONFIG: dict[str, Any] = {
    "run": {"seed": 1, "folder": "x"},
    "model": {"path": "m", "lora": None},
    "data": {"train": "t", "shuffle": True},
    "train": {"steps": 3, "prompts_per_step": 2, "samples_per_prompt": 4},
    "optim": {"lr": 0.1, "betas": [0.9, 0.99]},
}
HOLDER = (
    "import sys\nfrom pathlib import Path\nfrom hybridflow.checkpoint.run_folder import RunFolder\n"
    "with RunFolder(Path(sys.argv[1]), {}, resume='auto'):\n    print('held', flush=True)\n    sys.stdin.read()\n"
)


def with_value(key: str, value: Any) -> dict[str, Any]:
    section, _, name = key.partition(".")
    return {**CONFIG, section: {**CONFIG[section], name: value}}


def begun(path: Path) -> Path:
    """A folder in which a run with `CONFIG` has made a step."""
    with RunFolder(path, CONFIG, resume="auto") as folder:
        folder.keep_config()
        (path / "metrics.jsonl").write_text('{"step": 1}\n')
    return path


def test_a_second_process_is_refused_until_the_first_has_ended_however_it_ends(tmp_path: Path) -> None:
    for end in (signal.SIGKILL, None):
        holder = subprocess.Popen(
            [sys.executable, "-c", HOLDER, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert holder.stdin is not None and holder.stdout is not None
        with holder:
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(UserError) as caught:
                RunFolder(tmp_path, {}, resume="auto")
            if end is not None:
                holder.send_signal(end)
        assert caught.value.what == f"another process (pid {holder.pid}) is running in {tmp_path}"
        assert "two runs in one folder" in caught.value.why and "wait for it, stop it" in caught.value.fix
        RunFolder(tmp_path, {}, resume="auto").close()


def test_a_folder_that_was_refused_is_not_kept_locked(tmp_path: Path) -> None:
    begun(tmp_path)
    for config, resume in [(with_value("run.seed", 2), "auto"), (CONFIG, "never")]:
        with pytest.raises(UserError):
            RunFolder(tmp_path, config, resume=resume)
    RunFolder(tmp_path, CONFIG, resume="auto").close()


def test_the_configuration_is_kept_resolved(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "a/b", CONFIG, resume="never") as folder:
        folder.keep_config()
        assert yaml.safe_load((folder.path / "config.yaml").read_text()) == CONFIG
        assert folder.changed == {}


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("run.seed", 2, "run.seed was 1, is 2"),
        ("model.path", "other", "model.path was m, is other"),
        ("model.lora", {"rank": 8, "alpha": 16}, "model.lora.alpha was unset, is 16, model.lora.rank was unset, is 8"),
        ("data.train", "u", "data.train was t, is u"),
        ("data.shuffle", False, "data.shuffle was true, is false"),
        ("train.prompts_per_step", 3, "train.prompts_per_step was 2, is 3"),
        ("train.samples_per_prompt", 2, "train.samples_per_prompt was 4, is 2"),
    ],
)
def test_what_makes_it_another_run_is_refused(key: str, value: Any, shown: str, tmp_path: Path) -> None:
    begun(tmp_path)
    before = (tmp_path / "config.yaml").read_bytes()
    with pytest.raises(UserError) as caught:
        RunFolder(tmp_path, with_value(key, value), resume="auto")
    assert caught.value.what == f"{tmp_path} holds a run with other settings: {shown}"
    assert caught.value.why == "resuming with them would mix two runs"
    assert (tmp_path / "config.yaml").read_bytes() == before


def test_what_may_change_is_told_and_kept(tmp_path: Path) -> None:
    changed = {**with_value("optim.lr", 0.2), "train": {**CONFIG["train"], "steps": 9}, "track": {"wandb": True}}
    with RunFolder(begun(tmp_path), changed, resume="auto") as folder:
        assert list(folder.changed) == ["optim.lr", "track.wandb", "train.steps"]
        assert folder.changed["optim.lr"] == (CONFIG["optim"]["lr"], 0.2)
        before = (tmp_path / "config.yaml").read_bytes()
    with RunFolder(tmp_path, CONFIG, resume="auto") as folder:  # nobody has gone on with the others
        assert folder.changed == {} and (tmp_path / "config.yaml").read_bytes() == before
    with RunFolder(tmp_path, changed, resume="auto") as folder:
        folder.keep_config()
    with RunFolder(tmp_path, changed, resume="auto") as folder:
        assert folder.changed == {}


def test_a_start_that_failed_before_anything_was_recorded_does_not_bind(tmp_path: Path) -> None:
    for config in (CONFIG, with_value("model.path", "mended")):
        with RunFolder(tmp_path, config, resume="auto") as folder:
            folder.keep_config()
        for name in ("journal", "checkpoints"):
            (tmp_path / name).mkdir(exist_ok=True)
    (tmp_path / "journal/step-000001.jsonl").touch()
    with pytest.raises(UserError, match=r"model\.path was mended, is m"):
        RunFolder(tmp_path, CONFIG, resume="auto")


def test_resume_never_refuses_a_folder_with_a_run_only(tmp_path: Path) -> None:
    RunFolder(tmp_path, CONFIG, resume="never").close()
    RunFolder(tmp_path, CONFIG, resume="never").close()
    with pytest.raises(UserError, match=r"already holds a run, and run\.resume is never"):
        RunFolder(begun(tmp_path), CONFIG, resume="never")


def test_tuples_and_lists_are_the_same_setting() -> None:
    assert flatten({"a": {"b": (1, 2)}, "c": 3}) == flatten({"a": {"b": [1, 2]}, "c": 3}) == {"a.b": [1, 2], "c": 3}


def test_a_text_is_replaced_whole(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a.txt", "one")
    write_atomically(tmp_path / "a.txt", "two")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a.txt": "two"}
    with pytest.raises(UnicodeEncodeError):
        write_atomically(tmp_path / "a.txt", "three \ud800")
    assert (tmp_path / "a.txt").read_text() == "two"


def moved_run(tmp_path: Path) -> dict[str, Any]:
    """A run that was begun with a model's folder and rows, both of which have moved since; its configuration then."""
    for name in ("config.json", "a.safetensors"):
        (tmp_path / "old/m").mkdir(parents=True, exist_ok=True)
        (tmp_path / "old/m" / name).write_text(f"{name}\n" * 20_000)
    (tmp_path / "old/rows.jsonl").write_text("{}\n" * 9)
    (tmp_path / "old/f.py").write_text("def order(rows): ...\n")
    data = {
        "train": [{"source": str(tmp_path / "old/rows.jsonl"), "weight": 2.0}],
        "order": f"{tmp_path}/old/f.py:order",
    }
    config = CONFIG | {"model": {"path": str(tmp_path / "old/m")}, "data": data}
    with RunFolder(tmp_path / "run", config, resume="auto") as folder:
        folder.keep_config()
    (tmp_path / "run/metrics.jsonl").touch()
    (tmp_path / "old").rename(tmp_path / "new")
    now: dict[str, Any] = json.loads(json.dumps(config).replace(f"{tmp_path}/old", f"{tmp_path}/new"))
    return now


def test_files_that_have_moved_are_known_by_what_is_in_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = moved_run(tmp_path)
    RunFolder(tmp_path / "run", now, resume="auto").close()
    monkeypatch.chdir(tmp_path / "new")
    elsewhere = json.loads(json.dumps(now).replace(f"{tmp_path}/new/", ""))
    with RunFolder(tmp_path / "run", elsewhere, resume="auto") as folder:
        folder.keep_config()
    RunFolder(tmp_path / "run", now, resume="auto").close()
    monkeypatch.chdir(tmp_path)  # a name beside nothing is not what it was
    (tmp_path / "run/files.json").unlink()
    with pytest.raises(UserError, match=r"data\.order was f\.py:order, is ") as caught:
        RunFolder(tmp_path / "run", now, resume="auto")
    assert f"data.train was rows.jsonl (weight 2), is {tmp_path}/new/rows.jsonl (weight 2)" in caught.value.what
    assert "where files have only moved, set run.resume=moved" in caught.value.fix
    RunFolder(tmp_path / "run", now, resume="moved").close()


@pytest.mark.parametrize("file", ["m/config.json", "m/a.safetensors", "rows.jsonl", "f.py"])
def test_other_files_in_another_place_are_refused(file: str, tmp_path: Path) -> None:
    now = moved_run(tmp_path)
    with (tmp_path / "new" / file).open("r+") as stream:
        stream.write("#")
    with pytest.raises(UserError, match="holds a run with other settings"):
        RunFolder(tmp_path / "run", now, resume="auto")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.order", "shuffled"),
        ("data.train", [{"source": "x", "weight": 1.0}]),
        ("run.seed", 9),
        ("data.order", None),
    ],
)
def test_moved_is_for_files_alone(key: str, value: Any, tmp_path: Path) -> None:
    now = moved_run(tmp_path)
    section, _, name = key.partition(".")
    with pytest.raises(UserError, match=key):
        RunFolder(tmp_path / "run", now | {section: now[section] | {name: value}}, resume="moved")
