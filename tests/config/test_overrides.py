"""Overrides keep their text: the type of a key says how a value is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridflow.config.keys import keys_of
from hybridflow.config.kinds.registry import KINDS
from hybridflow.config.load import load_config, read_values
from hybridflow.config.overrides import annotation_at, apply_override
from hybridflow.errors import UserError

TEXT_KEYS = ("data.system_prompt", "data.prompt_key", "rollout.stop_regex", "track.project", "reward.judge.model")
AS_TYPED = [
    "Put the final answer after #### please", "#", "# all", "a #b", "010", "0x1f", "1_000", "yes", "no",
    "on", "off", "y", "true", "False", "1e5", "1.0", ".5", ".inf", "nan", "2024-01-01",
    "2024-01-01 10:00:00", "12:30:45", "a: b", "a:b", ":", "key: [1, 2", "~", "~/x", "Null", "NULL",
    " lead", "trail ", "  ", "", "\t", "a\tb", "one\ntwo", "one\n# two\n", "[", "]", "{", "}",
    "[INST]", "{x}", "[a, b]", "{a: 1}", "@user", "*", "*a", "&a", "!", "!!str x", "%", "%YAML 1.2",
    "`x`", "|", ">", "- a", "-", "---", "...", "? x", "=", "a=b", "<<", "'", '"', "it's", 'say "x"',
    '"a" or "b"', "'a' # 'b'", "'a", "\\n", "\\d+", "${x}", "$5", "\N{GRINNING FACE}",
    "\N{CJK UNIFIED IDEOGRAPH-4E2D}", "\x07", "-1", ",",
]  # fmt: skip


def overridden(key: str, text: str) -> Any:
    values: dict[str, Any] = {}
    apply_override(values, f"{key}={text}")
    for part in key.split("."):
        values = values[part]
    return values


@pytest.mark.parametrize("text", AS_TYPED)
def test_a_text_key_holds_what_is_typed(text: str) -> None:
    assert [overridden(key, text) for key in TEXT_KEYS] == [text] * len(TEXT_KEYS)


@given(st.text())
@settings(max_examples=150, derandomize=True, deadline=None)
def test_any_text_survives_typed_or_quoted(text: str) -> None:
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if text != "null" and not quoted:
        assert overridden("data.system_prompt", text) == text
        if not text.startswith(("[", "{")) and text:
            assert overridden("rollout.stop", text) == [text]
    inside = yaml.safe_dump(text, default_style='"', width=10**9, allow_unicode=False).rstrip("\n")
    assert overridden("data.system_prompt", inside) == text
    assert overridden("rollout.stop", f"[{inside}, x]") == [text, "x"]


def test_null_leaves_a_key_unset_and_quotes_make_it_a_word(tmp_path: Path) -> None:
    for key in TEXT_KEYS:
        assert overridden(key, "null") is None
        assert [overridden(key, quoted) for quoted in ("'null'", '"null"')] == ["null", "null"]
    assert overridden("data.system_prompt", "'\"x\"'") == '"x"'
    assert overridden("data.system_prompt", '"a\\nb"') == "a\nb"


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("rollout.stop", "#", ["#"]),
        ("rollout.stop", "####", ["####"]),
        ("rollout.stop", "yes", ["yes"]),
        ("rollout.stop", "[yes, 010, 1e5, 'a b', \"\\n\"]", ["yes", "010", "1e5", "a b", "\n"]),
        ("rollout.stop", "[]", []),
        ("rollout.stop", "", []),
        ("rollout.stop", "~", ["~"]),
        ("rollout.stop", "a, b", ["a, b"]),
        ("rollout.stop", '["[INST]"]', ["[INST]"]),
        ("rollout.servers", "http://a:1", ["http://a:1"]),
        ("train.steps", "010", 10),
        ("train.steps", "1e2", 100.0),
        ("train.steps", "0x10", 16),
        ("train.steps", "1:30", "1:30"),
        ("train.steps", "null", None),
        ("train.steps", "", None),
        ("train.steps", "~", None),
        ("train.steps", " 7 ", 7),
        ("train.steps", "'7'", 7),
        ("optim.lr", "1e-4", 1e-4),
        ("optim.lr", "5E-3", 5e-3),
        ("optim.lr", ".5", 0.5),
        ("optim.betas", "[0.9, 0.95]", [0.9, 0.95]),
        ("eval.k", "4", [4]),
        ("eval.k", "[1, 4]", [1, 4]),
        ("eval.k", "", None),
        ("run.resume", " never ", "never"),
        ("run.resume", "'never'", "never"),
        ("track.console", "no", "no"),
        ("eval.logit_bias", "{17: -5}", {"17": -5}),
        ("engine.offload", "parameters", ["parameters"]),
        ("model.lora", "{rank: 4, target_modules: [q_proj, on]}", {"rank": 4, "target_modules": ["q_proj", "on"]}),
        ("model.lora", "", None),
        ("critic", "{}", {}),
        ("model.lora.target_modules", "all-linear", "all-linear"),
        ("model.lora.target_modules", "[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("data.train", "my rows #2.jsonl", "my rows #2.jsonl"),
        ("data.train", "[a, {source: 010, weight: 2}]", ["a", {"source": "010", "weight": 2}]),
        ("data.eval", "", None),
        ("placement.pools", "{all: 2}", {"all": 2}),
        ("placement.pools", "{all:2}", {"all:2": None}),
        ("reward.sources", "{yes: math}", {"yes": "math"}),
        ("reward.sources.mine", "on", "on"),
        ("reward.kwargs.marker", "#### ", "#### "),
        ("reward.kwargs.marker", "a # b", "a # b"),
        ("reward.kwargs.n", "3", 3),
        ("reward.kwargs.n", "1e-3", 1e-3),
        ("reward.kwargs.n", "010", "010"),
        ("reward.kwargs.n", "2024-01-01", "2024-01-01"),
        ("reward.kwargs.n", "12:30", "12:30"),
        ("reward.kwargs.on", "true", True),
        ("reward.kwargs.on", "'true'", "true"),
        ("reward.kwargs.p", "[a-z]+", "[a-z]+"),
        ("reward.kwargs.p", "{a: [1, x]}", {"a": [1, "x"]}),
        ("reward.kwargs.p", "null", None),
        ("reward.kwargs.p", ": #", ": #"),
        ("algorithm.values.k", "0.5", 0.5),
        ("algorithm.values.k", "#", "#"),
        ("rollout.engine_args.enforce_eager", "true", True),
        ("rollout.engine_args.dtype", "half", "half"),
    ],
)
def test_other_keys_hold_what_their_type_says(key: str, text: str, value: Any) -> None:
    assert overridden(key, text) == value
    assert type(overridden(key, text)) is type(value)


def test_a_key_is_read_alike_in_every_command() -> None:
    """So that an override means the same to all of them."""
    words: dict[str, set[str]] = {}
    for key in {key for kind in KINDS.values() for key in keys_of(kind.config)}:
        words.setdefault(key.name, set()).add(key.type.partition(" ")[0])
        assert annotation_at(key.name.split(".")) is not None
    assert {name: found for name, found in words.items() if len(found) > 1} == {}


@pytest.mark.parametrize(
    ("override", "fix"),
    [
        ("rollout.stop=[", "put quotes inside"),
        ("data.train={source: x", "put quotes inside"),
        ("optim.betas=[0.9", "close what"),
        ("--optim.lr=1", "no sign before them: optim.lr=1"),
        ("+optim.lr=1", "optim.lr=1"),
        ("~optim.lr=1", "optim.lr=1"),
        ("optim.lr", "write dotted.key=value"),
        ("optim.lr:1e-4", "write dotted.key=value"),
        ("model.lora={rank: 1, rank: 2}", "join the two"),
    ],
)
def test_what_is_no_override_says_how_to_write_it(override: str, fix: str) -> None:
    with pytest.raises(UserError) as caught:
        apply_override({}, override)
    assert fix in caught.value.fix


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train:\n  steps: 3\nrun: {}\ntrain:\n  epochs: 2\n", "has train twice, in lines 1 and 4"),
        ("run:\n  seed: 1\n  folder: x\n  seed: 2\n", "has run.seed twice, in lines 2 and 4"),
        ("optim: {lr: 1, eps: 2, lr: 3}", "has optim.lr twice, in lines 1 and 1"),
        ("model:\n  lora:\n    rank: 1\n    'rank': 2\n", "has model.lora.rank twice, in lines 3 and 4"),
        ("data:\n  train:\n  - source: a\n    source: b\n", "has data.train.source twice, in lines 3 and 4"),
        ("run: {folder: 2024-13-45}", "cannot be read"),
        ("run: [", "is not valid YAML"),
        ("a: *x", "is not valid YAML"),
    ],
)
def test_a_file_in_which_a_key_stands_twice_names_both_lines(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        read_values(tmp_path / "c.yaml")
    assert said in caught.value.what


def test_a_file_may_begin_with_a_mark_and_share_by_anchors(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("\ufeffa: &a {x: 1}\nb:\n  <<: *a\n  y: 2\n", encoding="utf-8")
    assert read_values(path) == {"a": {"x": 1}, "b": {"x": 1, "y": 2}}
    path.write_bytes("run: {folder: \xe9}".encode("latin-1"))
    with pytest.raises(UserError, match="is not UTF-8 text"):
        read_values(path)


def test_overrides_reach_a_configuration(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "run: {folder: x}\nmodel: {path: m}\ndata: {train: t}\nreward: {function: gsm8k}\n"
        "train: {steps: 1, prompts_per_step: 1, samples_per_prompt: 2}\n"
    )
    given = [
        "data.system_prompt=Put the answer after #### please",
        "rollout.stop=#",
        "track.console=Yes",
        "train.steps=010",
    ]
    config = load_config(path, given)
    assert (config.data.system_prompt, config.rollout.stop) == ("Put the answer after #### please", ["#"])
    assert (config.track.console, config.train.steps) == (True, 10)
