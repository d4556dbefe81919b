"""The commands: their help, what they write, and their exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from hybridflow.cli.main import _parser, main
from hybridflow.config.locate import load_function
from hybridflow.tracking.events import read_events
from hybridflow.tracking.rollouts import read_rollouts

from runs import CONVERSATIONS, configuration, metrics, mistake, succeed
from tiny import CARRY

Output = pytest.CaptureFixture[str]
COMMANDS = [
    "train",
    "sft",
    "reward-model",
    "audit-reward",
    "eval",
    "check",
    "init",
    "schema",
    "recipes",
    "completion",
    "generate",
    "export",
    "report",
    "prepare",
]
EVERY_STEP = {
    "training": ["global_step", "epoch", "equal_reward_groups"],
    "critic": ["score/mean", "score/max", "score/min", "rewards/mean", "advantages/mean"],
    "actor": ["loss", "pg_loss", "pg_clipfrac", "ppo_kl", "entropy", "grad_norm", "lr", "skipped_nonfinite"],
    "response_length": ["mean", "max", "clip_ratio"],
    "prompt_length": ["mean"],
    "perf": ["throughput", "time_per_step", "total_num_tokens", "cpu_memory_used_gb"],
    "timing_s": ["gen", "reward", "adv", "update_actor", "update_weights", "step"],
}


def test_help_is_there_without_torch() -> None:
    code = "import sys\nfrom hybridflow.cli.main import main\ntry: main(['--help'])\nfinally: print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text, modules = done.stdout.rsplit("\n", 2)[0], done.stdout.splitlines()[-1].split()
    assert [c for c in COMMANDS if f"    {c} " not in text.replace("\n", " ")] == []
    assert "yaml" in modules
    assert {"torch", "transformers", "pyarrow"} & set(modules) == set()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    printed = capsys.readouterr().out
    assert ended.value.code == 0
    assert printed.startswith(f"usage: hybridflow {command}")
    assert "\n\n" in printed and ".\n" in printed, "a sentence that says what it does"


@pytest.mark.parametrize("arguments", [[], ["trian", "x.yaml"], ["train"], ["train", "x.yaml", "--steps", "3"]])
def test_a_command_line_that_is_none_shows_the_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: hybridflow" in capsys.readouterr().err


def test_check_shows_tokens_and_arithmetic_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = configuration(tmp_path)
    overrides = ["train.prompts_per_step=6", "train.samples_per_prompt=4", "train.sequences_per_update=8"]
    said = succeed(capsys, "check", config, *overrides, "train.epochs_per_step=2", "train.steps=5")
    row = load_function(f"{CARRY}:problems")(seed=3)[0]
    assert f"first prompt, token by token: <|user|>|{'|'.join(row['prompt'])}|<|end|>|<|assistant|>" in said
    assert "draws 6 prompts and generates 4 responses to each: 24 responses of at most 8 tokens" in said
    assert "it makes 6 optimizer steps on 8 responses each" in said
    assert "the longest possible sequence has 24" in said
    assert "5 steps: 30 prompts, 120 responses, 30 optimizer steps" in said
    assert "longest prompt 11 tokens" in said and "100 rows" in said and "8 rows" in said
    value = sum(map(ord, row["ground_truth"])) % 101 / 101
    assert f"ground truth {row['ground_truth']!r} given as the response scores {value:g}\n" in said
    assert said.endswith("all checks passed\n")
    assert not (tmp_path / "run").exists()


def test_check_of_conversations_shows_what_is_learned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = succeed(capsys, "check", configuration(tmp_path, "sft"))
    question, answer = (m["content"] for m in CONVERSATIONS[0]["messages"])
    opening = f"<|user|>|{'|'.join(question)}|<|end|>|<|assistant|>"
    assert f"token by token: {opening}|{'|'.join(answer)}|<|end|>\n" in said
    assert f"of these the loss is on: {'|'.join(answer)}|<|end|>\n" in said
    assert "3 optimizer steps on 4 conversations each" in said


def test_check_of_an_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = succeed(capsys, "check", configuration(tmp_path, "eval"))
    assert "evaluation data" in said and "training data" not in said


def test_a_training_run_leaves_all_its_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = succeed(capsys, "train", configuration(tmp_path), "checkpoint.every=1", "optim.lr=1e-4")
    run = tmp_path / "run"
    assert f"model: {run / 'model'}" in said and f"report: {run / 'report.html'}" in said
    resolved = yaml.safe_load((run / "config.yaml").read_text())
    assert resolved["optim"]["lr"] == 1e-4 and resolved["optim"]["eps"] == 1e-8
    before, *steps = metrics(run)
    assert [before["step"], *(m["step"] for m in steps)] == [0, 1, 2]
    names = [f"{part}/{name}" for part, inner in EVERY_STEP.items() for name in inner]
    assert [n for m in steps for n in names if n not in m] == []
    assert all(m["actor/grad_norm"] > 0 and m["actor/ppo_kl"] == 0 for m in steps)
    assert [m["step"] for m in metrics(run) if "val-core/carry/reward/mean@1" in m] == [0, 2]
    assert len(read_rollouts(run / "evaluations/step-000002.parquet")) == 4
    answers = read_rollouts(run / "rollouts/step-000001.parquet")
    assert [(a["draw"], a["sample"]) for a in answers] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert steps[0]["critic/score/mean"] == pytest.approx(sum(a["reward"] for a in answers) / 4, abs=1e-7)
    assert all(len(a["tokens"]) == len(a["logps"]) == len(a["token_ids"]) <= 8 for a in answers)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-000001", "step-000002"]
    assert [e["kind"] for e in read_events(run / "events.jsonl") if e["kind"] != "advice"] == ["done"]
    plain, untrained = AutoModelForCausalLM.from_pretrained(run / "model"), load_function(f"{CARRY}:tiny_qwen3")(3)[0]
    weight, began = plain.model.embed_tokens.weight, untrained.model.embed_tokens.weight
    assert 0 < (weight - began).abs().max() < 1e-3
    assert AutoTokenizer.from_pretrained(run / "model").chat_template


def test_fine_tuning_makes_a_model_that_the_other_commands_take(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    succeed(capsys, "sft", configuration(tmp_path, "sft"))
    run = tmp_path / "run"
    steps = metrics(run)
    assert [m["step"] for m in steps] == [1, 2, 3]
    for name in ("train/loss", "train/lr", "train/grad_norm", "train/global_tokens", "perf/throughput"):
        assert all(m[name] > 0 for m in steps), name
    assert steps[-1]["train/loss"] < steps[0]["train/loss"]

    config = configuration(tmp_path, "eval", run={"folder": str(tmp_path / "eval")}, model={"path": str(run / "model")})
    said = succeed(capsys, "eval", config)
    result = json.loads((tmp_path / "eval/evaluation.json").read_text())
    answers = read_rollouts(tmp_path / "eval/answers.parquet")
    mean = sum(a["reward"] for a in answers) / 4
    assert (result["prompts"], len(answers)) == (4, 4)
    assert result["metrics"]["val-core/carry/reward/mean@1"] == pytest.approx(mean)
    assert f"val-core/carry/reward/mean@1 = {mean:.4f}, 95 % interval " in said and ", 4 prompts\n" in said

    asked = succeed(capsys, "generate", run, "1+1=", "--max-tokens", "5")
    assert asked == succeed(capsys, "generate", run / "model", "1+1=", "--max-tokens", "5")
    assert asked.endswith("[cut at 5 tokens]\n")
    several = succeed(
        capsys, "generate", run, "1+1=", "2+2=", "--samples", "3", "--temperature", "2", "--max-tokens", "8"
    ).splitlines()
    assert [line[:4] for line in several] == ["1+1="] * 3 + ["2+2="] * 3
    assert len(set(several)) == 6

    assert f"wrote {run / 'report.html'}" in succeed(capsys, "report", run)
    assert "<html" in (run / "report.html").read_text()


def test_an_export_of_adapters_computes_what_they_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, tokenizer = load_function(f"{CARRY}:tiny_qwen3")(seed=0)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    config = configuration(tmp_path, "sft", model={"path": str(tmp_path / "base"), "lora": {"rank": 4}})
    succeed(capsys, "sft", config, "optim.lr=3e-2", "checkpoint.every=2")
    run, target = tmp_path / "run", tmp_path / "exports/merged"
    said = succeed(capsys, "export", run, target)
    assert said == f"wrote {target}\n"
    ids = torch.tensor([tokenizer("<|user|>12+34=<|end|><|assistant|>").input_ids])

    def logits(folder: Path, adapter: str | None = None) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, str(run / "checkpoints" / adapter / "adapter"))
        with torch.no_grad():
            return model.eval()(ids).logits

    applied, exported = logits(tmp_path / "base", "step-000003"), logits(target)
    assert (applied - logits(tmp_path / "base")).abs().max() > 0.1, "the adapters must do something"
    torch.testing.assert_close(exported, applied, atol=1e-5, rtol=0)
    torch.testing.assert_close(logits(run / "model"), applied, atol=1e-5, rtol=0)

    succeed(capsys, "export", run, tmp_path / "older", "--step", "2")
    torch.testing.assert_close(logits(tmp_path / "older"), logits(tmp_path / "base", "step-000002"), atol=1e-5, rtol=0)
    succeed(capsys, "export", run, tmp_path / "half", "--dtype", "bfloat16")
    half, full = (AutoModelForCausalLM.from_pretrained(f, dtype="auto") for f in (tmp_path / "half", target))
    assert (half.dtype, full.dtype) == (torch.bfloat16, torch.float32)
    for (name, a), b in zip(half.named_parameters(), full.parameters()):
        assert a.equal(b.bfloat16()), name

    assert f"{target} exists already" in mistake(capsys, "export", run, target)
    assert "has no checkpoint of step 7" in (said := mistake(capsys, "export", run, tmp_path / "x", "--step", "7"))
    assert "it has 2, 3" in said


def test_a_shorter_run_may_be_made_longer_and_says_when_it_was_stopped_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configuration(tmp_path)
    succeed(capsys, "train", config, "train.steps=1")
    assert main(["train", config, "train.steps=2", "run.max_minutes=1e-9"]) == 130  # model/ of the first is still there
    said = capsys.readouterr().out
    assert f"stopped after step 1; to resume: hybridflow train {config} train.steps=2 run.max_minutes=1e-9" in said
    succeed(capsys, "train", config, "train.steps=2")
    kinds = [e["kind"] for e in read_events(tmp_path / "run/events.jsonl") if e["kind"] != "advice"]
    assert kinds == ["done", "resume", "config", "stopped", "resume", "config", "done"]


def test_a_script_reads_what_the_commands_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    succeed(capsys, "sft", configuration(tmp_path, "sft"))
    run = tmp_path / "run"
    asked = ["generate", run, "1+1=", "2+2=", "--max-tokens", "3", "--samples", "2", "--temperature", "1"]
    answers = [json.loads(line) for line in succeed(capsys, *asked, "--json").splitlines()]
    assert [(a["prompt"], a["sample"]) for a in answers] == [("1+1=", 0), ("1+1=", 1), ("2+2=", 0), ("2+2=", 1)]
    plain = [line.removesuffix("  [cut at 3 tokens]") for line in succeed(capsys, *asked).splitlines()]
    assert plain == [a["prompt"] + a["response"] for a in answers]
    assert all(a["tokens"] == 3 for a in answers if a["finish_reason"] == "length")
    assert json.loads(succeed(capsys, "report", run, "--json")) == {"report": str(run / "report.html")}
    done = json.loads(succeed(capsys, "export", run, tmp_path / "out", "--dtype", "bfloat16", "--json"))
    assert done == {"folder": str(tmp_path / "out"), "step": 3, "dtype": "bfloat16"}

    prepared = json.loads(succeed(capsys, "prepare", "carry", "--out", tmp_path / "rows", "--rows", "3", "--json"))
    assert prepared["folder"] == str(tmp_path / "rows") and "train.parquet: 3 rows" in prepared["said"][0]

    config = configuration(tmp_path, "eval", run={"folder": str(tmp_path / "eval")}, model={"path": str(run)})
    result = json.loads(succeed(capsys, "eval", config, "--json"))
    assert result == json.loads((tmp_path / "eval/evaluation.json").read_text())
    said = mistake(capsys, "report", tmp_path / "eval", "--json")
    assert "holds an evaluation, not a run" in said and "hybridflow eval" in said


def test_a_run_that_is_not_done_has_no_model_to_ask(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = configuration(tmp_path, "sft", checkpoint={"every": 1})
    succeed(capsys, "sft", config)
    (tmp_path / "run/model/config.json").unlink()
    said = mistake(capsys, "generate", tmp_path / "run", "1+1=")
    assert f"the run in {tmp_path / 'run'} has no model yet" in said and "hybridflow export" in said


# --- how a command line is read, and how its output ends ---


@pytest.mark.parametrize("name", ["train", "check", "eval", "init", "generate", "export"])
def test_options_stand_anywhere(name: str) -> None:
    base, option, more = {
        "train": (["c.yaml"], [], ["optim.lr=3", "run.seed=1"]),
        "check": (["c.yaml"], ["--json", "--explain", "optim.lr"], ["optim.lr=3", "run.seed=1"]),
        "eval": (["a", "b"], ["--config", "e.yaml", "--json"], ["run.folder=x"]),
        "init": ([], ["--model", "m", "--data", "d", "--out", "x", "--kind", "sft"], ["train.steps=5", "optim.lr=1"]),
        "generate": (["m"], ["--stop", "#", "--samples", "2"], ["a b", "1+1="]),
        "export": (["a"], ["--best", "--dtype", "bfloat16"], ["b"]),
    }[name]
    orders = [
        [*base, *option, *more],
        [*option, *base, *more],
        [*base, *more, *option],
        [*base, *more[:1], *option, *more[1:]],
    ]
    given = [vars(_parser().parse_args([name, *order])) for order in orders]
    assert all(one == given[0] for one in given)
    assert given[0].get("overrides", more[-1:])[-1] == more[-1] or given[0].get("prompts") == more


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "c.yaml", "--learning_rate", "1e-5"], "without dashes: optim.lr=1e-5"),
        (["train", "--learning-rate=1e-5", "c.yaml"], "without dashes: optim.lr=1e-5"),
        (["train", "c.yaml", "--optim.lr=1e-5"], "without dashes: optim.lr=1e-5"),
        (["train", "c.yaml", "--optim.lr", "1e-5", "run.seed=1"], "without dashes: optim.lr=1e-5"),
        (["sft", "c.yaml", "--num_train_epochs", "3"], "without dashes: train.epochs=3"),
        (["check", "c.yaml", "-lr", "1"], "without dashes: optim.lr=1"),
        (["eval", "c.yaml", "--temperature"], "without dashes: rollout.temperature=VALUE"),
        (["init", "--model", "m", "--data", "d", "--steps", "3"], "without dashes: steps=3"),
        (["recipes", "carry", "my", "carry"], "one argument too many: carry"),
        (["export", "a", "b", "--format", "x"], "there is no option --format; options are --help, --step, --best"),
        (["trane", "c.yaml"], "invalid choice: 'trane'; did you mean 'train'?"),
        (["frobnicate"], "invalid choice: 'frobnicate' (choose from"),
        (["recipes", "cary"], "invalid choice: 'cary'; did you mean 'carry'?"),
        (["--versoin"], "there is no option --versoin; did you mean --version?"),
        (["--quiet", "train"], "there is no option --quiet; options are -h, --help, --version"),
        (["train", "c.yaml", "--hlep"], "there is no option --hlep; did you mean --help?"),
        (
            ["generate", "m", "2+2=", "--temprature", "1"],
            "there is no option --temprature; did you mean --temperature?",
        ),
        (["generate", "m", "2+2=", "--max_tokens=5"], "there is no option --max_tokens; did you mean --max-tokens?"),
        (["train"], "the following arguments are required: config\n"),
        (["generate", "m"], "the following arguments are required: prompts\n"),
    ],
)
def test_an_option_that_is_none_is_told_what_to_type(arguments: list[str], said: str, capsys: Output) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_a_prompt_may_begin_with_a_dash() -> None:
    assert _parser().parse_args(["generate", "m", "--samples", "2", "--", "-5+3=", "a"]).prompts == ["-5+3=", "a"]


@pytest.mark.parametrize("name", ["train", "sft", "reward-model", "eval", "check", "generate", "export", "report"])
def test_every_path_of_a_command_has_its_home_filled_in(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    monkeypatch.setenv("HOME", "/nowhere")
    more = {"export": ["$HOME/t"], "generate": ["hello"]}.get(name, [])
    for typed in ("~/x", "$HOME/x"):
        assert "/nowhere/x" in mistake(capsys, name, typed, *more)
    with pytest.raises(SystemExit):
        main([name, "$NOT_SET_HERE/x", *more])
    assert "$NOT_SET_HERE, which is not set" in capsys.readouterr().err


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = line.replace("hybridflow", f"{sys.executable} -m hybridflow", 1)
    given = {**os.environ, **environment}
    return subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, env=given)


def test_a_reader_that_goes_and_a_terminal_of_few_letters_end_without_a_traceback(tmp_path: Path) -> None:
    done = shell("hybridflow schema train | true")
    assert (done.returncode, done.stdout, done.stderr) == (141, "", "")
    (tmp_path / "\N{CJK UNIFIED IDEOGRAPH-4E2D}.yaml").write_text("a: 1\n")
    done = shell(f"hybridflow train '{tmp_path}/\N{CJK UNIFIED IDEOGRAPH-4E2D}.yaml'", PYTHONIOENCODING="ascii")
    assert done.returncode == 1 and "Traceback" not in done.stderr and "\\u4e2d.yaml has " in done.stderr


def test_a_command_that_is_shown_can_be_typed(tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["--kind", "sft", "--model", "m", "--data", "d.jsonl", "--out", "my jobs/a b.yaml"]
    assert "next: hybridflow check 'my jobs/a b.yaml'\n" in succeed(capsys, "init", *given)
    assert "#     hybridflow sft 'my jobs/a b.yaml'\n" in Path("my jobs/a b.yaml").read_text()
    assert "fix: hybridflow sft 'my jobs/a b.yaml'" in mistake(capsys, "train", "my jobs/a b.yaml")


def test_without_arguments_the_commands_are_shown(capsys: Output) -> None:
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 2 and "reinforcement learning: generate" in capsys.readouterr().err


def test_a_shell_completes_commands_options_and_keys(tmp_path: Path, capsys: Output) -> None:
    (tmp_path / "c.sh").write_text(succeed(capsys, "completion", "bash"))
    for typed, expected in [
        ("hybridflow che", "check"),
        ("hybridflow check --exp", "--explain"),
        ("hybridflow train c.yaml optim.l", "optim.lr="),
        ("hybridflow init --kind sf", "sft"),
    ]:
        words = typed.split(" ")
        ask = f"COMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}; _hybridflow; echo ${{COMPREPLY[*]}}"
        done = subprocess.run(["bash", "-c", f". {tmp_path}/c.sh; {ask}"], capture_output=True, text=True, check=True)
        assert done.stdout.split() == [expected]
    assert succeed(capsys, "completion", "zsh").startswith("autoload ")
    assert "__fish_seen_subcommand_from train' -a '--help" in succeed(capsys, "completion", "fish")


def test_recipes_are_listed_and_copied_and_a_copy_overwrites_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    monkeypatch.chdir(tmp_path)
    root = Path(CARRY).parents[1]
    names = [r["name"] for r in json.loads(succeed(capsys, "recipes", "--json"))]
    assert names == ["calculator", "carry", "grid", "gsm8k", "rlhf"]
    assert "hybridflow train recipes/carry/grpo.yaml" in succeed(capsys, "recipes", "carry")
    copied = sorted((tmp_path / "recipes/carry").iterdir())
    assert [f.name for f in copied] == sorted(f.name for f in (root / "carry").iterdir() if f.is_file())
    assert all(f.read_bytes() == (root / "carry" / f.name).read_bytes() for f in copied)
    said = mistake(capsys, "recipes", "carry")
    assert "recipes/carry exists already" in said and "hybridflow recipes carry my-carry" in said
    (tmp_path / "file").touch()
    assert "file exists already" in mistake(capsys, "recipes", "carry", "file")
    for place in ("file/carry", "/proc/carry"):
        assert "cannot be written" in mistake(capsys, "recipes", "carry", place)
    assert "hybridflow recipes gsm8k" in mistake(capsys, "recipes", "gsm8k", "")
    assert "hybridflow reward-model 'my own/reward-model.yaml'" in succeed(capsys, "recipes", "rlhf", "my own")
    with pytest.raises(SystemExit):
        main(["recipes", "addition"])
    assert "choose from 'calculator', 'carry', 'grid', 'gsm8k', 'rlhf'" in capsys.readouterr().err
