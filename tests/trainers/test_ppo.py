"""PPO runs: what the critic, the reference and the penalty are given, and that a run goes on with all of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hybridflow.batch import Batch
from hybridflow.commands.check import check
from hybridflow.config.load import load_config
from hybridflow.config.locate import load_function
from hybridflow.errors import UserError
from hybridflow.models.load import load_model
from hybridflow.trainers.rl.loop import estimate, next_groups, update
from hybridflow.trainers.rl.losses import with_loss, with_weights
from hybridflow.trainers.rl.run import RlRun, open_run
from hybridflow.trainers.rl.shaping import token_rewards

from runs import assert_same_tensors, configuration, metrics, mistake, succeed
from tiny import CARRY

Output = pytest.CaptureFixture[str]

PPO: dict[str, Any] = {"preset": "ppo", "kl_reward_coef": 0.5, "kl_controller": "adaptive", "kl_target": 0.01}
PPO |= {"kl_horizon": 40, "kl_loss_coef": 0.1}
KINDS: dict[str, dict[str, Any]] = {
    "critic of its own": {"critic": {"optim": {"lr": 3e-3}, "warmup_steps": 1}},
    "shared trunk": {"critic": {"shared_trunk": True}},
    "adapters": {"critic": {"lora": {"rank": 2}}, "model": {"lora": {"rank": 4}}},
}


def ppo(folder: Path, kind: str = "critic of its own", **sections: dict[str, Any]) -> str:
    folder.mkdir(exist_ok=True)
    given = {"algorithm": PPO, "train": {"steps": 4, "samples_per_prompt": 1, "prompts_per_step": 4}, **KINDS[kind]}
    return configuration(folder, **{**given, **sections})


def measured(folder: Path) -> list[dict[str, Any]]:
    lines = metrics(folder / "run")
    return [{k: v for k, v in m.items() if not k.startswith(("timing_s", "perf", "val-"))} for m in lines]


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[pytest.mark.slow] * (k == "adapters")) for k in KINDS])
def test_a_run_goes_on_bit_for_bit_with_critic_reference_and_penalty(kind: str, tmp_path: Path, capsys: Output) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    succeed(capsys, "train", ppo(whole, kind))
    config = ppo(parts, kind)
    for steps in (2, 3, 4):
        succeed(capsys, "train", config, f"train.steps={steps}")
    assert measured(whole) == measured(parts)
    last = [f / "run/checkpoints/step-000004" for f in (whole, parts)]
    files = sorted(str(p.relative_to(last[0])) for p in last[0].rglob("*.safetensors"))
    critic = "" if kind == "shared trunk" else "critic/"  # its part of the checkpoint
    assert {f"{critic}value_head.safetensors", f"{critic}optimizer.safetensors", "optimizer.safetensors"} <= set(files)
    assert len(files) == (3 if kind == "shared trunk" else 5)
    for file in files:
        assert_same_tensors(*(f / file for f in last))
    # What is exported and published is a plain model, with the names of any other.
    model = load_function(f"{CARRY}:tiny_qwen3")(seed=3)[0]
    exported = load_file(whole / "run/model/model.safetensors")
    assert exported.keys() <= model.state_dict().keys()
    assert float(load_file(last[0] / f"{critic}value_head.safetensors")["weight"].abs().max()) > 0
    steps = measured(whole)[1:]
    assert len({m["actor/reward_kl_penalty_coeff"] for m in steps}) == 4  # the controller moves it
    assert len({m["critic/vf_loss"] for m in steps}) == 4 and all(m["actor/kl_coef"] == 0.1 for m in steps)


def test_in_the_warm_up_the_critic_alone_is_trained(tmp_path: Path, capsys: Output) -> None:
    config = ppo(tmp_path, critic={"warmup_steps": 2}, checkpoint={"every": 1, "keep": 9}, optim={"warmup_steps": 2})
    succeed(capsys, "train", config)
    start = load_function(f"{CARRY}:tiny_qwen3")(seed=3)[0].state_dict()
    folders = [tmp_path / f"run/checkpoints/step-00000{n}" for n in (1, 2, 3, 4)]
    actors, heads = (
        [load_file(f / name) for f in folders] for name in ("model/model.safetensors", "critic/value_head.safetensors")
    )
    for actor in actors[:2]:
        assert all(t.equal(start[n]) for n, t in actor.items())
    assert all(not t.equal(start[n]) for n, t in actors[2].items() if t.ndim > 1)
    assert len({float(h["weight"].sum()) for h in heads}) == 4
    lines = measured(tmp_path)[1:]
    assert ["actor/pg_loss" in m for m in lines] == [False, False, True, True]
    assert [m["actor/lr"] for m in lines[2:]] == [5e-4, 1e-3]  # its schedule begins with its first step
    assert all("critic/vf_loss" in m for m in lines)


def test_the_batch_has_the_values_of_the_critic_and_the_penalty_on_every_token(tmp_path: Path) -> None:
    config = load_config(ppo(tmp_path, train={"steps": 9, "prompts_per_step": 4, "samples_per_prompt": 2}))
    with open_run(config) as run:
        assert run.critic is not None
        for step in (1, 2, 3):
            batch, _ = estimate(run, next_groups(run, step)[0])
            before = run.kl.coef
            found = update(run, batch)
            run.step = step
        untrained, _ = load_model(f"{CARRY}:tiny_qwen3", seed=3)
        run.engine.model.load_state_dict(untrained.state_dict())
        ref_T = run.engine.score(batch, ["logp"])["logp"]
        mask_T = batch["loss_mask_T"]
        assert batch["ref_logp_T"].equal(ref_T)
        kl_T = (batch["rollout_logp_T"] - ref_T) * mask_T  # one update a step: the sampler's are the policy's
        assert float(kl_T.abs().max()) > 1e-3
        torch.testing.assert_close(batch["reward_T"], token_rewards(batch) - before * kl_T)
        parts = kl_T.split(batch.lengths().tolist())
        per_answer = [float(kl[mask].mean()) for kl, mask in zip(parts, batch.rows("loss_mask_T"))]
        assert found["actor/reward_kl_penalty"] == pytest.approx(sum(per_answer) / 8, abs=1e-7)
        assert found["actor/reward_kl_penalty_coeff"] == before != run.kl.coef
        # lam 0.95: the return of an answer's last token is its reward, that of the one before mixes in its value.
        ends = batch.offsets["T"][1:] - 1
        torch.testing.assert_close(batch["return_T"][ends], batch["reward_T"][ends])
        mixed = batch["reward_T"][ends - 1] + 0.95 * batch["return_T"][ends] + 0.05 * batch["value_T"][ends]
        torch.testing.assert_close(batch["return_T"][ends - 1], mixed)
        assert float(batch["value_T"].abs().max()) > 0 and batch["value_T"][~mask_T].eq(0).all()


def test_a_reward_stands_on_the_last_token_with_loss() -> None:
    batch = Batch.from_rows(
        {
            "loss_mask_T": [[False, True, True, False], [False, False], [False, True]],
            "reward_B": [0.5, 3.0, -1.0],
            "trajectory_B": [0, 1, 2],
        }
    )
    assert token_rewards(batch).tolist() == [0, 0, 0.5, 0, 0, 0, 0, -1.0]


@pytest.mark.parametrize(
    ("algorithm", "critic", "kept"),
    [
        ({}, None, 1),
        ({"entropy_coef": 0.01}, None, 2),
        ({"kl_loss_coef": 0.01}, None, 2),
        ({"preset": "ppo"}, {}, 1),
        ({"preset": "ppo"}, {"shared_trunk": True}, 2),
    ],
)
def test_answers_without_advantage_are_left_out_only_where_they_have_no_loss_at_all(
    algorithm: dict[str, Any], critic: dict[str, Any] | None, kept: int, tmp_path: Path
) -> None:
    sections = {"algorithm": algorithm} | ({} if critic is None else {"critic": critic})
    config = load_config(configuration(tmp_path, **sections))
    batch = Batch.from_rows(
        {
            "loss_mask_T": [[False, True], [False, True]],
            "advantage_T": [[0.0, 1.0], [0.0, 0.0]],
            "trajectory_B": [0, 1],
        }
    )
    weighted = with_weights(batch, config)
    assert len(with_loss(weighted, config)) == kept and len(weighted) == 2
    assert ("value_weight_T" in weighted) == (critic is not None)
    assert ("kl_weight_T" in weighted) == ("kl_loss_coef" in algorithm)


def steps_with_poisoned_returns(run: RlRun, rows: list[int]) -> None:
    """From the third step on a return is not a number; `rows` gets its data row."""
    for step in range(1, 9):
        batch, _ = estimate(run, next_groups(run, step)[0])
        if step > 2:
            batch["return_T"][batch.sequence_of() == 1] = math.nan
            rows.append(batch.objects("row")[1])
        found = update(run, batch)
        run.step = step
        assert found["critic/skipped_nonfinite"] == float(step > 2)
        assert found.get("actor/skipped_nonfinite", 0.0) == 0


def test_a_critic_whose_loss_is_not_finite_ends_the_run_although_the_actor_learns(tmp_path: Path) -> None:
    config = load_config(ppo(tmp_path, train={"steps": 9, "prompts_per_step": 4, "samples_per_prompt": 1}))
    rows: list[int] = []
    with pytest.raises(UserError) as caught, open_run(config) as run:
        steps_with_poisoned_returns(run, rows)
    assert run.step == 4  # it ended in the fifth
    assert f"the loss was not finite 3 updates in a row; last in data rows {rows[-1:]}" in caught.value.what
    assert "the critic: loss nan" in caught.value.why and "lower critic.optim.lr" in caught.value.fix


@pytest.fixture(scope="module")
def wider(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model with one token more."""
    folder = tmp_path_factory.mktemp("wider")
    model, tokenizer = load_function(f"{CARRY}:tiny_qwen3")()
    tokenizer.add_tokens(["<new>"])
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(("section", "key"), [("model", "reference"), ("critic", "path")])
def test_a_reference_or_critic_that_reads_other_tokens_is_refused(
    section: str, key: str, wider: str, tmp_path: Path
) -> None:
    config = load_config(ppo(tmp_path, **{section: {key: wider}}))
    for attempt in (lambda: list(check(config)), lambda: open_run(config)):
        with pytest.raises(UserError, match=rf"{section}\.{key} .* has another tokenizer than model\.path"):
            attempt()


def test_the_check_says_what_stands_beside_the_actor(tmp_path: Path) -> None:
    said = {kind: list(check(load_config(ppo(tmp_path, kind)))) for kind in KINDS}
    own = f"critic: a model of its own, from {CARRY}:tiny_qwen3; it is trained alone in the first 1 steps"
    assert own in said["critic of its own"]
    assert "critic: a value head on the actor's own trunk" in said["shared trunk"]
    assert f"reference: a second model that is never trained, {CARRY}:tiny_qwen3" in said["shared trunk"]
    assert "reference: the actor with its adapters switched off" in said["adapters"]


def test_a_run_does_not_go_on_with_another_kind_of_critic(tmp_path: Path, capsys: Output) -> None:
    config = ppo(tmp_path)
    succeed(capsys, "train", config, "train.steps=2")
    said = mistake(capsys, "train", config, "critic={shared_trunk: true}")
    assert "holds a run with other settings: critic.shared_trunk was false, is true" in said


def test_a_reference_of_its_own_is_used(tmp_path: Path) -> None:
    model, tokenizer = load_function(f"{CARRY}:tiny_qwen3")(seed=77)
    model.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    config = load_config(ppo(tmp_path / "work", "adapters", model={"reference": str(tmp_path / "other")}))
    with open_run(config) as run:
        batch, _ = estimate(run, next_groups(run, 1)[0])
        run.engine.model.load_state_dict(load_model(str(tmp_path / "other"))[0].state_dict())
        torch.testing.assert_close(batch["ref_logp_T"], run.engine.score(batch, ["logp"])["logp"])


@pytest.mark.slow
@pytest.mark.parametrize("critic", [{"optim": {"lr": 3e-3}, "epochs_per_step": 2}, {"shared_trunk": True}])
def test_it_learns_from_one_answer_to_each_prompt(critic: dict[str, Any], tmp_path: Path, capsys: Output) -> None:
    config = ppo(
        tmp_path,
        algorithm={"preset": "ppo"},
        critic=critic,
        data={"eval": None},
        eval={"every": 0},
        train={"steps": 25, "prompts_per_step": 32, "samples_per_prompt": 1},
        optim={"lr": 3e-3, "betas": [0.9, 0.99]},
    )
    (tmp_path / "reward.py").write_text("def score(response):\n    return sum(c.isdigit() for c in response) / 8\n")
    succeed(capsys, "train", config)
    scores = [m["critic/score/mean"] for m in metrics(tmp_path / "run")[1:]]
    assert sum(scores[:3]) / 3 < 0.15 and sum(scores[-3:]) / 3 > 0.8, scores
