"""Rollout correction in a run: what is rejected does not count, and weights act on the policy term alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hybridflow.batch import Batch
from hybridflow.config.load import load_config
from hybridflow.trainers.rl.batches import batch_of
from hybridflow.trainers.rl.corrections import with_current
from hybridflow.trainers.rl.loop import estimate, next_groups
from hybridflow.trainers.rl.losses import with_weights
from hybridflow.trainers.rl.run import RlRun, open_run

from runs import assert_same_tensors, configuration, metrics, succeed

REJECT = {"reject": {"token_k1": [0.9, 1.1]}}
EVERYTHING_PASSES = {"reject": {"seq_mean_k3": [1e6]}}


def opened(folder: Path, **algorithm: Any) -> RlRun:
    return open_run(load_config(configuration(folder, algorithm=algorithm, data={"eval": None})))


def off_policy(run: RlRun, by: float) -> list[Any]:
    """A step's groups, of which every other token claims to come from another distribution."""
    groups, _ = next_groups(run, 1)
    for g in groups:
        for t in g.trajectories:
            t.sequences[0].logps = [logp + (by if i % 2 else 0.0) for i, logp in enumerate(t.logps)]
    return groups


def answers(batch: Batch) -> int:
    return int(batch["loss_mask_T"].sum())


@pytest.mark.parametrize("mode", ["decoupled", "bypass"])
def test_denominators_count_what_is_left(mode: str, tmp_path: Path) -> None:
    algorithm = {"aggregation": "token-mean", "correction": {"mode": mode, **REJECT}}
    with opened(tmp_path, **algorithm) as run:
        groups = off_policy(run, by=0.5)
        batch, measured = estimate(run, groups)
        current, found = with_current(batch, run.config, run.engine)
        weighted = with_weights(current, run.config)
        whole = batch_of(groups)
        first = [t.logps and (len(t.logps) + 1) // 2 for g in groups for t in g.trajectories]  # tokens left alone
        assert answers(current) == sum(first) < answers(whole)
        torch.testing.assert_close(float(weighted["policy_weight_T"].sum()), 1.0)
        shares = measured | found
        assert shares["rollout_corr/rollout_rs_masked_fraction"] == pytest.approx(1 - sum(first) / answers(whole))


def test_weights_of_tokens_are_those_of_the_policy_over_the_sampler(tmp_path: Path) -> None:
    with opened(tmp_path, correction={"preset": "decoupled_token_is", "weight_cap": 1.5}) as run:
        batch, _ = estimate(run, off_policy(run, by=-0.7))
        place_T = torch.arange(batch.total()) - batch.offsets["T"][batch.sequence_of()]
        first_T = (batch["loss_mask_T"].cumsum(0) > 0) & batch["loss_mask_T"]
        start_B = torch.full((len(batch),), 10**6).scatter_reduce(
            0, batch.sequence_of()[first_T], place_T[first_T], "amin"
        )
        odd_T = (place_T - start_B[batch.sequence_of()]) % 2 == 1
        weight_T = batch["rollout_weight_T"]
        torch.testing.assert_close(weight_T[first_T & odd_T], torch.full_like(weight_T[first_T & odd_T], 1.5))
        expected_T = torch.ones_like(weight_T[first_T & ~odd_T])
        torch.testing.assert_close(weight_T[first_T & ~odd_T], expected_T, atol=1e-4, rtol=0)


def test_where_both_engines_agree_nothing_changes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The inline engine's log-probabilities are the trainer's: all weights are 1 and nothing is rejected."""
    found = {}
    for name, correction in {"without": {}, "passes": {"mode": "decoupled", **EVERYTHING_PASSES}}.items():
        (tmp_path / name).mkdir()
        path = configuration(tmp_path / name, algorithm={"correction": correction, "old_logp": "recompute"})
        succeed(capsys, "train", path)
        found[name] = tmp_path / name / "run"
    assert_same_tensors(*(run / "model/model.safetensors" for run in found.values()))
    lines = metrics(found["passes"])[1:]
    assert all(abs(m["rollout_corr/k3_kl"]) < 1e-6 and m["rollout_corr/ppl_ratio"] == pytest.approx(1) for m in lines)
    gap = [m["rollout_corr/k3_kl"] for m in metrics(found["without"])[1:]]  # measured wherever both are known
    assert gap == [m["rollout_corr/k3_kl"] for m in lines]
