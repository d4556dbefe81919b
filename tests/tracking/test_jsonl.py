"""metrics.jsonl: what a resumed run needs from it."""

import json
import math
from pathlib import Path

import pytest

from hybridflow.errors import UserError
from hybridflow.tracking.jsonl import MetricsFile, read_metrics


def steps_in(path: Path) -> list[float]:
    return [line["step"] for line in read_metrics(path)]


def written(path: Path, steps: range) -> MetricsFile:
    file = MetricsFile(path)
    for step in steps:
        file.append(step, {"actor/pg_loss": step / 8})
    return file


def test_a_resumed_run_has_every_step_once(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    written(path, range(8))
    resumed = MetricsFile(path)
    resumed.truncate_after(5)
    resumed.append(6, {"actor/pg_loss": 0.5})
    assert steps_in(path) == [0, 1, 2, 3, 4, 5, 6]
    assert read_metrics(path)[-1] == {"step": 6, "actor/pg_loss": 0.5}


@pytest.mark.parametrize("kept", range(1, 26, 6))
def test_a_line_cut_short_by_a_kill_is_dropped_and_does_not_spoil_the_next(tmp_path: Path, kept: int):
    path = tmp_path / "metrics.jsonl"
    file = written(path, range(4))
    whole = path.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    path.write_bytes(whole[: -len(last)] + last[:kept])
    assert steps_in(path) == [0, 1, 2]
    file.truncate_after(3)
    file.append(3, {"actor/pg_loss": 7.0})
    assert steps_in(path) == [0, 1, 2, 3]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_fresh_start_in_a_folder_without_checkpoint_drops_everything(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    written(path, range(3)).truncate_after(-1)
    assert read_metrics(path) == []
    MetricsFile(tmp_path / "absent.jsonl").truncate_after(3)
    assert read_metrics(tmp_path / "absent.jsonl") == []


def test_damage_before_the_last_line_is_named_not_skipped(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    written(path, range(4))
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:9], *lines[2:]]) + "\n")
    with pytest.raises(UserError, match="line 2"):
        read_metrics(path)
    with pytest.raises(UserError, match="line 2"):
        MetricsFile(path).truncate_after(3)


def test_values_that_are_not_finite_leave_valid_json_and_read_as_nan(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path).append(1, {"actor/grad_norm": math.inf, "actor/loss": math.nan, "actor/lr": 1e-4, "n": 3})

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    assert json.loads(path.read_text(), parse_constant=refuse)["actor/loss"] is None
    values = read_metrics(path)[0]
    assert math.isnan(values["actor/grad_norm"]) and math.isnan(values["actor/loss"])
    assert values["actor/lr"] == 1e-4 and values["n"] == 3


def test_numbers_come_back_bit_for_bit(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    values = [0.1 + 0.2, 1e-300, -1 / 3, 12345678.901234567]
    MetricsFile(path).append(1, {f"m{i}": value for i, value in enumerate(values)})
    assert [read_metrics(path)[0][f"m{i}"] for i in range(4)] == values
