"""The recipe as a program of one's own ends with the very weights of `hybridflow train`."""

from __future__ import annotations

import ast
import json
import runpy
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from hybridflow.config.locate import load_function

from runs import assert_same_tensors, metrics, succeed
from tiny import CARRY

SCRIPT = CARRY.parent / "grpo.py"
ROOT = CARRY.parents[2]


def test_the_script_and_the_command_end_bit_identical(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # An untrained model never gets a sum right, but one answer in a hundred ends at once: those are right here.
    rows = load_function(f"{CARRY}:problems")(seed=0, count=200)
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(r | {"ground_truth": ""}) for r in rows))
    overrides = [
        f"model.path={CARRY}:tiny_qwen3", f"data.train={tmp_path / 'rows.jsonl'}", "data.eval=null", "eval.every=0",
        "train.steps=3", "checkpoint.every=2", "track.console=false", "optim.lr=1e-3",
    ]  # fmt: skip
    monkeypatch.chdir(ROOT)
    succeed(capsys, "train", CARRY.parent / "grpo.yaml", f"run.folder={tmp_path / 'command'}", *overrides)
    monkeypatch.setattr(sys, "argv", ["grpo.py", f"run.folder={tmp_path / 'script'}", *overrides])
    runpy.run_path(str(SCRIPT))
    steps = [m for m in metrics(tmp_path / "command") if m["step"]]
    assert all(m["actor/grad_norm"] > 0 for m in steps), "every step must have something to learn from"
    for file in ("model/model.safetensors", "checkpoints/step-000003/optimizer.safetensors"):
        assert_same_tensors(tmp_path / "command" / file, tmp_path / "script" / file)
    untrained = load_function(f"{CARRY}:tiny_qwen3")(0)[0].state_dict()
    trained = load_file(tmp_path / "script/model/model.safetensors")
    assert all(not t.equal(untrained[n]) for n, t in trained.items() if t.ndim > 1)


def test_the_script_fits_on_a_screen() -> None:
    source = SCRIPT.read_text()
    last_import = max(n.end_lineno or 0 for n in ast.parse(source).body if isinstance(n, ast.Import | ast.ImportFrom))
    code = [line for line in source.splitlines()[last_import:] if line.strip()]
    assert 10 < len(code) <= 30
