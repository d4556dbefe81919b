"""Going on with a run whose settings or state are not what they were."""

from __future__ import annotations

from pathlib import Path

import pytest

from hybridflow.checkpoint.journal import Journal
from hybridflow.config.load import load_config
from hybridflow.config.sections import RlConfig, SftConfig
from hybridflow.protocols import Group
from hybridflow.trainers.rl_run import open_run
from hybridflow.trainers.sft import open_sft

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
    with open_run(load_config(RlConfig, config, ["train.steps=1", override])) as run:
        assert bool(run.journal.read(3)) is kept


def test_counters_of_a_run_are_restored(tmp_path: Path) -> None:
    rl = load_config(RlConfig, configuration(tmp_path))
    with open_run(rl) as run:
        run.nonfinite_in_a_row = {"actor": 1, "critic": 2}
        run.save(1)
    with open_run(rl) as run:
        assert (run.step, run.nonfinite_in_a_row) == (1, {"actor": 1, "critic": 2})
    sft = load_config(SftConfig, configuration(tmp_path, "sft"), [f"run.folder={tmp_path / 'sft'}"])
    with open_sft(sft) as fine_tuning:
        fine_tuning.recent.extend([0.5, 0.25])
        fine_tuning.save(1)
    with open_sft(sft) as fine_tuning:
        assert list(fine_tuning.recent) == [0.5, 0.25]


def test_a_fine_tuning_that_ended_early_says_how_to_make_it_longer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configuration(tmp_path, "sft", train={"steps": 50, "sequences_per_update": 4, "stop_below_loss": 100})
    succeed(capsys, "sft", config)
    assert "raise train.steps (or train.epochs) or lower train.stop_below_loss" in mistake(capsys, "sft", config)


def test_sequences_longer_than_the_context_are_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configuration(tmp_path, rollout={"max_response_tokens": 250})
    assert "sequence has 266 tokens, the model's context is 256" in mistake(capsys, "train", config)
    assert not (tmp_path / "run/metrics.jsonl").exists()
