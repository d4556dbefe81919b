"""Configurations: every mistake is told in words, with its key; nothing heavy is imported to find it."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from hybridflow.config import sections
from hybridflow.config.kinds.eval import EvalConfig
from hybridflow.config.kinds.rl import RlConfig
from hybridflow.config.kinds.sft import SftConfig
from hybridflow.config.load import load_config, validate
from hybridflow.config.locate import load_function, locate
from hybridflow.config.sections.algorithm import AlgorithmSection
from hybridflow.config.sections.base import Section
from hybridflow.errors import UserError

from tiny import CARRY

RL: dict[str, Any] = {
    "run": {"folder": "runs/x"},
    "model": {"path": "m"},
    "data": {"train": "t.jsonl", "max_prompt_tokens": 100},
    "reward": {"function": "r.py:score"},
    "rollout": {"max_response_tokens": 200},
    "train": {"steps": 3, "prompts_per_step": 4, "samples_per_prompt": 6, "tokens_per_microbatch": 300},
}
SFT: dict[str, Any] = {
    "run": {"folder": "x"}, "model": {"path": "m"}, "data": {"train": "t.jsonl"}, "train": {"steps": 3}
}  # fmt: skip


def with_values(values: dict[str, Any], **changed: Any) -> dict[str, Any]:
    """A deep copy with ``section__key`` set."""
    made = {name: dict(section) for name, section in values.items()}
    for name, value in changed.items():
        section, _, key = name.partition("__")
        made.setdefault(section, {})[key] = value
    return made


def mistake(kind: type[Section], values: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        validate(kind, values)
    return caught.value.what


def test_every_field_of_every_section_says_what_it_is() -> None:
    modules = [
        importlib.import_module(f"{sections.__name__}.{m.name}") for m in pkgutil.iter_modules(sections.__path__)
    ]
    named = [s for module in modules for s in vars(module).values() if isinstance(s, type)]
    parts = {s for s in named if issubclass(s, Section) and s is not Section}
    assert len(parts) > 12
    for section in parts:
        assert section.__doc__, section
        for name, field in section.model_fields.items():
            inner = field.annotation if isinstance(field.annotation, type) else None
            if inner is None or not issubclass(inner, BaseModel):
                assert field.description and len(field.description) > 15, f"{section.__name__}.{name}"


def test_a_small_configuration_is_valid_and_frozen() -> None:
    config = validate(RlConfig, RL)
    assert (config.train.prompts_per_step, config.rollout.temperature, config.run.seed) == (4, 1.0, 0)
    with pytest.raises(ValueError, match="frozen"):
        config.run.seed = 3  # type: ignore[misc]
    validate(SftConfig, SFT)


@pytest.mark.parametrize("name", ["grpo.yaml", "ppo.yaml", "sft.yaml", "eval.yaml"])
def test_the_recipe_is_valid(name: str) -> None:
    kind = {"grpo.yaml": RlConfig, "ppo.yaml": RlConfig, "sft.yaml": SftConfig, "eval.yaml": EvalConfig}[name]
    config = load_config(CARRY.parent / name, kind=kind)
    assert isinstance(config, kind)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"train__promts_per_step": 4}, "train.promts_per_step: unknown key; did you mean 'prompts_per_step'?"),
        ({"optm__lr": 1}, "optm: unknown key; did you mean 'optim'?"),
        ({"model__lora": {"rnk": 4}}, "model.lora.rnk: unknown key; did you mean 'rank'?"),
        ({"rollout__zzz": 1}, "rollout.zzz: unknown key; known: answer_timeout, compile, dtype, "),
        ({"algorithm__preset": "grp"}, "unknown preset 'grp'; did you mean 'grpo'?"),
        ({"algorithm__advantage": "gropo"}, "unknown advantage 'gropo'; did you mean 'grpo'?"),
        ({"algorithm__policy_loss": "ppo-clip"}, "unknown policy_loss 'ppo-clip'; did you mean 'ppo_clip'?"),
        ({"algorithm__aggregation": "token_mean"}, "unknown aggregation 'token_mean'; did you mean 'token-mean'?"),
    ],
)
def test_an_unknown_name_is_told_the_nearest(changed: dict[str, Any], expected: str) -> None:
    assert expected in mistake(RlConfig, with_values(RL, **changed))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train__steps", 0),
        ("train__prompts_per_step", -1),
        ("train__samples_per_prompt", 0),
        ("train__sequences_per_update", 0),
        ("train__epochs_per_step", 0),
        ("train__tokens_per_microbatch", -5),
        ("train__steps", 2.5),
        ("train__steps", "many"),
        ("data__max_prompt_tokens", 0),
        ("rollout__max_response_tokens", 0),
        ("rollout__max_cache_tokens", 0),
        ("rollout__temperature", 0),
        ("rollout__temperature", float("nan")),
        ("rollout__engine", "sglan"),
        ("optim__lr", 0),
        ("optim__lr", -1e-4),
        ("optim__betas", [0.9, 1.0]),
        ("optim__betas", [0.9]),
        ("optim__eps", 0),
        ("optim__weight_decay", -0.1),
        ("optim__clip_grad_norm", 0),
        ("optim__warmup_steps", -1),
        ("optim__min_lr_ratio", 1.5),
        ("algorithm__clip_low", 1.0),
        ("algorithm__clip_high", -0.1),
        ("algorithm__clip_dual", 1.0),
        ("algorithm__entropy_coef", -0.1),
        ("eval__every", -1),
        ("eval__max_rows", 0),
        ("checkpoint__keep", 0),
        ("run__seed", -1),
        ("run__threads", 0),
        ("run__max_minutes", 0),
        ("run__device", "tpu"),
        ("track__rollouts_every", -1),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_with_its_key(key: str, value: Any) -> None:
    text = mistake(RlConfig, with_values(RL, **{key: value}))
    assert key.replace("__", ".") in text


@pytest.mark.parametrize("key", ["lora__rank", "lora__alpha"])
def test_adapters_of_no_size_are_refused(key: str) -> None:
    text = mistake(RlConfig, with_values(RL, model__lora={key.partition("__")[2]: 0}))
    assert key.replace("__", ".") in text


def test_all_mistakes_are_told_together() -> None:
    values = with_values(RL, train__steps=0, optim__lr=-1)
    del values["run"]["folder"]
    text = mistake(RlConfig, values)
    assert "3 mistakes" in text
    for part in ("train.steps: ", "optim.lr: ", "run.folder: missing"):
        assert part in text


@pytest.mark.parametrize("preset", ["grpo", "dr_grpo"])
def test_group_advantages_need_a_group(preset: str) -> None:
    text = mistake(RlConfig, with_values(RL, train__samples_per_prompt=1, algorithm__preset=preset))
    assert "train.samples_per_prompt is 1" in text and "at least 2" in text


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (
            {"train__sequences_per_update": 5},
            ["sequences_per_update 5 does not divide the 24 responses", "4 prompts x 6"],
        ),
        ({"train__tokens_per_microbatch": 299}, ["train.tokens_per_microbatch is 299", "300 tokens", "100", "200"]),
        ({"rollout__max_cache_tokens": 299}, ["rollout.max_cache_tokens is 299", "300 tokens"]),
        ({"data__train": None}, ["data.train is missing"]),
        ({"eval__every": 2}, ["eval.every is set, but data.eval"]),
        ({"placement__transport": "files"}, ["placement.transport is files: name placement.folder"]),
    ],
)
def test_sizes_that_do_not_fit_are_refused_in_words(changed: dict[str, Any], words: list[str]) -> None:
    text = mistake(RlConfig, with_values(RL, **changed))
    for word in words:
        assert word in text


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 8, 12, 24])
def test_sizes_that_divide_are_fine(size: int) -> None:
    assert validate(RlConfig, with_values(RL, train__sequences_per_update=size)).train.sequences_per_update == size


def test_supervised_conversations_must_fit_a_microbatch() -> None:
    text = mistake(SftConfig, with_values(SFT, train__tokens_per_microbatch=2047))
    assert "2047" in text and "data.max_tokens = 2048" in text


def test_evaluation_needs_rows() -> None:
    values = {k: RL[k] for k in ("run", "model", "data", "reward")}
    assert "data.eval is missing" in mistake(EvalConfig, values)


def test_a_preset_fills_only_what_is_not_given() -> None:
    plain = AlgorithmSection.model_validate({})
    assert (plain.preset, plain.aggregation, plain.normalize_by_std) == ("grpo", "seq-mean-token-mean", True)
    other = AlgorithmSection.model_validate({"preset": "dr_grpo", "aggregation": "token-mean"})
    assert (other.aggregation, other.normalize_by_std) == ("token-mean", False)
    assert AlgorithmSection.model_validate(other.model_dump()) == other


# --- files and overrides ---


def yaml(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


BASE = """
run: {folder: x}
model: {path: m}
data: {train: t.jsonl}
train: {steps: 3}
optim:
"""


def test_overrides_win_and_are_yaml(tmp_path: Path) -> None:
    overrides = [
        "optim.lr=1e-4",
        "train.steps=7",
        "optim.betas=[0.8, 0.9]",
        "data.order=sequential",
        "model.lora.rank=4",
    ]
    config = load_config(yaml(tmp_path, BASE), overrides, kind=SftConfig)
    assert (config.optim.lr, config.train.steps, config.optim.betas) == (1e-4, 7, (0.8, 0.9))
    assert config.data.order == "sequential" and config.model.lora is not None and config.model.lora.rank == 4
    assert load_config(yaml(tmp_path, BASE + "  lr: 5E-3\n"), kind=SftConfig).optim.lr == 5e-3
    assert load_config(yaml(tmp_path, BASE), ["train.steps=7", "train.steps=8"], kind=SftConfig).train.steps == 8


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps", "is not an override"),
        ("=3", "is not an override"),
        ("train.steps.deep=3", "steps is a value, not a section"),
        ("train.setps=3", r"train\.setps: unknown key; did you mean 'steps'\?"),
        ("train.steps=[3", r"train\.steps=\[3.* is not valid YAML"),
        ("train.steps=no", r"train\.steps: "),
    ],
)
def test_an_override_that_is_none_is_named(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(yaml(tmp_path, BASE), [override], kind=SftConfig)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: {folder", "is not valid YAML"),
        ("- a\n- b\n", r"must hold sections .* holds a list"),
        ("", "has 4 mistakes"),
        ("run: 3\nmodel: {path: m}\ndata: {train: t}\ntrain: {steps: 1}", "run: "),
    ],
)
def test_a_file_that_is_no_configuration_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(yaml(tmp_path, text), kind=SftConfig)
    with pytest.raises(UserError, match="no configuration file"):
        load_config(tmp_path / "gone.yaml", kind=SftConfig)


def train_source(config: SftConfig) -> str:
    [entry] = config.data.train
    return entry.source


def test_files_beside_the_configuration_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "recipe"
    folder.mkdir()
    (folder / "task.py").write_text("def rows(): return []\n")
    (folder / "t.jsonl").write_text("{}\n")
    path = yaml(folder, BASE)
    monkeypatch.chdir(tmp_path)
    assert train_source(load_config(path, kind=SftConfig)) == str(folder / "t.jsonl")
    rows = f"{folder / 'task.py'}:rows"
    assert train_source(load_config(path, ["data.train=task.py:rows"], kind=SftConfig)) == rows
    listed = load_config(path, ["data.train=[t.jsonl, {source: task.py:rows, weight: 2}]"], kind=SftConfig)
    assert [entry.source for entry in listed.data.train] == [str(folder / "t.jsonl"), rows]
    (tmp_path / "t.jsonl").write_text("{}\n")  # the current folder comes first
    assert train_source(load_config(path, kind=SftConfig)) == "t.jsonl"
    assert locate("gone.jsonl", folder) == "gone.jsonl"


def test_a_file_of_functions_is_imported_once(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("made = []\ndef rows():\n    made.append(1)\n    return made\n")
    load_function(f"{tmp_path}/mine.py:rows")()
    assert load_function(f"{tmp_path}/mine.py:rows")() == [1, 1]


def test_the_configuration_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; import hybridflow.config.load, hybridflow.config.locate, hybridflow.config.pieces.tables; "
        "print(sorted({'torch', 'transformers', 'numpy', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
