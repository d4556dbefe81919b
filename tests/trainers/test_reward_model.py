"""Reward models: the gradient of pairs however they are cut, learning, going on, what is exported, and bad rows."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from hybridflow.commands.check_preferences import check_preferences
from hybridflow.config.sections.optim import OptimSection
from hybridflow.data.preference import load_preferences
from hybridflow.engines.local import LocalEngine
from hybridflow.errors import UserError
from hybridflow.models.attention import ATTENTION
from hybridflow.models.load import load_model
from hybridflow.protocols.training import Loss
from hybridflow.runs.lifecycle import Interrupted
from hybridflow.trainers.reward_model import pair_metrics, train_reward_model

from preferences import classifier, config_of, pairs, saved_classifier, tokenizer, yaml_of
from runs import assert_same_tensors, metrics, mistake, succeed
from tiny import CARRY, in_double

Output = pytest.CaptureFixture[str]
WEIGHTS = "model/model.safetensors"


def reference_gradient(model: PreTrainedModel, rows: list[dict[str, Any]], center: float) -> tuple[float, list[Tensor]]:
    """Loss and gradient of all pairs at once, each conversation through Hugging Face's own forward."""
    own = tokenizer()
    losses = []
    for row in rows:
        values = []
        for key in ("chosen", "rejected"):
            messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[key]}]
            ids = own(own.apply_chat_template(messages, tokenize=False), return_tensors="pt").input_ids
            values.append(model(input_ids=ids).logits[0, 0])
        chosen, rejected = values
        losses.append(-logsigmoid(chosen - rejected - row["margin"]) + center * (chosen + rejected) ** 2)
    loss = torch.stack(losses).mean()
    loss.backward()
    return float(loss.detach()), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("budget", [28, 70, 10_000])
def test_the_gradient_is_that_of_all_pairs_however_they_are_cut(budget: int) -> None:
    rows = [row | {"margin": 0.25 * i} for i, row in enumerate(pairs(count=7))]
    model = in_double(classifier("qwen2"))
    loss, expected = reference_gradient(model, rows, 0.05)
    model.zero_grad()
    model.set_attn_implementation(ATTENTION)
    engine = LocalEngine(model, OptimSection(clip_grad_norm=1e9), total_steps=1, tokens_per_microbatch=budget)
    config = config_of(Path("unused"), data={"margin_key": "margin"}).data
    data = load_preferences(config.train, config, tokenizer(), seed=0, padding=0)
    data.data.rows[:7] = rows
    batch = data.batch(range(7))
    value_N2 = engine.score(batch, ["value"])["value"][batch["loss_mask_T"]].view(-1, 2)
    assert len(value_N2) == 7 and pair_metrics(value_N2, batch, 0.05)["loss"] == pytest.approx(loss, abs=1e-7)
    batch["partner_value_T"] = torch.zeros(batch.total(), dtype=torch.float64)
    batch["partner_value_T"][batch["loss_mask_T"]] = value_N2.flip(1).flatten()
    for name in ("margin_T", "pair_weight_T"):
        batch[name] = batch[name].double()
    batch["pair_weight_T"] = torch.full((batch.total(),), 1 / 7, dtype=torch.float64)
    sums = engine.passes.accumulate(batch, Loss("bradley_terry", {"center_coef": 0.05}))
    assert sums.loss == pytest.approx(loss, abs=1e-12)
    found = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(found) == len(expected)
    assert max(float((a - b).abs().max()) for a, b in zip(found, expected)) < 1e-10


def test_it_learns_and_transformers_scores_what_is_exported_alike(tmp_path: Path) -> None:
    config = config_of(
        tmp_path,
        model={"path": f"{CARRY}:tiny_qwen3"},
        train={"steps": 25, "pairs_per_update": 16},
        optim={"lr": 1e-3},
        eval={"every": 10},
    )
    train_reward_model(config)
    lines = metrics(tmp_path / "run")
    evaluated = {m["step"]: m["val/accuracy"] for m in lines if "val/accuracy" in m}
    assert list(evaluated) == [0, 10, 20, 25]
    assert evaluated[0] == 0.5 and lines[1]["train/loss"] == pytest.approx(0.6931472)  # a head of zeros knows nothing
    assert evaluated[25] >= 0.9 and lines[-1]["val/margin"] > 1
    folder = tmp_path / "run/model"
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["Qwen3ForSequenceClassification"]
    assert model.config.num_labels == 1 and tuple(model.score.weight.shape) == (1, 128)
    own, values = AutoTokenizer.from_pretrained(folder), []
    for row in pairs(seed=3):
        for key in ("chosen", "rejected"):
            messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[key]}]
            text = own.apply_chat_template(messages, tokenize=False)
            with torch.no_grad():
                values.append(float(model(**own(text, return_tensors="pt", add_special_tokens=False)).logits))
    assert sum(values[::2]) / 60 == pytest.approx(lines[-1]["val/chosen_reward"], abs=1e-5)
    assert sum(values[1::2]) / 60 == pytest.approx(lines[-1]["val/rejected_reward"], abs=1e-5)


def test_a_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_reward_model(config_of(whole, checkpoint={"every": 2}))
    train_reward_model(config_of(parts, train={"steps": 2, "pairs_per_update": 6}))
    train_reward_model(config_of(parts))
    for file in (WEIGHTS, "checkpoints/step-000004/optimizer.safetensors"):
        assert_same_tensors(whole / "run" / file, parts / "run" / file)
    kept = [
        [
            {k: v for k, v in line.items() if not k.startswith(("timing_s", "perf", "val"))}
            for line in metrics(folder / "run")
        ]
        for folder in (whole, parts)
    ]
    assert kept[0] == kept[1] and [line["step"] for line in kept[0]] == [0, 1, 2, 3, 4]


def interrupting(rows: list[Any], epoch: int) -> list[int]:
    """An order of rows that sends Ctrl-C when the second epoch is drawn, once."""
    if epoch == 1 and not os.environ.get("HYBRIDFLOW_TEST_INTERRUPTED"):
        os.environ["HYBRIDFLOW_TEST_INTERRUPTED"] = "1"
        os.kill(os.getpid(), signal.SIGINT)
    return list(range(len(rows)))


def test_ctrl_c_saves_what_was_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    data = {"order": f"{__file__}:interrupting"}
    monkeypatch.setenv("HYBRIDFLOW_TEST_INTERRUPTED", "1")
    train_reward_model(config_of(tmp_path / "whole", data=data, train={"steps": 12, "pairs_per_update": 6}))
    monkeypatch.setenv("HYBRIDFLOW_TEST_INTERRUPTED", "")
    config = config_of(tmp_path / "parts", data=data, train={"steps": 12, "pairs_per_update": 6})
    with pytest.raises(Interrupted, match="Ctrl-C after step 11"):
        train_reward_model(config)
    assert not (tmp_path / "parts/run/model").exists()
    train_reward_model(config)
    assert_same_tensors(tmp_path / "whole/run" / WEIGHTS, tmp_path / "parts/run" / WEIGHTS)


def test_padded_is_as_packed(tmp_path: Path) -> None:
    found = []
    for packing in (True, False):
        folder = tmp_path / str(packing)
        folder.mkdir()
        path = saved_classifier(folder / "start")
        train_reward_model(config_of(folder, model={"path": str(path), "packing": packing}, optim={"eps": 1e-4}))
        found.append([line["train/loss"] for line in metrics(folder / "run")[1:]])
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    assert found[0][0] != pytest.approx(0.6931472, abs=1e-3)  # it began with the head that was there


@pytest.mark.slow
def test_a_model_cut_over_two_processes_learns_the_same(tmp_path: Path) -> None:
    found = []
    for name, sections in [("one", {}), ("two", {"placement": {"pools": {"all": 2}}, "engine": {"strategy": "fsdp2"}})]:
        folder = tmp_path / name
        folder.mkdir()
        path = saved_classifier(folder / "start")
        train_reward_model(config_of(folder, model={"path": str(path)}, optim={"eps": 1e-4}, **sections))
        model = AutoModelForSequenceClassification.from_pretrained(folder / "run/model")
        found.append((metrics(folder / "run"), model.state_dict()))
    for key in ("train/loss", "train/accuracy", "train/margin"):
        values = [[line[key] for line in lines[1:]] for lines, _ in found]
        assert values[0] == pytest.approx(values[1], abs=1e-5)
    assert max(float((t - found[1][1][n]).abs().max()) for n, t in found[0][1].items()) < 1e-5


def write(folder: Path, rows: list[dict[str, Any]]) -> str:
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_pairs_that_say_nothing_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = pairs(count=5) + [
        {"prompt": "x", "chosen": "a", "rejected": "a"},
        {"prompt": "x", "chosen": "a", "rejected": ""},
        {"prompt": "x", "chosen": "a" * 100, "rejected": "b"},
    ]
    data = {"train": write(tmp_path, rows), "eval": None, "over_long": "filter"}
    said = "\n".join(check_preferences(config_of(tmp_path, data=data)))
    assert "pairs.jsonl: 6, longest conversation" in said
    assert "pairs of two equal responses, left out: 1" in said
    assert "pairs with a conversation of more than 64 tokens, left out: 1" in said
    assert "advice: 1 of 12 responses are empty" in said
    assert "(read at '<|end|>'" in said


def test_conversations_are_read_in_every_form(tmp_path: Path) -> None:
    user, chosen, rejected = (
        {"role": r, "content": c} for r, c in [("user", "q"), ("assistant", "a"), ("assistant", "b")]
    )
    forms = [
        ("prompt", {"prompt": "q", "chosen": "a", "rejected": "b"}),
        ("prompt", {"prompt": [user], "chosen": [chosen], "rejected": [rejected]}),
        ("prompt", {"prompt": "q", "chosen": [user, chosen], "rejected": [user, rejected]}),
        (None, {"chosen": [user, chosen], "rejected": [user, rejected]}),
    ]
    found = []
    for key, row in forms:
        config = config_of(tmp_path, data={"train": write(tmp_path, [row]), "eval": None, "prompt_key": key}).data
        found.append(load_preferences(config.train, config, tokenizer(), seed=0).tokens([0]))
    assert found == [found[0]] * 4
    assert tokenizer().decode(found[0][1]) == "<|user|>q<|end|><|assistant|>b<|end|>"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "q", "chosen": "a", "rejectd": "b"}, "row 0 of .* has no column 'rejected'.*\n.*'rejectd'"),
        ({"chosen": "a", "rejected": "b"}, "has no column 'prompt'"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "prompt of row 0 of .* is a number"),
        ({"prompt": "q", "chosen": 5, "rejected": "b"}, "chosen of row 0 of .* is no response: it is a number"),
        ({"prompt": "q", "chosen": "a" * 99, "rejected": "b"}, "row 0 of .* has a conversation of 1.. tokens"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "in every row of .* chosen and rejected are the same"),
    ],
)
def test_rows_that_are_no_pairs(row: dict[str, Any], expected: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"(?s){expected}"):
        list(check_preferences(config_of(tmp_path, data={"train": write(tmp_path, [row]), "eval": None})))


def test_the_command_checks_runs_and_says_what_a_reward_model_is_not(tmp_path: Path, capsys: Output) -> None:
    config = yaml_of(tmp_path, train={"steps": 1, "pairs_per_update": 4})
    assert "all checks passed" in succeed(capsys, "check", config)
    said = succeed(capsys, "reward-model", config)
    assert f"model: {tmp_path / 'run/model'}" in said
    assert f"fix: hybridflow reward-model {config}" in mistake(capsys, "sft", config)
    (again,) = succeed(capsys, "reward-model", config).splitlines()
    assert "is already done: 1 of 1 steps" in again
    exported = succeed(capsys, "export", tmp_path / "run", tmp_path / "out", "--dtype", "bfloat16")
    assert "wrote" in exported
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.num_labels == 1 and model.score.weight.dtype == torch.bfloat16
    with pytest.raises(UserError, match="is a Qwen3ForSequenceClassification: it has no head that predicts"):
        load_model(str(tmp_path / "out"))
    assert "train.pairs_per_update: missing" in mistake(capsys, "reward-model", config, "train={steps: 2}")
    assert "a reward model is trained as a whole" in mistake(capsys, "reward-model", config, "model.lora={rank: 2}")
