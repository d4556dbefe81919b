"""A new kind of run is a file with its loop, and an entry in the registry: every command then knows it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import Field

from hybridflow.config.kinds.registry import KINDS, Kind
from hybridflow.config.kinds.sft import SftConfig
from hybridflow.config.kinds.starters import Starter
from hybridflow.config.sections.base import Section
from hybridflow.trainers.sft import SftRun, next_batch, open_sft, update

from runs import configuration, metrics, mistake, succeed


class EchoSection(Section):
    """What a toy says."""

    word: str = Field(description="Said before every step.")


class EchoConfig(SftConfig):
    """A toy: supervised fine-tuning that says a word."""

    echo: EchoSection


def check_echo(config: EchoConfig) -> Iterator[str]:
    yield f"it says {config.echo.word}"


def train_echo(config: EchoConfig) -> Path:
    with open_sft(config) as run:
        for step in run.steps():
            print(config.echo.word, step)
            take_step(run, step)
        run.finish()
    return run.folder.path


def take_step(run: SftRun, step: int) -> None:
    batch = next_batch(run)
    run.record_training(step, batch.total(), update(run, batch, step))


@pytest.fixture
def echo(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = Kind(
        name="echo",
        config=EchoConfig,
        check=f"{__name__}.check_echo",
        train=f"{__name__}.train_echo",
        what="A toy",
        does="train a toy that says a word",
        example="echo.yaml",
        starter=Starter(begin={"run.seed": 0, "echo.word": "cuckoo", "train.steps": 1}),
    )
    monkeypatch.setitem(KINDS, kind.name, kind)


@pytest.mark.usefixtures("echo")
def test_a_new_kind_is_known_to_every_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        succeed(capsys, "echo", "--help")
    assert "hybridflow echo echo.yaml" in capsys.readouterr().out
    assert "echo" in json.loads(succeed(capsys, "schema", "echo"))["required"]
    assert "Said before every step" in succeed(capsys, "check", "--explain", "echo.word")
    assert "echo.word=" in succeed(capsys, "completion", "bash")
    mine = tmp_path / "mine.yaml"
    given = ("--kind", "echo", "--model", "m", "--data", "d.jsonl", "--out", mine)
    assert "hybridflow check" in succeed(capsys, "init", *given, "train.steps=2")
    begun: dict[str, Any] = yaml.safe_load(mine.read_text())
    assert begun["echo"] == {"word": "cuckoo"} and begun["train"] == {"steps": 2}
    assert "give --reward" not in mistake(capsys, "init", *given)  # the file is there


@pytest.mark.usefixtures("echo")
def test_a_new_kind_trains_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = configuration(tmp_path, "sft", echo={"word": "cuckoo"})
    assert json.loads(succeed(capsys, "check", config, "--json"))["command"] == "echo"
    assert "hybridflow echo" in mistake(capsys, "sft", config)
    assert "already holds a run" not in succeed(capsys, "echo", config, "train.steps=1")
    said = succeed(capsys, "echo", config, "train.steps=2")
    assert "it says cuckoo" in said and "cuckoo 2" in said and "cuckoo 1" not in said
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2]
    assert "already done" in succeed(capsys, "echo", config, "train.steps=2")
    assert "already holds a run, and run.resume is never" in mistake(capsys, "check", config, "run.resume=never")
