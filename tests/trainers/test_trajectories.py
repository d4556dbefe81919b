"""Trajectories of several sequences: each sampled token is trained once, however its trajectory was cut and split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hybridflow.algorithms.advantage.registry import advantage_columns
from hybridflow.algorithms.aggregation import token_weights
from hybridflow.algorithms.reweighting import pf_ppo_rows
from hybridflow.batch import Batch
from hybridflow.commands.check import check
from hybridflow.config.kinds.rl import RlConfig
from hybridflow.config.load import load_config
from hybridflow.config.sections.optim import OptimSection
from hybridflow.engines.local import LocalEngine
from hybridflow.engines.passes import microbatches
from hybridflow.errors import UserError
from hybridflow.models.attention import shared_beginnings
from hybridflow.models.forward import beginnings, trunk
from hybridflow.noise import NoiseKey
from hybridflow.protocols.generation import Span
from hybridflow.protocols.groups import Group, TokenSequence, Trajectory, Turn
from hybridflow.protocols.training import Loss
from hybridflow.tracking.rollouts import read_rollouts, write_rollouts
from hybridflow.trainers.rl.batches import batch_of, minibatches
from hybridflow.trainers.rl.corrections import reweighted
from hybridflow.trainers.rl.loop import estimate, train, update
from hybridflow.trainers.rl.measures import batch_metrics, rollout_records
from hybridflow.trainers.rl.run import open_run
from hybridflow.trainers.rl.shaping import Moments, shaped_rewards, token_rewards
from hybridflow.viewer.samples import rollouts

from runs import configuration, metrics
from simulated_ranks import SimulatedRanks
from tiny import packed_model, trajectory_groups, with_policy_columns

LOSS = Loss("policy", {"policy_loss": "ppo_clip", "values": {"clip_dual": 3.0}, "entropy_coef": 0.01})


def engine_of(ranks: int, cut: int) -> LocalEngine | SimulatedRanks:
    """An engine in float64; of 0 ranks, the local one."""
    optim = OptimSection(lr=1e-3, clip_grad_norm=1e9)
    sizes: dict[str, Any] = {"total_steps": 1, "tokens_per_microbatch": cut}
    model = packed_model(dtype=torch.float64)
    return SimulatedRanks(model, optim, ranks=ranks, **sizes) if ranks else LocalEngine(model, optim, **sizes)


def policy_batch(mode: str = "seq-mean-token-mean", seed: int = 0) -> Batch:
    """A step's trajectories with all that the loss reads, in float64."""
    batch = batch_of(trajectory_groups(seed=seed))
    return with_policy_columns(batch, engine_of(0, 1000).score(batch, ["logp"])["logp"], mode)


def gradients_of(engine: LocalEngine | SimulatedRanks, batch: Batch) -> list[Tensor]:
    assert engine.update(batch, LOSS).applied
    return [p.grad.clone() for p in engine.model.parameters() if p.grad is not None]


# --- what is trained ---


def test_every_sampled_token_is_in_the_batch_once_and_a_trajectory_weighs_one_however_it_was_cut() -> None:
    groups = trajectory_groups()
    every, batch = [t for g in groups for t in g.trajectories], batch_of(groups)
    assert {len(t.sequences) for t in every} == {1, 2, 3, 4} and len(batch) == sum(len(t.sequences) for t in every)
    weight_T = token_weights(batch, "seq-mean-token-mean", norm=1)
    for number, t in enumerate(every):
        own = batch.take((batch["trajectory_B"] == number).nonzero()[:, 0])
        assert own["input_ids_T"][own["loss_mask_T"]].tolist() == t.token_ids and t.length == len(t.token_ids)
        assert own["rollout_logp_T"][own["loss_mask_T"]].tolist() == pytest.approx(t.logps)
        assert own["rollout_logp_T"][~own["loss_mask_T"]].eq(0).all()
        whole_T = weight_T[(batch["trajectory_B"] == number)[batch.sequence_of()]]
        assert float(whole_T.sum()) == pytest.approx(1 / len(every))
        steps = [i for i, turn in enumerate(t.turns) for _ in range(turn.start, turn.end)]
        assert own["step_T"][own["loss_mask_T"]].tolist() == steps
        assert own["anchor_T"][own["loss_mask_T"]].tolist() == [t.turns[i].anchor for i in steps]


def test_what_was_observed_has_no_gradient_at_all() -> None:
    """The states that predict observed tokens get exactly none, and no number that stands at such a token is read."""
    batch, engine = policy_batch(), engine_of(0, 1000)
    states: list[Tensor] = []

    def keep(_module: Any, _args: Any, output: Any) -> None:
        output.last_hidden_state.retain_grad()
        states.append(output.last_hidden_state)

    hook = trunk(engine.model).register_forward_hook(keep)
    expected = gradients_of(engine, batch.select([name for name in batch if name != "group_B"]))
    hook.remove()
    (state,) = states
    assert state.grad is not None
    predicts_T = batch["loss_mask_T"].roll(-1)  # no first token of a sequence has loss
    assert state.grad[0][~predicts_T].eq(0).all() and state.grad[0][predicts_T].abs().amax(1).gt(0).all()
    behind_T = (~batch["loss_mask_T"]) & (batch["loss_mask_T"].cumsum(0) > 0)
    assert int(behind_T.sum()) > 50
    whole = gradients_of(engine_of(0, 1000), batch)
    for name in ("advantage_T", "old_logp_T", "rollout_logp_T"):
        batch[name] = batch[name].masked_fill(~batch["loss_mask_T"], torch.nan)
    for found, same, plain in zip(gradients_of(engine_of(0, 1000), batch), whole, expected):
        assert torch.equal(found, same)
        torch.testing.assert_close(found, plain, atol=1e-10, rtol=0)


@pytest.mark.parametrize(("seed", "mode"), enumerate(["token-mean", "seq-mean-token-mean", "prompt-mean"]))
def test_the_update_is_the_same_on_any_number_of_ranks_in_any_order_and_micro_batches(seed: int, mode: str) -> None:
    """All losses and aggregations, on a model without attention: tests/algorithms/test_partition_invariance.py."""
    batch = policy_batch(mode, seed)
    lengths_B, kind_B = beginnings(batch)
    shared, kinds = kind_B.bincount(), dict(zip(kind_B.tolist(), lengths_B.tolist()))
    assert int((shared > 1).sum()) >= 4, "prompts and states that sequences share"
    assert len(set(kinds.values())) < len(kinds), "and others that are as long, and differ"
    whole = gradients_of(engine_of(0, 10_000), batch.select([name for name in batch if name != "group_B"]))
    orders = [torch.arange(len(batch)), torch.randperm(len(batch), generator=torch.Generator().manual_seed(1))]
    for rows in microbatches(batch, 30):
        part = batch.take(rows)
        assert len(shared_beginnings(part.offsets["T"], *beginnings(part)).token_U) <= 30
    for ranks, cut, order in [(0, 10_000, 1), (0, 30, 0), (1, 70, 1), (2, 10_000, 0), (2, 40, 1), (4, 60, 1)]:
        for found, expected in zip(gradients_of(engine_of(ranks, cut), batch.take(orders[order])), whole):
            torch.testing.assert_close(found, expected, atol=1e-10, rtol=0, msg=f"{ranks} ranks, {cut} tokens")


# --- by hand ---


def two_trajectories() -> list[Group]:
    """One of two sequences, three turns and five sampled tokens, whose history was rewritten; and one of one token."""
    first = TokenSequence([1], [2, 3, 4, 5], [-1, -1, 0, -1], [Span(0, 0, 2), Span(0, 3, 4)], [])
    first.turns = [Turn(0, 2, "stop", anchor=5), Turn(3, 4, "stop", anchor=6)]
    first.step_rewards = [(1, 0.25)]
    second = TokenSequence([1, 2], [6, 7], [-1, -1], [Span(0, 0, 2)], [Turn(0, 2, "stop", anchor=5)], fork="rewritten")
    short = TokenSequence([1], [8], [-1], [Span(0, 0, 1)], [Turn(0, 1, "stop", anchor=5)])
    trajectories = [Trajectory(0, [first, second], "done", "", 1.0), Trajectory(1, [short], "done", "", 0.0)]
    return [Group(3, 0, [1], trajectories, baseline=0.5)]


def test_a_reward_is_shaped_by_the_whole_trajectory_and_given_once(tmp_path: Path) -> None:
    batch = batch_of(two_trajectories())
    assert batch["reward_B"].tolist() == [1, 1, 0]
    assert token_rewards(batch).tolist() == [0, 0, 0.25, 0, 0] + [0, 0, 0, 0.75] + [0, 0]
    reward = {"length_coef": -0.8, "overlong_buffer": 4, "overlong_penalty": 0.4}  # of 8 tokens, 5 and 1 were sampled
    config = load_config(configuration(tmp_path, reward=reward))
    found_B = shaped_rewards(batch, config, Moments()).reward_B
    assert found_B.tolist() == pytest.approx([1 - 0.5 - 0.1, 1 - 0.5 - 0.1, -0.1])
    config = load_config(configuration(tmp_path, reward={"normalize": "running", "clip": [0, 0.5]}))
    shaped = shaped_rewards(batch, config, Moments())
    assert shaped.moments == Moments(2, 0.25, 0.125) and shaped.reward_B.tolist() == [1, 1, -1]
    assert shaped.baseline_B is not None and shaped.baseline_B.tolist() == [1, 1, 1]


def test_time_runs_from_one_sequence_to_the_next() -> None:
    batch = batch_of(two_trajectories())
    batch["reward_T"], mask_T = token_rewards(batch), batch["loss_mask_T"]
    batch["value_T"] = torch.full((batch.total(),), 9.0).masked_scatter(mask_T, torch.arange(1, 7) / 10)

    def columns(name: str, **values: Any) -> dict[str, Tensor]:
        return advantage_columns(name, batch, {"normalize_by_std": False, **values})

    returns = columns("gae", gamma=0.5, lam=0.5)["return_T"][mask_T].tolist()
    assert returns == pytest.approx([0.1423828125, 0.36953125, 0.178125, 0.3125, 0.75, 0.0], abs=1e-7)
    assert columns("remax")["advantage_T"][mask_T].tolist() == [0.5, 0.5, 0.25, 0.25, 0.25, -0.5]
    # Steps 0 and 2 of the one and the only step of the other begin in one state; what follows: 0.4375, 0.75, 0.
    mean = (0.4375 + 0.75) / 3
    steps = [0.5 + 0.4375 - mean, 0.5 + 0.4375 - mean, 0.5, 0.5 + 0.75 - mean, 0.5 + 0.75 - mean, -0.5 - mean]
    found = columns("gigpo", gamma=0.5, step_weight=1.0)["advantage_T"][mask_T].tolist()
    assert found == pytest.approx(steps)


def test_a_turn_from_an_unknown_state_is_compared_with_no_other() -> None:
    groups = two_trajectories()
    for t in groups[0].trajectories:
        for turn, anchor in zip(t.turns, [None, None, 6]):
            turn.anchor = anchor
    batch = batch_of(groups)
    batch["reward_T"] = token_rewards(batch)
    found_T = advantage_columns("gigpo", batch, {"normalize_by_std": False, "step_weight": 1.0})["advantage_T"]
    # Both began alike, and earned 1 and 0 from there; the other two turns are alone in their states.
    assert found_T[batch["loss_mask_T"]].tolist() == [1.0, 1.0, 0.5, 0.5, 0.5, -1.0]


def test_trajectories_are_drawn_and_dealt_whole(tmp_path: Path) -> None:
    batch = batch_of(trajectory_groups())
    minis = minibatches(batch, 3)
    assert [mini["trajectory_B"].unique().tolist() for mini in minis] == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert torch.equal(Batch.concat(minis)["input_ids_T"], batch["input_ids_T"])
    config = load_config(configuration(tmp_path, reweight={"method": "pow", "power": 2.0}))
    drawn = reweighted(batch, config, step=4)
    whole = [(batch["trajectory_B"] == i).nonzero()[:, 0] for i in range(8)]
    reward_N, group_N, sample_N = (
        torch.stack([batch[f"{c}_B"][w[0]] for w in whole]) for c in ("reward", "group", "sample")
    )
    key = NoiseKey(config.run.seed, "reweight", 4)
    chosen = pf_ppo_rows(reward_N, group_N, sample_N, key=key, method="pow", power=2.0).tolist()
    assert len(set(chosen)) < len(chosen) == 8, "some twice"
    copies = [batch.take(whole[n]) for n in chosen]
    assert drawn["input_ids_T"].equal(torch.cat([copy["input_ids_T"] for copy in copies]))
    assert drawn["trajectory_B"].tolist() == [i for i, copy in enumerate(copies) for _ in range(len(copy))]


# --- in a run ---


def test_a_step_counts_trajectories_and_writes_a_row_for_each_sequence(tmp_path: Path) -> None:
    algorithm = {"preset": "ppo", "kl_reward_coef": 0.5, "kl_controller": "adaptive", "kl_target": 0.01}
    train = {"steps": 1, "prompts_per_step": 2, "samples_per_prompt": 4, "sequences_per_update": 4}
    critic = {"optim": {"lr": 3e-3}}
    config = load_config(configuration(tmp_path, algorithm=algorithm | {"kl_horizon": 40}, train=train, critic=critic))
    groups = trajectory_groups()
    failed, every = groups[0].trajectories[3], [t for g in groups for t in g.trajectories]
    failed.failure = "the environment raised"
    groups[1].trajectories.append(Trajectory(4, [], "context", "", 0.0))  # there was no room for a turn
    with open_run(config) as run:
        assert isinstance(run.engine, LocalEngine)
        with torch.no_grad():  # away from the reference
            for parameter in run.engine.trained.values():
                parameter.mul_(1.1)
        batch, _ = estimate(run, groups)
        assert set(batch["trajectory_B"].tolist()) == set(range(7))
        whole_N = torch.zeros(7).index_add(0, batch["trajectory_B"][batch.sequence_of()], batch["reward_T"])
        kl_N = torch.zeros(7).index_add(0, batch["trajectory_B"][batch.sequence_of()], batch["kl_T"])
        scored = [t for t in every if t is not failed]
        torch.testing.assert_close(whole_N + 0.5 * kl_N, torch.tensor([t.reward for t in scored]))
        found = update(run, batch)
        mean = sum(float(kl) / t.length for kl, t in zip(kl_N, scored)) / 7
        assert found["actor/reward_kl_penalty"] == pytest.approx(mean, rel=1e-4)
        assert abs(mean) > 1e-4
        error = min(max(mean / 0.01 - 1, -0.2), 0.2)
        assert run.kl.coef == pytest.approx(0.5 * (1 + error * 7 / 40))
        assert run.engine.steps_done == 2  # of 4 and 3 trajectories
        measured = batch_metrics(run, groups, batch)
        assert measured["response_length/max"] == max(t.length for t in every)
        assert measured["critic/rewards/max"] == pytest.approx(float(whole_N.max()))
        path = tmp_path / "run/rollouts/step-000001.parquet"
        write_rollouts(path, rollout_records(run, 1, groups, batch))
    rows = read_rollouts(path)
    assert [(row["draw"], row["sample"], row["sequence"]) for row in rows] == [
        (g.draw, t.sample, i) for g in groups for t in g.trajectories for i in range(len(t.sequences) or 1)
    ]
    sequences = [(t, s) for t in every for s in t.sequences]
    for row, (t, s) in zip(rows, sequences):
        assert row["token_ids"] == s.token_ids and len(row["tokens"]) == len(s.token_ids) and row["fork"] == s.fork
        assert [(turn["start"], turn["end"], turn["anchor"]) for turn in row["turns"]] == [
            (turn.start, turn.end, turn.anchor) for turn in s.turns
        ]
        assert (row["advantage"] is None) == (row["reward"] is None) == (t is failed)
    (step,) = rollouts(path.parent, 1, {})["steps"]
    assert step["answers"] == 9 and step["reward"] == pytest.approx(sum(t.reward for t in scored) / 8)


WORLD = """
import random
from hybridflow import Observation

class Count:
    def __init__(self, failing=9):
        self.failing = failing

    def reset(self, row, seed):
        self.index, self.number, self.turns = row["index"], random.Random(seed).randrange(10), 0
        return f"{self.number}+1="

    def step(self, action):
        self.turns += 1
        if self.index >= self.failing:
            raise OSError("the server is away")
        reward = sum(map(ord, action.text)) % 8 / 8
        return Observation(f"{self.number}+{self.turns}=", reward=reward, done=self.turns == 3, anchor=int(8 * reward))

    def close(self):
        pass
"""


def acting(folder: Path, **more: Any) -> RlConfig:
    (folder / "world.py").write_text(WORLD)
    agent = {"environment": f"{folder}/world.py:Count", "tasks": 6, "eval_tasks": 4, "max_turn_tokens": 4}
    sections: dict[str, Any] = {
        "agent": agent | {"history": "steps", "window": 1, "max_observation_tokens": 16} | more,
        "reward": {"function": "environment"},
        "rollout": {"max_response_tokens": 12},
        "data": {"train": None, "eval": None, "max_prompt_tokens": 32},
        "algorithm": {"advantage": "gigpo", "policy_loss": "gspo", "correction": {"weights": "sequence"}},
        "train": {"steps": 1, "samples_per_prompt": 3, "sequences_per_update": 3},
        "eval": {"every": 1, "max_rows": 4},
    }
    return load_config(configuration(folder, **sections))


def test_a_run_with_a_sequence_for_each_step_trains_evaluates_and_reports_trajectories(tmp_path: Path) -> None:
    told = "policy loss gspo, importance weights (algorithm.correction.weights): computed for each sequence, and with "
    assert told + "agent.history=steps each turn is a sequence of its own" in list(check(acting(tmp_path)))
    path = train(acting(tmp_path))
    (line,) = [m for m in metrics(path) if m["step"] == 1]
    trained, held_out = (read_rollouts(path / f"{f}/step-000001.parquet") for f in ("rollouts", "evaluations"))
    earned: dict[str, list[float]] = {}
    for name, rows in [("trained", trained), ("held out", held_out)]:
        whole: dict[tuple[int, int], list[dict[str, Any]]] = {}
        for row in rows:
            whole.setdefault((row["draw"], row["sample"]), []).append(row)
        assert len(whole) == (6 if name == "trained" else 4)
        for sequences in whole.values():
            assert [row["sequence"] for row in sequences] == [0, 1, 2]
            assert [row["fork"] for row in sequences] == ["", "step", "step"]
            rewards = [turn["reward"] for row in sequences for turn in row["turns"]]
            assert {row["reward"] for row in sequences} == {sum(rewards)}
            earned.setdefault(name, []).append(sum(rewards))
            assert len({row["prompt"] for row in sequences}) == 3 and "=" in sequences[1]["prompt"]
    assert line["critic/score/mean"] == pytest.approx(sum(earned["trained"]) / 6) and line["actor/grad_norm"] > 0
    assert line["val-core/environment/reward/mean@1"] == pytest.approx(sum(earned["held out"]) / 4)
    assert max(earned["held out"]) > 0 and line["val-aux/environment/failed_trajectories"] == 0


def test_an_evaluation_counts_trajectories_that_failed_and_ends_where_most_did(tmp_path: Path) -> None:
    failing = {"environment_kwargs": {"failing": 3}}
    path = train(acting(tmp_path, **failing))
    last = metrics(path)[-1]
    rewards = {row["draw"]: row["reward"] for row in read_rollouts(path / "evaluations/step-000001.parquet")}
    assert last["val-aux/environment/failed_trajectories"] == 1 and rewards[3] == 0
    assert last["val-core/environment/reward/mean@1"] == pytest.approx(sum(rewards.values()) / 4)
    (tmp_path / "most").mkdir()
    with pytest.raises(UserError, match=r"3 trajectories of the evaluation failed, 3 of them with: .*away"):
        train(acting(tmp_path / "most", environment_kwargs={"failing": 1}))
