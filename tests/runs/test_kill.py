"""Promise 5: kill a run with SIGKILL in any phase, run the same command again, and it ends bit for bit the same."""

from __future__ import annotations

import functools
import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

import commands
from runs import write_rows
from tiny import CARRY

STEPS = 4

# A reward that differs between answers of an untrained model, so that every step has something to learn from. It also
# keeps a diary, to see that no answer is scored again whose group is in the journal.
TASK = """
import os
from pathlib import Path

def score(response, ground_truth):
    with open(Path(__file__).parent / "diary.txt", "a") as diary:
        diary.write(f"{os.getpid()}\\n")
    return sum(c.isdigit() for c in response) / (len(response) + 1)
"""

RL_CONFIG = """
run: {{folder: "{folder}/run", seed: 3, threads: 1}}
model: {{path: "{task}:tiny_qwen3"}}
data: {{train: "{folder}/problems.jsonl", eval: "{folder}/held_out.jsonl", max_prompt_tokens: 16}}
reward: {{function: "{folder}/reward.py:score"}}
rollout: {{max_response_tokens: 8, max_cache_tokens: 320}}
train: {{steps: {steps}, prompts_per_step: 4, samples_per_prompt: 4, sequences_per_update: 8}}
optim: {{lr: 1e-3}}
eval: {{every: 2, max_rows: 8}}
checkpoint: {{every: 2}}
track: {{console: false}}
"""

SFT_CONFIG = """
run: {{folder: "{folder}/run", seed: 3, threads: 1}}
model: {{path: "{task}:tiny_qwen3"}}
data: {{train: "{folder}/conversations.jsonl"}}
train: {{steps: {steps}, sequences_per_update: 8}}
optim: {{lr: 1e-3, schedule: linear}}
checkpoint: {{every: 2}}
track: {{console: false}}
"""


PPO_CONFIG = """
algorithm: {preset: ppo, kl_reward_coef: 0.2, kl_controller: adaptive, kl_target: 0.01, kl_horizon: 50}
critic: {optim: {lr: 2e-3}, epochs_per_step: 2, warmup_steps: 1}
"""


FILTER_CONFIG = """
algorithm: {preset: remax}
filter: {max_mean: 0.08}
"""


def run(folder: Path, command: str, fault: str | None = None, *, more: str = "") -> int:
    folder.mkdir(exist_ok=True)
    write_rows(folder)
    (folder / "reward.py").write_text(TASK)
    template = RL_CONFIG if command == "train" else SFT_CONFIG
    (folder / "config.yaml").write_text(template.format(folder=folder, task=CARRY, steps=STEPS) + more)
    done = commands.run([command, str(folder / "config.yaml")], folder, HYBRIDFLOW_FAULT=fault or "")
    assert done.status in (0, -signal.SIGKILL), f"exit {done.status}\n{done.said}\n{done.complained}"
    return done.status


def metrics(folder: Path) -> list[dict[str, float]]:
    """What a run recorded, without what measures time and memory."""
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in m.items() if not k.startswith(("timing_s/", "perf/"))} for m in lines]


def assert_same_end(folder: Path, reference: Path) -> None:
    assert metrics(folder) == metrics(reference)
    for file in (f"checkpoints/step-{STEPS:06d}/optimizer.safetensors", "model/model.safetensors"):
        ours, theirs = load_file(folder / "run" / file), load_file(reference / "run" / file)
        assert ours.keys() == theirs.keys()
        assert all(ours[n].equal(theirs[n]) for n in ours), file


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a run that nobody interrupts, made once."""

    @functools.cache
    def made(command: str, more: str = "") -> Path:
        folder = tmp_path_factory.mktemp("reference")
        assert run(folder, command, more=more) == 0
        return folder

    return made


@pytest.fixture
def uninterrupted(whole: Callable[..., Path]) -> Path:
    folder = whole("train")
    assert len({m["actor/grad_norm"] for m in metrics(folder)[1:]}) == STEPS, "the reference run must learn"
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    ["step1:gen", "step1:group:1", "step3:group:3", "step3:group:4", "step4:update", "step3:publish", "step2:eval",
     "step4:record", "step2:save", "step2:saved", "step4:save", "step4:finish"],
)  # fmt: skip
def test_a_killed_run_ends_bit_identical(fault: str, uninterrupted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    assert run(folder, "train", f"kill@{fault}") == -signal.SIGKILL
    assert run(folder, "train") == 0
    assert_same_end(folder, uninterrupted)


@pytest.mark.slow
def test_journaled_groups_are_not_scored_again(uninterrupted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    run(folder, "train", "kill@step3:group:3")
    before = len((folder / "diary.txt").read_text().splitlines())
    assert run(folder, "train") == 0
    after = len((folder / "diary.txt").read_text().splitlines()) - before
    everything = len((uninterrupted / "diary.txt").read_text().splitlines())
    # The second process scores: of each data set a row's ground truth and an empty answer, which the check tries, the
    # missing group of step 3, step 4, and the last evaluation.
    assert after == 2 * 2 + 1 * 4 + 4 * 4 + 8 < everything


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["kill@step3:update", "kill@step2:save", "kill@step2:saved", "kill@step4:finish"])
def test_a_killed_fine_tuning_ends_bit_identical(fault: str, whole: Callable[..., Path], tmp_path: Path) -> None:
    reference, folder = whole("sft"), tmp_path / "work"
    assert run(folder, "sft", fault) == -signal.SIGKILL
    assert run(folder, "sft") == 0
    assert_same_end(folder, reference)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["kill@step3:group:3", "kill@step3:update", "kill@step4:save"])
def test_a_killed_run_with_a_critic_ends_bit_identical(fault: str, whole: Callable[..., Path], tmp_path: Path) -> None:
    reference, folder = whole("train", PPO_CONFIG), tmp_path / "work"
    assert len({m["actor/reward_kl_penalty_coeff"] for m in metrics(reference)[1:]}) == STEPS
    assert run(folder, "train", fault, more=PPO_CONFIG) == -signal.SIGKILL
    assert run(folder, "train", more=PPO_CONFIG) == 0
    assert_same_end(folder, reference)
    for file in ("model/model.safetensors", "value_head.safetensors", "optimizer.safetensors"):
        ours, theirs = (load_file(f / f"run/checkpoints/step-{STEPS:06d}/critic" / file) for f in (folder, reference))
        assert ours.keys() == theirs.keys() and all(ours[n].equal(theirs[n]) for n in ours), file


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["kill@step3:group:2", "kill@step3:group:6", "kill@step3:update"])
def test_a_killed_run_that_filters_against_greedy_answers_ends_bit_identical(
    fault: str, whole: Callable[..., Path], tmp_path: Path
) -> None:
    """The sixth group of a step belongs to its second round of prompts."""
    reference, folder = whole("train", FILTER_CONFIG), tmp_path / "work"
    third = metrics(reference)[3]
    assert third["training/num_gen_batches"] > 1 and third["training/filtered_groups/too easy"] >= 2
    assert run(folder, "train", fault, more=FILTER_CONFIG) == -signal.SIGKILL
    assert run(folder, "train", more=FILTER_CONFIG) == 0
    assert_same_end(folder, reference)
