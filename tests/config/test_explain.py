"""What the configuration says about itself: single keys, schemas for editors, and a configuration to begin with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from hybridflow.cli.main import main
from hybridflow.config.keys import keys_of
from hybridflow.config.kinds.registry import KINDS
from hybridflow.config.load import load_config
from hybridflow.config.pages.explain import explain, explanation_lines
from hybridflow.config.pages.schema import schema

from runs import configuration, mistake, succeed, write_rows
from tiny import CARRY

ROOT = Path(__file__).resolve().parents[2]
Output = pytest.CaptureFixture[str]


def test_a_key_is_explained_with_its_type_default_and_meaning(capsys: Output) -> None:
    said = succeed(capsys, "check", "--explain", "optim.lr")
    assert (
        said.startswith("optim.lr  (train, sft, reward-model)\n  number > 0; default: 1e-06\n")
        and "Peak learning rate" in said
    )
    several = json.loads(succeed(capsys, "check", "--explain", "data.train", "--json"))
    assert [one["commands"] for one in several] == [["train", "eval"], ["sft"], ["reward-model"]], "they differ"


def test_a_section_is_explained_with_all_its_keys(capsys: Output) -> None:
    said = succeed(capsys, "check", "--explain", "checkpoint")
    assert [f"checkpoint.{k}  (" in said for k in ("every", "keep", "best", "best_mode")] == [True] * 4


def test_what_a_configuration_has_at_a_key(tmp_path: Path, capsys: Output) -> None:
    config = configuration(tmp_path)
    said = succeed(capsys, "check", config, "--explain", "optim.lr")
    assert f"{config} sets it: 0.001\n" in said and "(train)" in said
    assert f"{config} sets it: 0.5\n" in succeed(capsys, "check", config, "optim.lr=0.5", "--explain", "optim.lr")
    assert f"{config} leaves the default: 1.0\n" in succeed(capsys, "check", config, "--explain", "rollout.temperature")
    said = succeed(capsys, "check", config, "--explain", "algorithm.aggregation")  # filled in by the preset
    assert "default: by preset" in said and "leaves the default: seq-mean-token-mean\n" in said
    broken = configuration(tmp_path, optim={"lr": -1})
    assert f"{broken} sets it: -1\n" in succeed(capsys, "check", broken, "--explain", "optim.lr")


def test_an_unknown_key_is_told_the_nearest(tmp_path: Path, capsys: Output) -> None:
    assert "did you mean 'optim.lr'?" in mistake(capsys, "check", "--explain", "optim.lrr")
    assert "did you mean 'algorithm.clip_low'?" in mistake(capsys, "check", "--explain", "clip_low")
    said = mistake(capsys, "check", configuration(tmp_path, "sft"), "--explain", "rollout.temperature")
    assert "no key 'rollout.temperature' in a configuration for sft" in said
    assert "no configuration is given" in mistake(capsys, "check")


def test_every_key_can_be_explained() -> None:
    for kind in KINDS.values():
        for key in keys_of(kind.config):
            assert key.name in "\n".join(explanation_lines(explain(key.name), None))


@pytest.mark.parametrize("command", KINDS)
def test_the_schema_on_disk_is_in_step(command: str, capsys: Output) -> None:
    written = (ROOT / f"docs/schema/{command}.json").read_text()
    assert succeed(capsys, "schema", command) == written, (
        f"run: hybridflow schema {command} > docs/schema/{command}.json"
    )


@pytest.mark.parametrize("command", KINDS)
def test_the_schema_knows_every_key_and_no_other(command: str) -> None:
    found = json.loads(schema(command))
    assert found["additionalProperties"] is False
    assert keys_in(found, found) == {key.name for key in keys_of(KINDS[command].config) if "." in key.name}


def keys_in(schema: dict[str, Any], node: dict[str, Any], prefix: str = "") -> set[str]:
    """The keys that a schema allows below a node, with dots."""
    found: set[str] = set()
    for name, value in node.get("properties", {}).items():
        found |= {f"{prefix}{name}"} if prefix else set()
        here = [value, *value.get("anyOf", [])]
        for part in [kind for one in here for kind in (one, *one.get("oneOf", []))]:
            if "$ref" in part:
                inner = schema["$defs"][part["$ref"].rpartition("/")[2]]
                assert inner["additionalProperties"] is False
                found |= keys_in(schema, inner, f"{prefix}{name}.")
    return found


# --- a configuration to begin with ---

PIECES = {
    "train": ["--data", "problems.jsonl", "--reward", f"{CARRY}:score"],
    "sft": ["--data", "conversations.jsonl"],
    "eval": ["--data", "held_out.jsonl", "--reward", f"{CARRY}:score"],
}


@pytest.mark.parametrize("kind", PIECES)
def test_what_init_writes_passes_its_checks_and_says_what_its_keys_mean(
    kind: str, tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path)
    arguments = ["init", "--kind", kind, "--model", f"{CARRY}:tiny_qwen3", *PIECES[kind], "--out", "jobs/mine.yaml"]
    if kind != "sft":  # a function says nothing of its model's context, which is short here
        arguments += ["data.max_prompt_tokens=64", "rollout.max_response_tokens=64"]
    assert "next: hybridflow check jobs/mine.yaml" in succeed(capsys, *arguments)
    assert succeed(capsys, "check", "jobs/mine.yaml").endswith("all checks passed\n")
    text = Path("jobs/mine.yaml").read_text()
    assert yaml.safe_load(text)["run"] == {"folder": "runs/mine", "seed": 0}
    assert "# Seed of everything random: noise, data order, fresh weights.\n  seed: 0\n" in text
    assert f"hybridflow {kind} jobs/mine.yaml" in text
    assert "jobs/mine.yaml exists already" in mistake(capsys, *arguments)
    assert Path("jobs/mine.yaml").read_text() == text


@pytest.mark.parametrize(("kind", "expected"), [("train", [128, 128]), ("eval", [128, 128]), ("sft", [256])])
def test_what_init_writes_fits_the_models_context(
    kind: str, expected: list[int], tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run/model").mkdir(parents=True)
    Path("run/model/config.json").write_text('{"max_position_embeddings": 256}')
    for model in ("run", "run/model"):
        succeed(capsys, "init", "--kind", kind, "--model", model, *PIECES[kind], "--out", f"{Path(model).name}.yaml")
        values = yaml.safe_load(Path(f"{Path(model).name}.yaml").read_text())
        found = {**values["data"], **values.get("rollout", {})}
        assert [value for key, value in found.items() if key.endswith("_tokens")] == expected


@pytest.mark.parametrize("kind", PIECES)
def test_what_init_comments_out_may_be_commented_in(
    kind: str, tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    succeed(capsys, "init", "--kind", kind, "--model", "m", *PIECES[kind])
    keys = {key.name.rpartition(".")[2] for key in keys_of(KINDS[kind].config)}
    lines = Path("config.yaml").read_text().splitlines()
    hidden = [line for line in lines if line.startswith("  # ") and line[4:].partition(":")[0] in keys]
    assert len(hidden) >= 3
    Path("config.yaml").write_text("\n".join(line.replace("# ", "", 1) if line in hidden else line for line in lines))
    load_config("config.yaml", kind=KINDS[kind].config)


def test_init_takes_keys_and_refuses_what_does_not_fit(
    tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    begin = ["init", "--model", "m", "--data", "d.jsonl"]
    assert "a configuration for train needs a reward" in mistake(capsys, *begin)
    assert "sft needs none" in mistake(capsys, *begin, "--kind", "sft", "--reward", "r.py:score")
    assert "did you mean 'lr'?" in mistake(capsys, *begin, "--reward", "r.py:score", "optim.lrr=1")
    assert not Path("config.yaml").exists()
    succeed(capsys, *begin, "--reward", "r.py:score", "optim.lr=3e-4", "model.lora.rank=4", "train.steps=null",
            "train.epochs=2")  # fmt: skip
    config = load_config("config.yaml", kind=KINDS["train"].config).model_dump()
    assert (config["optim"]["lr"], config["model"]["lora"]["rank"]) == (3e-4, 4)
    assert (config["train"]["steps"], config["train"]["epochs"]) == (None, 2)


def test_an_unknown_kind_shows_the_usage(capsys: Output) -> None:
    with pytest.raises(SystemExit):
        main(["schema", "trian"])
    assert "invalid choice: 'trian'" in capsys.readouterr().err
