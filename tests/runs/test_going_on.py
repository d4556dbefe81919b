"""Going on with a run whose settings or state are not what they were."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from hybridflow.checkpoint.journal import Journal
from hybridflow.config.kinds.sft import SftConfig
from hybridflow.config.load import load_config
from hybridflow.protocols.groups import Group
from hybridflow.tracking.events import read_events
from hybridflow.trainers.rl.run import open_run
from hybridflow.trainers.sft import open_sft
from hybridflow.viewer.report import gather

from runs import configuration, mistake, succeed


@pytest.mark.parametrize(("override", "kept"), [("optim.lr=5e-4", False), ("run.max_minutes=60", True)])
def test_journaled_answers_of_weights_that_will_not_be_are_not_used(
    override: str, kept: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configuration(tmp_path, checkpoint={"every": 1})
    succeed(capsys, "train", config, "train.steps=1")
    journal = Journal(tmp_path / "run/journal")
    journal.append(3, Group(99, 0, [1], []))
    (tmp_path / "run/model-step").unlink()  # as if it had been killed just before its end
    with open_run(load_config(config, ["train.steps=1", override])) as run:
        assert bool(run.journal.read(3)) is kept


def test_counters_of_a_run_are_restored(tmp_path: Path) -> None:
    rl = load_config(configuration(tmp_path))
    with open_run(rl) as run:
        run.nonfinite.in_a_row = {"actor": 1, "critic": 2}
        run.save(1)
    with open_run(rl) as run:
        assert (run.step, run.nonfinite.in_a_row) == (1, {"actor": 1, "critic": 2})
    sft = load_config(configuration(tmp_path, "sft"), [f"run.folder={tmp_path / 'sft'}"], kind=SftConfig)
    with open_sft(sft) as fine_tuning:
        fine_tuning.recent.extend([0.5, 0.25])
        fine_tuning.save(1)
    with open_sft(sft) as fine_tuning:
        assert list(fine_tuning.recent) == [0.5, 0.25]


DONE = "the run in {run} is already done: {steps}; its model is in {run}/model; "
LONGER = "{fix} to train longer, or choose another run.folder\n"
UNUSED = "nothing was trained with the settings that changed since: optim.lr was 0.001, is 0.0005; "


def files_of(run: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != ".lock"}


@pytest.mark.parametrize(
    ("command", "train", "said_of"),
    [
        (
            "train",
            {"steps": 2},
            {
                (): "2 of 2 steps",
                ("run.max_minutes=60", "run.resume=moved"): "2 of 2 steps",
                ("train.steps=1", "optim.lr=5e-4"): "2 steps, and 1 are asked for",
            },
        ),
        ("train", {"steps": None, "epochs": 1}, {(): "15 of 15 steps"}),
        ("sft", {"steps": None, "epochs": 1}, {("optim.lr=5e-4",): "7 of 7 steps", ("train.epochs=2",): None}),
        ("sft", {"steps": 50, "stop_below_loss": 100}, {(): "20 of 20 steps", ("train.steps=40",): "20 of 20 steps"}),
    ],
)
def test_a_run_that_is_done_and_started_again_says_so_in_a_line_and_ends_well(
    command: str,
    train: dict[str, Any],
    said_of: dict[tuple[str, ...], str | None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    config = configuration(tmp_path, command, train=train)
    if command == "train":
        rows = [{"prompt": f"{i}+1=", "ground_truth": str(i + 1)} for i in range(30)]
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        data = {"train": str(tmp_path / "rows.jsonl"), "eval": None}
        config = configuration(tmp_path, data=data, train=train, rollout={"max_response_tokens": 2})
    succeed(capsys, command, config)
    before = files_of(run)
    fix = "raise train.steps (or train.epochs)"
    fix += " or lower train.stop_below_loss" if "stop_below_loss" in train else ""
    for overrides, steps in said_of.items():
        said = succeed(capsys, command, config, *overrides)
        if steps is None:
            assert "is already done" not in said and files_of(run) != before
            continue
        unused = UNUSED if "optim.lr=5e-4" in overrides else ""
        assert said.splitlines(True)[-1] == (DONE + unused + LONGER).format(run=run, steps=steps, fix=fix)
        assert len(said.splitlines()) == 1 or overrides == ("train.steps=40",)  # which only loading the run can tell
        assert files_of(run) == before


def test_a_run_that_is_done_is_taken_up_where_more_is_asked_for_or_its_model_is_gone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = configuration(tmp_path, "sft", train={"steps": 2}, track={"console": True}), tmp_path / "run"
    succeed(capsys, "sft", config)
    shutil.rmtree(run / "model")
    assert f"model: {run / 'model'}" in succeed(capsys, "sft", config)
    said = succeed(capsys, "sft", config, "train.steps=3", "optim.lr=5e-4")
    assert f"resuming after step 2 of 3, from {run / 'checkpoints/step-000002'}\n" in said
    assert "settings changed since: optim.lr was 0.001, is 0.0005; train.steps was 2, is 3\n" in said
    assert "sft 3/3" in said
    with open_sft(load_config(config, ["train.steps=5"], kind=SftConfig)):
        pass  # as if it was killed before its next checkpoint: what was done is not what is asked for now
    assert "sft 5/5" in succeed(capsys, "sft", config, "train.steps=5")


def test_a_run_that_was_stopped_after_more_steps_than_are_asked_for_now_ends_where_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = configuration(tmp_path, "sft", train={"steps": 4}, checkpoint={"every": 3}), tmp_path / "run"
    succeed(capsys, "sft", config)
    shutil.rmtree(run / "checkpoints/step-000004")
    (run / "model-step").unlink()
    assert f"model: {run / 'model'}" in succeed(capsys, "sft", config, "train.steps=2")
    last = read_events(run / "events.jsonl")[-2:]
    assert [e["text"] for e in last] == ["3 steps are done, more than the 2 asked for: the run ends here", "3 steps"]
    assert {"label": "Steps", "value": "3", "note": "of 3"} in gather(run)["tiles"]


def test_sequences_longer_than_the_context_are_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configuration(tmp_path, rollout={"max_response_tokens": 250})
    assert "sequence has 266 tokens, the model's context is 256" in mistake(capsys, "train", config)
    assert not (tmp_path / "run/metrics.jsonl").exists()
