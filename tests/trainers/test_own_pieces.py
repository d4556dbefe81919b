"""Pieces of an algorithm from the user's own file: as good as ours, and held against the configuration."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from hybridflow.algorithms.advantage.rloo import rloo
from hybridflow.algorithms.policy_loss.ppo_clip import ppo_clip

from runs import assert_same_tensors, configuration, metrics, mistake, succeed

ROOT = Path(__file__).resolve().parents[2]
Output = pytest.CaptureFixture[str]
TWO_UPDATES = {"sequences_per_update": 2, "tokens_per_microbatch": 48}

AGGREGATION = """
def mine(length_N, group_N, *, norm):
    assert norm == 8 and len(group_N) == len(length_N)
    return 1.0 / length_N.sum().clamp(min=1).expand(len(length_N))
"""


def trained(folder: Path, capsys: Output, **algorithm: Any) -> Path:
    folder.mkdir()
    path = configuration(folder, algorithm=algorithm, data={"eval": None}, train=TWO_UPDATES)
    succeed(capsys, "train", path)
    return folder / "run/model/model.safetensors"


def test_a_copy_of_a_piece_trains_the_same_bit_for_bit(tmp_path: Path, capsys: Output) -> None:
    for what, function in [("advantage", rloo), ("policy_loss", ppo_clip)]:
        file = tmp_path / f"{what}.py"
        file.write_text(Path(inspect.getfile(function)).read_text())
        name = function.__name__
        values = {"clip_low": 0.001, "clip_high": 0.002} if what == "policy_loss" else {}
        ours = trained(tmp_path / f"{what}-ours", capsys, **{what: name, **values})
        own = trained(tmp_path / f"{what}-own", capsys, **{what: f"{file}:{name}", **values})
        assert_same_tensors(ours, own)
        assert "actor/pg_clipfrac" in metrics(own.parents[1])[1]


def test_an_aggregation_of_ones_own(tmp_path: Path, capsys: Output) -> None:
    (tmp_path / "mine.py").write_text(AGGREGATION)
    ours = trained(tmp_path / "ours", capsys, aggregation="token-mean")
    own = trained(tmp_path / "own", capsys, aggregation=f"{tmp_path / 'mine.py'}:mine")
    assert_same_tensors(ours, own)


def test_the_example_of_the_documentation_runs(tmp_path: Path, capsys: Output) -> None:
    page = (ROOT / "docs/extending.md").read_text()
    code = re.search(r"`my/pieces.py`:\n\n```python\n(.*?)^```", page, re.M | re.S)
    assert code is not None
    file = tmp_path / "pieces.py"
    file.write_text(code[1])
    algorithm = {
        "advantage": f"{file}:against_the_best",
        "policy_loss": f"{file}:soft_clip",
        "aggregation": f"{file}:longest_counts_once",
        "values": {"sharpness": 2.0, "share": 0.5},
    }
    out = succeed(capsys, "check", configuration(tmp_path, algorithm=algorithm))
    assert all(f"{name}: found" in out for name in ("against_the_best", "soft_clip", "longest_counts_once"))
    succeed(capsys, "train", configuration(tmp_path, algorithm=algorithm))
    lines = metrics(tmp_path / "run")[1:]
    assert all(m["actor/ratio"] == pytest.approx(1, abs=1e-3) and m["actor/grad_norm"] > 0 for m in lines)


@pytest.mark.parametrize(
    ("what", "code", "expected"),
    [
        (
            "policy_loss",
            "def f(logp_M, advantages): ...",
            ["takes 'advantages'", "nothing is called that", "logp_M, old"],
        ),
        ("policy_loss", "def f(old_logp_M): ...", ["does not take logp_M", "no gradient"]),
        ("policy_loss", "def f(logp_M, *, eta): ...", ["takes 'eta'", "algorithm.values.eta"]),
        ("policy_loss", "def g(logp_M): ...", ["has no function 'f'; known: g"]),
        ("policy_loss", "def f(:", ["is not Python"]),
        ("advantage", "def f(rewards): ...", ["takes 'rewards'", "def mine(reward_N"]),
        ("advantage", "def f(value_T, mask_T): ...", ["needs a critic"]),
        ("advantage", "def f(reward_N, group_N): ...", ["compares responses to one prompt", "at least 2"]),
        ("aggregation", "def f(lengths): ...", ["takes 'lengths'", "def mine(length_N"]),
    ],
)
def test_a_signature_that_does_not_fit(
    what: str, code: str, expected: list[str], tmp_path: Path, capsys: Output
) -> None:
    (tmp_path / "mine.py").write_text(code)
    samples = 1 if "compares responses" in expected[0] else 2
    algorithm = {what: f"{tmp_path / 'mine.py'}:f"}
    said = mistake(capsys, "train", configuration(tmp_path, algorithm=algorithm, train={"samples_per_prompt": samples}))
    assert [e for e in expected if e not in said] == [], said
    assert not (tmp_path / "run").exists()


def test_too_little_memory_is_told_with_the_sizes(tmp_path: Path, capsys: Output) -> None:
    """The error is the one that torch raises on a GPU; here a loss raises it."""
    (tmp_path / "mine.py").write_text(
        "import torch\n\n\ndef f(logp_M):\n    raise torch.OutOfMemoryError('CUDA out of memory. Tried 2 GiB')\n"
    )
    said = mistake(capsys, "train", configuration(tmp_path, algorithm={"policy_loss": f"{tmp_path / 'mine.py'}:f"}))
    for words in ("a forward pass of", "4 sequences", "CUDA out of memory", "train.tokens_per_microbatch (it is 16384)",
                  "model.activation_checkpointing=true"):  # fmt: skip
        assert words in said


def test_a_file_that_is_not_there(tmp_path: Path, capsys: Output) -> None:
    said = mistake(capsys, "train", configuration(tmp_path, algorithm={"policy_loss": "mine.py:f"}))
    assert "no file" in said and "mine.py" in said


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        (
            {"policy_loss": "sppo", "aggregation": "token-mean"},
            ["sppo", "aggregation=token-mean", "seq-mean-token-mean"],
        ),
        ({"policy_loss": "gspoo"}, ["unknown policy_loss 'gspoo'; did you mean 'gspo'? (or give file.py:function)"]),
        ({"advantage": "rlooo"}, ["'rlooo'", "'rloo'"]),
        ({"advantage": "gae"}, ["gae advantage needs a critic"]),
        ({"cov_low": 5.0, "cov_high": 1.0, "policy_loss": "clip_cov"}, ["cov_low 5 is not below cov_high 1"]),
        ({"tau_positive": 2.0}, ["tau_positive is 2.0", "uses it"]),
        ({"values": {"eta": 1}}, ["algorithm.values.eta is set"]),
        ({"correction": {"preset": "decoupled_tis"}}, ["unknown preset 'decoupled_tis'", "did you mean"]),
        ({"correction": {"weights": "token", "weight_floor": 3.0}}, ["weight_floor 3 is not below weight_cap 2"]),
        ({"correction": {"reject": {"seq_mean_k1": [1.1, 0.9]}}}, ["the lower bound is not below the upper"]),
        ({"correction": {"reject": {"seq_min_k1": [0.9, 1.1]}}}, ["unknown level 'seq_min_k1'", "seq_"]),
        ({"correction": {"preset": "bypass_pg_is"}}, ["ratio of ppo_clip to the sampler is that weight already"]),
        ({"correction": {"preset": "decoupled_token_is"}, "old_logp": "rollout"}, ["old_logp=rollout makes them one"]),
        ({"policy_loss": "decoupled_ppo", "correction": {"mode": "bypass"}}, ["not in bypass mode"]),
        ({"correction": {"normalize": True}}, ["its weights are none"]),
        ({"correction": {"normalize": True, "reject": {"token_k2": [1.0]}}}, ["its weights are none"]),
        (
            {"policy_loss": "decoupled_ppo", "correction": {"preset": "decoupled_token_is"}},
            ["decoupled_ppo policy loss has these weights already", "policy_loss=ppo_clip"],
        ),
    ],
)
def test_pieces_that_do_not_go_together(
    algorithm: dict[str, Any], expected: list[str], tmp_path: Path, capsys: Output
) -> None:
    said = mistake(capsys, "train", configuration(tmp_path, algorithm=algorithm))
    assert [e for e in expected if e not in said] == [], said
    assert not (tmp_path / "run").exists()
