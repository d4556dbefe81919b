"""The gap between sampler and trainer in runs: where it is measured, what it consists of, what a correction leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hybridflow.config.load import load_config
from hybridflow.models.load import load_model
from hybridflow.noise import NoiseKey
from hybridflow.protocols.generation import Request, Result, Sampling, Span, generate
from hybridflow.protocols.groups import Group, Trajectory, one_turn
from hybridflow.tracking.events import read_events
from hybridflow.trainers.rl.corrections import engine_gap
from hybridflow.trainers.rl.loop import estimate, next_groups, publish_weights, record, update
from hybridflow.trainers.rl.losses import policy_loss, with_weights
from hybridflow.trainers.rl.run import RlRun, open_run

from runs import configuration, metrics, succeed
from tiny import CARRY

PLENTY = {"steps": 2, "prompts_per_step": 4, "samples_per_prompt": 16, "skip_zero_advantage": False}
LOW = {"dtype": "bfloat16", "max_response_tokens": 12}
PARTS = ("numerics", "staleness", "support")


def opened(folder: Path, **sections: Any) -> RlRun:
    folder.mkdir(parents=True, exist_ok=True)
    return open_run(load_config(configuration(folder, data={"eval": None}, **sections)))


def gap_of(found: dict[str, float]) -> dict[str, float]:
    names = ("mismatch/", "training/rollout", "rollout_corr/kl", "rollout_corr/k3_kl")
    return {name: value for name, value in found.items() if name.startswith(names)}


def test_the_update_measures_what_a_forward_pass_of_its_own_would(tmp_path: Path, capsys: Any) -> None:
    """One update a step: sums of micro-batches inside it give the numbers of whole columns, and no pass is added."""
    found = {}
    train = PLENTY | {"tokens_per_microbatch": 120}
    for old_logp in ("auto", "recompute"):
        folder = tmp_path / old_logp
        folder.mkdir()
        path = configuration(folder, train=train, rollout=LOW | {"top_p": 0.9}, algorithm={"old_logp": old_logp})
        succeed(capsys, "train", path)
        found[old_logp] = [line for line in metrics(folder / "run") if line["step"]]
    assert "timing_s/old_log_prob" not in found["auto"][0] and "timing_s/old_log_prob" in found["recompute"][0]
    for inside, apart in zip(found["auto"], found["recompute"], strict=True):
        assert gap_of(inside) == pytest.approx(gap_of(apart), rel=2e-2, abs=2e-5)
        assert len(gap_of(inside)) == 20


def test_numerics_are_what_another_precision_adds(tmp_path: Path, capsys: Any) -> None:
    for dtype in ("float32", "bfloat16"):
        (tmp_path / dtype).mkdir()
        succeed(capsys, "train", configuration(tmp_path / dtype, train=PLENTY, rollout=LOW | {"dtype": dtype}))
        for line in metrics(tmp_path / dtype / "run")[1:]:
            assert line["mismatch/k3/staleness"] == line["mismatch/k3/support"] == line["mismatch/stale_tokens"] == 0
            assert line["mismatch/k3/numerics"] == line["mismatch/k3/total"] == line["rollout_corr/k3_kl"]
            quantiles = [line[f"mismatch/abs_logp_diff/{q}"] for q in ("p50", "p90", "p99", "p99.9", "max")]
            assert quantiles[:-1] == sorted(quantiles[:-1])
            if dtype == "float32":
                assert line["mismatch/k3/total"] < 1e-11 and quantiles[-1] < 1e-5
            else:
                assert line["mismatch/k3/total"] > 1e-7 and quantiles[0] > 1e-4
                assert 0.99 < line["training/rollout_actor_probs_pearson_corr"] < 1


def test_staleness_is_what_older_weights_add(tmp_path: Path) -> None:
    """Half of a step's answers are of the weights before two updates that were not published, half of today's."""
    with opened(tmp_path, train=PLENTY, rollout=LOW, algorithm={"old_logp": "recompute"}) as run:
        old, _ = next_groups(run, 1)
        for _ in range(2):
            batch, measured = estimate(run, old)
            update(run, batch)
        alone = gap_of(measured)
        assert alone["mismatch/stale_tokens"] == 0  # as far as the versions say: nothing was published
        run.step = 1
        stale = gap_of(estimate(run, old)[1])
        assert stale["mismatch/stale_tokens"] == 1 and stale["mismatch/k3/numerics"] == 0
        publish_weights(run, 1)
        fresh, _ = next_groups(run, 2)
        numerics = gap_of(estimate(run, fresh)[1])["mismatch/k3/numerics"]
        batch, measured = estimate(run, old + fresh)
        mixed = gap_of(measured)
        assert mixed["mismatch/k3/numerics"] == pytest.approx(numerics)
        assert mixed["mismatch/k3/staleness"] > 100 * numerics
        assert sum(mixed[f"mismatch/k3/{part}"] for part in PARTS) == mixed["mismatch/k3/total"]
        assert mixed["mismatch/k3/total"] == pytest.approx(engine_gap(batch, batch["old_logp_T"])["rollout_corr/k3_kl"])
        share = float((batch["age_T"][batch["loss_mask_T"]] == 1).double().mean())
        assert mixed["mismatch/stale_tokens"] == pytest.approx(share)


@pytest.mark.parametrize("old_logp", ["auto", "recompute"])
def test_support_is_the_log_mass_of_what_was_kept(tmp_path: Path, old_logp: str) -> None:
    """Against the model's own logits, over the whole vocabulary and token by token."""
    rollout = {"top_p": 0.7, "temperature": 0.9, "max_response_tokens": 6}
    with opened(tmp_path, train=PLENTY, rollout=rollout, algorithm={"old_logp": old_logp}) as run:
        groups, _ = next_groups(run, 1)
        model, masses = run.engine.model, []  # type: ignore[attr-defined]
        for g in groups:
            for t in g.trajectories:
                support = t.sequences[0].support
                assert support is not None
                ids = torch.tensor([g.prompt_ids + t.token_ids])
                with torch.no_grad():
                    logp_TV = (one_by_one(model, ids)[0] / 0.9).log_softmax(-1)
                ends = torch.tensor(support.sizes).cumsum(0).tolist()
                for i, (end, size) in enumerate(zip(ends, support.sizes)):
                    kept = support.ids[end - size : end] if size else range(logp_TV.shape[1])
                    masses.append(float(logp_TV[len(g.prompt_ids) + i - 1, list(kept)].logsumexp(-1)))
        batch, measured = estimate(run, groups)
        found = measured | update(run, batch)
        wanted = -sum(masses) / len(masses)
        assert wanted > 0.1
        assert found["mismatch/k1/support"] == found["mismatch/k3/support"] == pytest.approx(wanted, abs=1e-5)
        assert abs(found["mismatch/k3/numerics"]) < 1e-9


def one_by_one(model: Any, ids: Tensor) -> Tensor:
    """Logits of a sequence ``[1, T, V]`` by transformers' own attention."""
    plain, _ = load_model(f"{CARRY}:tiny_qwen3", seed=3, packing=False)
    plain.load_state_dict(model.state_dict())
    logits: Tensor = plain(input_ids=ids).logits
    return logits


@pytest.mark.parametrize(("preset", "left"), [("decoupled_token_is", 1e-3), ("decoupled_seq_is", 1e-3)])
def test_a_correction_takes_the_bias_out_of_the_gradient(tmp_path: Path, preset: str, left: float) -> None:
    """The expected gradient over all first tokens of an answer, drawn in bfloat16, against float32 sampling: exactly.

    Each token stands once in the batch, weighted with the probability that the bfloat16 engine draws it with.
    """
    low = {"dtype": "bfloat16", "temperature": 0.25, "max_response_tokens": 1}
    with opened(tmp_path, rollout=low, algorithm={"correction": {"preset": preset}}) as run:
        prompt = run.data[0]
        drawn = seen(run, prompt.token_ids, 0.25)
        words = sorted(drawn)
        groups = [
            Group(
                0,
                0,
                list(prompt.token_ids),
                [answer(list(prompt.token_ids), i, word, drawn[word]) for i, word in enumerate(words)],
            ),
        ]
        batch, measured = estimate(run, groups)
        q_B = torch.tensor([drawn[word] for word in words]).exp()
        p_B = batch["old_logp_T"][batch["loss_mask_T"]].exp()
        assert 0.999 < q_B.sum() < 1.001
        batch["advantage_T"] = torch.tensor([reward(word) for word in words])[batch.sequence_of()]
        batch = with_weights(batch, run.config)

        def gradient(weight_B: Tensor, corrected: bool) -> Tensor:
            """Of the expected loss, where a token is drawn with this probability."""
            part = batch.select([name for name in batch if corrected or name != "rollout_weight_T"])
            part["policy_weight_T"] = weight_B[part.sequence_of()]
            engine: Any = run.engine
            engine.optimizer.zero_grad(set_to_none=True)
            engine.passes.accumulate(part, policy_loss(run.config))
            return torch.cat([p.grad.flatten() for p in engine.trained.values() if p.grad is not None]).clone()

        true = gradient(p_B, corrected=False)
        biased, mended = gradient(q_B, corrected=False), gradient(q_B, corrected=True)
        error = (biased - true).norm() / true.norm()
        assert error > 1e-3
        assert (mended - true).norm() / true.norm() < left * error
        assert measured["mismatch/shift"] > 1e-3 and measured["mismatch/shift_left"] < 1e-6
        assert measured["mismatch/k3/numerics"] == measured["mismatch/k3/total"] > 1e-6


def seen(run: RlRun, prompt: tuple[int, ...], temperature: float) -> dict[int, float]:
    """The log-probabilities that the run's engine draws first tokens with: of every word that is drawn."""
    sampling = Sampling(1, temperature)
    return {
        result.token_ids[0]: result.logps[0]
        for result in generate(
            run.source.engine, [Request(prompt, sampling, NoiseKey(9, "train", i)) for i in range(20_000)]
        )
    }


def answer(prompt: list[int], sample: int, word: int, logp: float) -> Trajectory:
    sequence = one_turn(prompt, Result(0, [word], [logp], "length", [Span(0, 0, 1)]), 1)
    return Trajectory(sample, [sequence], "length", "", reward(word))


def reward(word: int) -> float:
    return (word * 37 % 101) / 101


def test_growth_is_told_in_a_run(tmp_path: Path) -> None:
    """From the sixth step on the answers of the fifth are trained on again and again."""
    with opened(tmp_path, train=PLENTY | {"steps": 9}, rollout=LOW, optim={"lr": 2e-3}) as run:
        for step in run.steps():
            if step <= 5:
                groups, _ = next_groups(run, step)
            batch, measured = estimate(run, groups)
            found = measured | update(run, batch)
            publish_weights(run, step)
            record(run, step, groups, batch, found)
    lines = [m for m in metrics(tmp_path / "run") if m["step"]]
    assert [m["mismatch/stale_tokens"] for m in lines] == [0] * 5 + [1] * 4
    told = [e["text"] for e in read_events(tmp_path / "run/events.jsonl") if "drift apart" in e["text"]]
    assert told and "What grew is staleness" in told[0] and "publish weights more often" in told[0]
    assert len(told) <= 2  # the divergence once, the quantile once
