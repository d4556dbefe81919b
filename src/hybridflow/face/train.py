"""`hybridflow.train`: one call that trains, with objects where a configuration has names."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hybridflow.agents.given import Given
from hybridflow.checkpoint.run_folder import locked, make_folder
from hybridflow.commands.train import run_checked
from hybridflow.config.kinds.rl import RlConfig
from hybridflow.config.load import validate
from hybridflow.config.paths import home
from hybridflow.config.sections.data import PromptDataSection
from hybridflow.controller.backends.forking import refuse_imported_program
from hybridflow.errors import UserError
from hybridflow.face.agent import with_agent
from hybridflow.face.arguments import base_values, merged, refuse_unknown, sets_length, with_defaults, without_length
from hybridflow.face.model import checked_pair, save_model
from hybridflow.face.reward import needs_no_truth, split_reward
from hybridflow.face.rows import is_mapping_of_splits, is_name, rows_of, write_rows
from hybridflow.rewards.graders.given import GivenReward, with_given
from hybridflow.tracking.events import read_events
from hybridflow.tracking.jsonl import read_metrics
from hybridflow.trainers.rl.callbacks import Callback, require_callbacks
from hybridflow.viewer.report import write_report

GIVEN = "given"  # the folder of a run that holds what was given as objects
FOLDER = "runs/train"


@dataclass(frozen=True, slots=True)
class Trained:
    """What a call of `train` leaves.

    Args:
        folder: the run's.
        model: a Hugging Face folder with the trained model; None where the run ended early.
        metrics: the lines of metrics.jsonl, one for each step.
        stopped: why the run ended early; None where it is done.
        report: the report of the run, an HTML file.
    """

    folder: Path
    model: Path | None
    metrics: list[dict[str, Any]] = field(repr=False)
    stopped: str | None
    report: Path


def train(
    model: Any = None,
    data: Any = None,
    reward: Any = None,
    *,
    eval_data: Any = None,
    tokenizer: Any = None,
    tools: Sequence[Any] | None = None,
    environment: Any = None,
    config: str | os.PathLike[str] | Mapping[str, Any] | RlConfig | None = None,
    folder: str | os.PathLike[str] | None = None,
    callbacks: Sequence[Callback] = (),
    **sections: Mapping[str, Any],
) -> Trained:
    """Trains a model by reinforcement learning: checks first, then training, then the report.

    The same call made again resumes the run in `folder`; where the run is done, it says so and returns the record.

    Args:
        model: a Hugging Face folder or name, ``file.py:function``, or a PreTrainedModel with `tokenizer`; or the
            section ``model`` as a dict, whose ``path`` may be any of these.
        data: the training rows: a list or another iterable of dicts, a Dataset, a DataFrame, an Arrow table, or what
            ``data.train`` takes; or the section ``data`` as a dict.
        reward: a function, a callable object, a list of them, or what ``reward.function`` takes; or the section
            ``reward`` as a dict, whose ``function`` may be any of these.
        eval_data: the evaluation rows, in the forms of `data`.
        tokenizer: of a model that is given as an object.
        tools: functions that the model may call, classes with such methods, or names of either (``file.py:function``);
            what ``agent.tools`` takes.
        environment: what the model acts in: a class, a function that returns an object, an object, which is copied for
            each trajectory, or what ``agent.environment`` takes. Its rewards are those of the run, unless `reward` is
            given.
        config: what the call begins with: the path of a YAML file, sections as a dict, or an `RlConfig`.
        folder: of the run; unset: that of `config`, else runs/train.
        callbacks: functions that are called after each step with any of step, metrics, run, groups and batch.
        sections: further settings by section, such as ``optim={"lr": 1e-5}, train={"steps": 20}``.

    Raises:
        UserError: something that was given is wrong.
        Interrupted: Ctrl-C or SIGTERM stopped the run; everything is saved.
    """
    refuse_imported_program()
    refuse_unknown(sections)
    require_callbacks(callbacks)
    values, base = base_values(config)
    values = merged(without_length(values) if sets_length(sections) else values, sections)
    for name, section in _given_sections(model, data, reward, eval_data).items():
        if name == "reward" and {"function", "terms"} & section.keys() and isinstance(values.get(name), Mapping):
            instead = ("function", "terms", "kwargs")  # those of the base are of another reward
            values[name] = {key: value for key, value in values[name].items() if key not in instead}
        values = merged(values, {name: section})
    values = merged(values, {"run": {"folder": _folder(values, folder)}})
    values, given = with_agent(values, tools, environment)
    scorer = None
    if isinstance(values.get("reward"), Mapping):
        values["reward"], scorer = split_reward(values["reward"])
    objects = _taken(values, tokenizer)
    if "data" in objects.rows and scorer is not None and needs_no_truth(objects.rows["data"][0], scorer):
        objects.values["data"] = {"ground_truth_key": None} | objects.values["data"]
    settings = with_given(validate(RlConfig, objects.values, source="the call of hybridflow.train", base=base), scorer)
    with objects.kept():
        return _run(settings, scorer, given, callbacks)


def _run(config: RlConfig, reward: GivenReward | None, given: Given, callbacks: Sequence[Callback]) -> Trained:
    again = "make the same call of hybridflow.train"
    ended = run_checked(config, again=again, reward=reward, given=given, callbacks=callbacks)
    if ended.interrupted is not None:
        raise ended.interrupted
    path = Path(config.run.folder)
    report = path / "report.html"
    return Trained(
        folder=path,
        model=path / "model" if ended.done else None,
        metrics=read_metrics(path / "metrics.jsonl"),
        stopped=None if ended.done else read_events(path / "events.jsonl")[-1]["text"],
        report=report if report.is_file() else write_report(path),
    )


@dataclass(frozen=True, slots=True)
class _Objects:
    """What was given as objects, and the configuration that names where it is kept."""

    values: dict[str, Any]
    folder: Path
    rows: dict[str, tuple[list[dict[str, Any]], Path]]  # by argument
    model: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Writes them to the run's folder, which no other call may write to meanwhile."""
        if not (self.rows or self.model) or os.environ.get("RANK", "0") != "0":  # of torchrun's processes one writes
            yield
            return
        make_folder(self.folder / GIVEN)
        with locked(self.folder / GIVEN / ".lock", run=self.folder):
            for argument, (rows, path) in self.rows.items():
                write_rows(rows, path, argument)
            if self.model is not None:
                save_model(*self.model, self.folder / GIVEN / "model")
            yield


def _taken(values: dict[str, Any], tokenizer: Any) -> _Objects:
    """Takes rows and a model out of the values, which name files of the run's folder instead."""
    folder, rows, pair = home(values["run"]["folder"]), dict[str, tuple[list[dict[str, Any]], Path]](), None
    for key, argument in (("train", "data"), ("eval", "eval_data")):
        found = _inner(values, "data", key)
        if found is not None and not is_name(found):
            path = folder / GIVEN / f"{key}.jsonl"
            rows[argument] = (rows_of(found, argument), path)
            values = merged(values, {"data": {key: str(path)}})
    model = _inner(values, "model", "path")
    if model is not None and not isinstance(model, str | os.PathLike):
        pair = checked_pair(model, tokenizer)
        values = merged(values, {"model": {"path": str(folder / GIVEN / "model")}})
    elif tokenizer is not None:
        raise UserError(
            "a tokenizer is given beside a model that is named",
            why="the tokenizer in the model's folder is used",
            fix="leave tokenizer out, or give the model as an object too",
        )
    tasks = _inner(values, "agent", "tasks")
    values = with_defaults(values, rows=len(rows["data"][0]) if "data" in rows else tasks)
    return _Objects(values, folder, rows, pair)


def _given_sections(model: Any, data: Any, reward: Any, eval_data: Any) -> dict[str, dict[str, Any]]:
    """Returns the arguments as sections: as they are, or with what was given under the key that it stands for."""
    is_section = isinstance(data, Mapping) and bool(PromptDataSection.model_fields.keys() & data.keys())
    if is_section and not is_mapping_of_splits(data):
        rows = dict(data)
    else:
        rows = {} if data is None else {"train": data}
    if eval_data is not None:
        rows["eval"] = eval_data
    sections = {"data": rows}
    for name, key, value in (("model", "path", model), ("reward", "function", reward)):
        sections[name] = {} if value is None else dict(value) if isinstance(value, Mapping) else {key: value}
    return {name: section for name, section in sections.items() if section}


def _folder(values: Mapping[str, Any], folder: str | os.PathLike[str] | None) -> str:
    own = _inner(values, "run", "folder")
    if not isinstance(folder, str | os.PathLike | None):
        raise UserError(
            f"folder is a {type(folder).__name__}, not a path", fix='give a path, such as folder="runs/mine"'
        )
    return os.fspath(folder) if folder is not None else FOLDER if own is None else str(own)


def _inner(values: Mapping[str, Any], section: str, key: str) -> Any:
    found = values.get(section)
    return found.get(key) if isinstance(found, Mapping) else None
