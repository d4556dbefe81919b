"""A loss that is not finite: reported, not applied, and after three in a row the end, with the rows named."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from hybridflow.config.load import load_config
from hybridflow.engines.local import LocalEngine
from hybridflow.errors import UserError
from hybridflow.models.files import export_model
from hybridflow.models.load import load_model
from hybridflow.tracking.events import read_events
from hybridflow.tracking.jsonl import read_metrics
from hybridflow.trainers.rl.loop import estimate, next_groups, publish_weights, record, update
from hybridflow.trainers.rl.run import RlRun, open_run

from preferences import yaml_of
from runs import configuration, metrics, mistake, succeed
from tiny import CARRY

# A model whose last norm is poisoned as long as a file lies beside it.
POISONED = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(CARRY.parent)!r})
from task import tiny_qwen3

def model(seed):
    model, tokenizer = tiny_qwen3(seed)
    if (Path(__file__).parent / "poison").exists():
        model.model.norm.weight.data[3] = float("nan")
    return model, tokenizer
"""


def rl_run(folder: Path) -> RlRun:
    config = configuration(folder, data={"eval": None}, train={"steps": 9, "prompts_per_step": 4})
    return open_run(load_config(config))


def one_step(run: RlRun, step: int, poisoned: int | None) -> list[int]:
    """A step of the loop; one answer's advantages may be made NaN. Returns the data row of that answer."""
    groups, _ = next_groups(run, step)
    batch, _ = estimate(run, groups)
    if poisoned is not None:
        batch["advantage_T"][batch.sequence_of() == poisoned] = math.nan
    metrics = update(run, batch)
    publish_weights(run, step)
    record(run, step, groups, batch, metrics)
    run.step = step
    return [] if poisoned is None else [batch.objects("row")[poisoned]]


def weights(run: RlRun) -> list[torch.Tensor]:
    assert isinstance(run.engine, LocalEngine)
    moments = [t for kept in run.engine.moments().values() for t in kept.values()]
    return [t.detach().clone() for t in [*run.engine.model.parameters(), *moments]]


def poisoned_steps(run: RlRun, rows: list[int]) -> None:
    """Steps 2, 3, 5, 6 and 7 are poisoned; `rows` gets the data row of each."""
    one_step(run, 1, None)
    before = weights(run)
    rows += one_step(run, 2, 5)
    rows += one_step(run, 3, 0)
    assert all(a.equal(b) for a, b in zip(weights(run), before))
    one_step(run, 4, None)  # a good one in between: the count starts again
    assert not all(a.equal(b) for a, b in zip(weights(run), before))
    before = weights(run)
    rows += one_step(run, 5, 1)
    rows += one_step(run, 6, 2)
    rows.append(run.sampler.take(4)[3][1])  # whose last answer step 7 poisons
    run.sampler.drawn -= 4
    try:
        one_step(run, 7, 7)
    finally:
        assert all(a.equal(b) for a, b in zip(weights(run), before))


def test_such_a_step_is_told_and_not_applied_and_three_in_a_row_end_the_run(tmp_path: Path) -> None:
    rows: list[int] = []
    with pytest.raises(UserError) as caught, rl_run(tmp_path) as run:
        poisoned_steps(run, rows)
    assert caught.value.what == f"the loss was not finite 3 updates in a row; last in data rows [{rows[-1]}]"
    assert caught.value.why.startswith("loss nan, gradient norm nan")
    assert "start from the last checkpoint" in caught.value.fix
    events = read_events(tmp_path / "run/events.jsonl")
    assert [e["kind"] for e in events] == ["nonfinite"] * 5 + ["failed"]
    for event, step, row in zip(events, [2, 3, 5, 6, 7], rows):
        assert event["text"] == f"step {step}: loss not finite, update not applied; data rows [{row}]"
    recorded = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [m["step"] for m in recorded] == [1, 2, 3, 4, 5, 6]
    assert [m["actor/skipped_nonfinite"] for m in recorded] == [0, 1, 1, 0, 1, 1]
    assert [math.isnan(m["actor/loss"]) for m in recorded] == [False, True, True, False, True, True]
    assert "NaN" not in (tmp_path / "run/metrics.jsonl").read_text()


def test_a_poisoned_parameter_stops_fine_tuning_with_its_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(POISONED)
    (tmp_path / "poison").touch()
    model = {"path": str(tmp_path / "mine.py:model")}
    config = configuration(tmp_path, "sft", model=model, data={"order": "sequential"}, train={"steps": 5})
    said = mistake(capsys, "sft", config)
    assert "the loss was not finite 3 updates in a row; last in data rows [8, 9, 10, 11]" in said
    assert "why: loss nan" in said and "fix: lower optim.lr" in said
    run = tmp_path / "run"
    assert [(m["step"], m["train/loss"]) for m in metrics(run)] == [(1, None), (2, None)]
    assert not (run / "checkpoints").exists() and not (run / "model").exists()
    (tmp_path / "poison").unlink()
    succeed(capsys, "sft", config)
    assert all(m["train/loss"] > 0 for m in metrics(run)) and len(metrics(run)) == 5


def test_a_poisoned_parameter_is_noticed_in_reinforcement_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(POISONED)
    (tmp_path / "poison").touch()
    model = {"path": str(tmp_path / "mine.py:model")}
    config = configuration(tmp_path, model=model, data={"eval": None}, train={"steps": 5})
    said = mistake(capsys, "train", config)
    assert "the log-probabilities of a response to row " in said and "are not finite" in said
    assert "why: the model's weights hold numbers that are not finite" in said and "fix: check model.path" in said
    assert not (tmp_path / "run/model").exists()


# Finite as they are configured; what they do to weights in float32 is not.
BEYOND = {"lr": 1e30, "weight_decay": 1e30}


@pytest.mark.parametrize("command", ["train", "sft", "reward-model"])
def test_a_model_that_is_not_finite_is_never_written(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One step is enough: there is no later one whose loss would tell."""
    train = {"steps": 1} if command != "train" else {"steps": 1, "prompts_per_step": 4}
    if command == "reward-model":
        config = yaml_of(tmp_path, optim=BEYOND, train=train)
    else:
        config = configuration(tmp_path, command, optim=BEYOND, train=train)
    said = mistake(capsys, command, config)
    assert "the model's weights are not finite after optimizer step 1" in said
    assert "optim.lr is 1e+30, optim.weight_decay 1e+30" in said
    run = tmp_path / "run"
    assert not (run / "model").exists() and not list((run / "checkpoints").glob("step-*"))
    assert read_events(run / "events.jsonl")[-1]["kind"] == "failed"


def test_a_model_that_began_so_is_not_written_either(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two updates are not applied, which is no end yet; the run is then at its end."""
    (tmp_path / "mine.py").write_text(POISONED)
    (tmp_path / "poison").touch()
    model = {"path": str(tmp_path / "mine.py:model")}
    said = mistake(capsys, "sft", configuration(tmp_path, "sft", model=model, train={"steps": 2}))
    assert "the model's weights are not finite and are not saved: model.norm.weight" in said
    assert not (tmp_path / "run/model").exists()


def test_evaluation_and_generation_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.py").write_text(POISONED)
    (tmp_path / "poison").touch()
    model = f"{tmp_path}/mine.py:model"
    said = mistake(capsys, "eval", configuration(tmp_path, "eval", model={"path": model}))
    assert "a response to row 0 of the evaluation data are not finite" in said and "check model.path" in said
    for more in ([], ["--temperature", "0.7"]):
        said = mistake(capsys, "generate", model, "1+1=", "--max-tokens", "4", *more)
        assert "a response to prompt 1 are not finite" in said and "check model.path" in said


def test_a_checkpoint_or_a_precision_without_end_is_not_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, _ = load_model(f"{CARRY}:tiny_qwen3", packing=False)
    model.model.norm.weight.data[3] = 1e6
    with pytest.raises(UserError, match=r"model\.norm\.weight is not finite in float16"):
        export_model(model, tmp_path, torch.float16)
    model.model.norm.weight.data[3] = math.inf
    with pytest.raises(UserError, match=r"model\.norm\.weight is not finite\n"):
        export_model(model, tmp_path)
