"""One rule for every key that names a path; sections that begin with another's values."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from hybridflow.config.inherit import INHERITS
from hybridflow.config.keys import keys_of
from hybridflow.config.kinds.registry import KINDS
from hybridflow.config.kinds.rl import RlConfig
from hybridflow.config.load import load_config, validate
from hybridflow.config.locate import expanded
from hybridflow.errors import UserError

RL: dict[str, Any] = {
    "run": {"folder": "x"}, "model": {"path": "m"}, "data": {"train": "t"}, "reward": {"function": "gsm8k"},
    "train": {"steps": 9, "prompts_per_step": 1, "samples_per_prompt": 2},
}  # fmt: skip
FUNCTIONS = ("algorithm.advantage", "algorithm.policy_loss", "algorithm.aggregation", "data.order", "reward.function")
BESIDE: dict[str, dict[str, Any]] = {  # what a key needs beside itself
    "critic": {"critic.shared_trunk": False, "algorithm.preset": "ppo"},
    "model.reference": {"algorithm.kl_loss_coef": 0.1},
    "placement.folder": {"placement.transport": "files"},
    "reward.judge": {"reward.judge.path": "j", "reward.judge.engine": "vllm", "reward.function": "judge"},
    "reward.model": {"reward.model.path": "r", "reward.function": "model"},
    "reward.sources": {"reward.function": "by_source"},
    "rollout.python": {"rollout.engine": "sglang"},
}


def path_keys() -> list[tuple[str, str]]:
    """Every key that names a path, with a command that has it."""
    found = {k.name: name for name, kind in KINDS.items() for k in keys_of(kind.config) if k.type.startswith("path")}
    return sorted((*found.items(), *((key, "train") for key in FUNCTIONS), ("reward.sources.mine", "train")))


def configured(command: str, given: dict[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {k: dict(v) for k, v in RL.items()}
    if command in ("sft", "reward-model"):
        del values["reward"]
        values["train"] = {"steps": 1} | ({"pairs_per_update": 2} if command == "reward-model" else {})
    if command == "eval":
        values["data"] = {"eval": "t"}
        del values["train"]
    for key, value in given.items():
        section = values
        *parents, last = key.split(".")
        for name in parents:
            section = section.setdefault(name, {})
        section[last] = value
    return values


def at(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values[part]
    return values[0]["source"] if isinstance(values, list) else values


@pytest.mark.parametrize(("key", "command"), path_keys())
def test_every_path_fills_in_home_and_variables_and_finds_files_beside(
    key: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PLACE", "beside")
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside/f.py").write_text(
        "def advantage(reward_N, group_N): ...\ndef loss(logp_M): ...\ndef weights(length_N, group_N, *, norm): ...\n"
    )
    name = {"algorithm.policy_loss": ":loss", "algorithm.aggregation": ":weights"}.get(key, ":advantage")
    needed = next((extra for begin, extra in BESIDE.items() if key.startswith(begin)), {})
    written = key in ("run.folder", "placement.folder", "rollout.python", "reward.judge.python")
    wanted = f"{tmp_path}/beside/f.py{name}"
    for text in (f"~/beside/f.py{name}", f"$HOME/${{PLACE}}/f.py{name}", f"f.py{name}"):
        values = configured(command, {**needed, key: text})
        config = validate(KINDS[command].config, values, base=tmp_path / "beside")
        beside = text.startswith("f.py")
        assert at(config.model_dump(mode="json"), key) == (text if beside and written else wanted)
    for text, said in [
        ("$UNSET_HERE/f.py:x", r"\$UNSET_HERE, which is not set"),
        ("~nobody_here/f.py:x", "no such user"),
    ]:
        with pytest.raises(UserError, match=said) as caught:
            validate(KINDS[command].config, configured(command, {**needed, key: text}))
        assert key.removesuffix(".mine") in str(caught.value)


def test_what_looks_like_a_variable_and_is_a_file_is_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/h")
    Path("cost_$X.jsonl").touch()
    Path("~").mkdir()  # what a program made that did not fill it in
    same = [
        "cost_$X.jsonl",
        "a$",
        "a$5",
        "a~b",
        "./~/x",
        "Qwen/Qwen3-0.6B",
        "http://a/$X/~",
        "modelscope://a/$B",
        "a:b",
    ]
    assert [expanded(text) for text in same] == same
    assert expanded("~/x") == "/h/x" and expanded("~") == "/h"


@pytest.mark.parametrize("key", ["run.folder", "model.path", "data.train"])
def test_an_empty_path_is_told_and_a_path_object_is_one(key: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="it is empty, and names nothing"):
        validate(RlConfig, configured("train", {key: " "}))
    config = validate(RlConfig, configured("train", {key: tmp_path / "x"}))
    assert at(config.model_dump(), key) == os.fspath(tmp_path / "x")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("data.train", [{"prompt": "1+1", "ground_truth": "2"}], "write the rows to a .jsonl"),
        ("data.train", ({"question": "x"},), "write the rows to a .jsonl"),
        ("data.eval", {"prompt": "1+1"}, "as file.py:function"),
        ("data.train", lambda: [], "as file.py:function"),
        ("data.train", memoryview(b"rows of some library"), "this is a memoryview in memory"),
        ("reward.function", len, "open_run(config, reward=function)"),
        ("reward.sources", {"mine": len}, "open_run(config, reward=function)"),
        ("data.order", sorted, "as file.py:sorted"),
        ("model.path", len, "as file.py:len"),
        ("algorithm.advantage", len, "as file.py:len"),
    ],
)
def test_what_is_in_memory_is_told_how_to_be_named(key: str, value: Any, said: str) -> None:
    with pytest.raises(UserError) as caught:
        validate(RlConfig, configured("train", {"reward.function": "by_source", key: value}))
    assert f"{key}" in caught.value.what and said in caught.value.what


# --- sections that begin with another's values ---

OWN: dict[str, dict[str, Any]] = {"optim": {"warmup_steps": 5}, "engine": {"offload": ["parameters"]}}
BASE: dict[str, dict[str, Any]] = {
    "optim": {"lr": 1e-4, "betas": [0.8, 0.9], "schedule": "cosine"},
    "engine": {"strategy": "fsdp2", "reduce_dtype": "bfloat16", "activation_offload": True},
}
NEEDED: dict[str, dict[str, Any]] = {
    "critic": {"critic.path": None, "algorithm.preset": "ppo"},
    "model": {"algorithm.kl_loss_coef": 0.1},
    "reward": {"reward.model.path": "r", "reward.function": "model"},
}


@pytest.mark.parametrize("key", INHERITS)
def test_what_a_section_leaves_out_is_the_other_ones(key: str) -> None:
    source = INHERITS[key]
    pools = {"placement.pools": {"all": 2}} if source == "engine" else {}
    needed = NEEDED[key.partition(".")[0]] | pools | {source: BASE[source]}
    config = validate(RlConfig, configured("train", {**needed, key: OWN[source]}))
    dumped = config.model_dump()
    assert at(dumped, key) == dumped[source] | OWN[source]
    assert validate(RlConfig, config.model_dump(mode="json")) == config
    own = {k: v for k, v in dumped[source].items() if k not in OWN[source]}
    changed = validate(RlConfig, configured("train", {**needed, key: {**own, **OWN[source]}}))
    assert changed == config, "what is given as a whole is what it was"
    absent = validate(RlConfig, configured("train", needed)).model_dump()
    assert at(absent, key.partition(".")[0]).get(key.rpartition(".")[2]) is None or "model.engine" in key


@pytest.mark.parametrize(
    ("engine", "own", "result"),
    [
        ({"strategy": "fsdp2", "shard_size": 2}, {"strategy": "local"}, {"strategy": "local", "sequence_parallel": 1}),
        ({"strategy": "fsdp2", "cpu_offload": True}, {"offload": ["parameters"]}, {"cpu_offload": False}),
        (
            {"strategy": "fsdp2", "offload": ["parameters", "optimizer"]},
            {"cpu_offload": True},
            {"offload": ["optimizer"]},
        ),
        ({"strategy": "fsdp2"}, {"strategy": "fsdp1"}, {"strategy": "fsdp1"}),
    ],
)
def test_keys_that_exclude_each_other_are_not_taken_together(
    engine: dict[str, Any], own: dict[str, Any], result: dict[str, Any]
) -> None:
    pools = (
        {"placement.pools": {"all": 2, "one": 1}, "placement.roles": {"reward": "one"}}
        if "local" in own.values()
        else {"placement.pools": {"all": 2}}
    )
    given = {**pools, **NEEDED["reward"], "engine": engine, "reward.model.engine": own}
    config = validate(RlConfig, configured("train", given))
    assert config.reward.model is not None and config.reward.model.engine is not None
    assert {k: getattr(config.reward.model.engine, k) for k in result} == result


@pytest.mark.parametrize("key", [key for key, source in INHERITS.items() if source == "engine"])
def test_a_mistake_in_such_a_section_names_its_own_path(key: str) -> None:
    given = NEEDED[key.partition(".")[0]] | {key: {"offload": ["parameters"]}}
    with pytest.raises(UserError) as caught:
        validate(RlConfig, configured("train", given))
    assert f"{key}.offload is for fsdp2 or fsdp1, and this is local ({key}.strategy)" in caught.value.what


def test_a_file_beside_home_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.yaml").write_text("run: {folder: ~/r}\nmodel: {path: m}\ndata: {train: t}\ntrain: {steps: 1}\n")
    assert load_config("~/c.yaml", kind=KINDS["sft"].config).run.folder == f"{tmp_path}/r"
