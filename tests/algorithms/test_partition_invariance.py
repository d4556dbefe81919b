"""The gradient of a mini-batch is the same however its sequences are split, packed, ordered and dealt to ranks.

Held for every pair of policy loss, aggregation and correction, and for random triples, through the trainer's own
functions, extra passes included, on a linear model in float64.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from hybridflow.algorithms.advantage.registry import advantage_columns
from hybridflow.batch import Batch
from hybridflow.config.kinds.rl import RlConfig
from hybridflow.config.pieces.presets import CORRECTIONS
from hybridflow.config.pieces.tables import ADVANTAGES, AGGREGATIONS, KL_ESTIMATORS, POLICY_LOSSES
from hybridflow.config.sections.optim import OptimSection
from hybridflow.engines.local import LocalEngine
from hybridflow.trainers.rl.corrections import corrected, old_logp_is, piece_values, rejected, with_current
from hybridflow.trainers.rl.losses import policy_loss, with_loss, with_weights
from hybridflow.trainers.rl.shaping import token_rewards
from linear import WORDS, linear_model

from golden import ALGORITHM
from on_ranks.engines import Case
from simulated_ranks import RealRanks, SimulatedRanks

# --- what is combined ---

# Values at which a loss does something to this batch: shares so large that tokens are picked, bounds that bind.
VALUES: dict[str, dict[str, Any]] = {
    "ppo_clip": {"clip_dual": 1.5},
    "clip_cov": {"clip_cov_share": 0.2, "cov_low": 0.1},
    "kl_cov": {"kl_cov_share": 0.2},
    "dppo_tv": {"divergence_low": 0.02, "divergence_high": 0.02, "ratio_cap": 1.5},
    "dppo_kl": {"divergence_low": 0.01, "divergence_high": 0.01},
    "decoupled_ppo": {"behaviour_cap": 1.5},
}
MORE: dict[str, dict[str, Any]] = {
    "token, normalised": {"weights": "token", "normalize": True},
    "sequence, normalised, two levels": {
        "weights": "sequence",
        "normalize": True,
        "reject": {"token_k1": [0.5, 2.0], "seq_max_k3": [1.0]},
    },
    "three levels": {"mode": "bypass", "reject": {"token_k2": [0.5], "seq_mean_k3": [0.2], "seq_max_k2": [2.0]}},
    "bypass, normalised, one level": {
        "mode": "bypass",
        "weights": "token",
        "normalize": True,
        "reject": {"seq_sum_k1": [0.7, 1.4]},
    },
}
ALL_CORRECTIONS = {name: {"preset": name} for name in CORRECTIONS} | MORE


def configured(loss: str, aggregation: str, correction: str, **more: Any) -> RlConfig:
    algorithm = {"policy_loss": loss, "aggregation": aggregation, "correction": ALL_CORRECTIONS[correction]}
    return RlConfig.model_validate(
        {
            "run": {"folder": "run"},
            "model": {"path": "model"},
            "data": {"train": "prompts", "max_prompt_tokens": 16},
            "reward": {"function": "reward.py:score"},
            "rollout": {"max_response_tokens": 16, "temperature": more.pop("temperature", 1.0)},
            "train": {"steps": 1, "prompts_per_step": 4, "samples_per_prompt": 4},
            "algorithm": algorithm | VALUES.get(loss, {}) | more,
        }
    )


@functools.cache
def allowed(loss: str, aggregation: str, correction: str) -> bool:
    try:
        configured(loss, aggregation, correction)
    except ValidationError:
        return False
    return True


def pairs_of(triple: tuple[str, str, str]) -> set[tuple[str, str]]:
    """The pairs that a triple shows; no name is in two tables."""
    return set(itertools.combinations(triple, 2))


def covering() -> Iterator[tuple[str, str, str]]:
    """Allowed triples that hold every pair which any of them holds; the aggregations take turns."""
    seen: set[tuple[str, str]] = set()
    for shift in range(len(AGGREGATIONS)):
        for (i, loss), (j, correction) in itertools.product(enumerate(POLICY_LOSSES), enumerate(ALL_CORRECTIONS)):
            triple = loss, list(AGGREGATIONS)[(i + j + shift) % len(AGGREGATIONS)], correction
            if pairs_of(triple) - seen and allowed(*triple):
                seen |= pairs_of(triple)
                yield triple


def random_triples(count: int) -> Iterator[tuple[tuple[str, str, str], dict[str, Any]]]:
    """Other triples, with further terms of the loss, another estimator, another temperature."""
    rng = random.Random("triples")
    while count:
        triple = tuple(rng.choice(list(names)) for names in (POLICY_LOSSES, AGGREGATIONS, ALL_CORRECTIONS))
        if allowed(*triple):
            count -= 1
            terms: dict[str, Any] = {"advantage": rng.choice(["grpo", "rloo", "opo", "reinforce_plus_plus"])}
            terms["temperature"] = rng.choice([0.7, 1.0])
            if rng.random() < 0.5:
                terms["entropy_coef"] = 0.1
            if rng.random() < 0.5:
                terms |= {"kl_loss_coef": 0.1, "kl_loss_estimator": rng.choice(KL_ESTIMATORS)}
            yield triple, terms


# --- the batch ---

EQUAL = 2  # the group of equal rewards
# Trajectories, by group and sample, of several sequences.
CUT_UP = {(0, 0): 2, (0, 1): 2, (1, 0): 3, (3, 0): 2, (3, 1): 4}
SCALES = (0.02, 0.1, 0.4, 1.0)  # how far the step's first policy and the sampler are from the current one, by sequence


@functools.cache
def step_answers(temperature: float = 1.0) -> Batch:
    """Ragged answers of four groups; prompts as long as their group's number + 2, whose tokens carry no loss.

    A sequence that goes on with a trajectory has another context: the prompt and tokens that the model sampled before,
    where the history was rewritten; or a state, which other trajectories of the group can reach too. Contexts of equal
    length can differ. One sequence has no loss token at all, some answers have a single token, some have observed
    tokens in between.
    """
    rng = torch.Generator().manual_seed(0)
    rows: dict[str, list[Any]] = {}
    for group, size in enumerate((3, 3, 2, 3)):
        prompt = torch.randint(WORDS, (group + 2,), generator=rng)
        states = torch.randint(WORDS, (2, 8), generator=rng)
        for sample in range(size):
            reward = 0.5 if group == EQUAL else float(torch.rand((), generator=rng, dtype=torch.float64))
            before = prompt
            for part in range(CUT_UP.get((group, sample), 1)):
                length = 1 if sample == 2 else int(torch.randint(2, 9, (1,), generator=rng))
                mask = torch.rand(length, generator=rng) < 0.85
                mask[0] = True
                mask[2:5] &= part == 0  # an observation between two turns
                mask &= (group, sample, part) != (1, 0, 1)
                state = states[int(part == 3 or sample > group)]
                context = before[:10] if part == 2 else state if part else prompt
                before = torch.cat([context, torch.randint(WORDS, (length,), generator=rng)])
                row = {
                    "input_ids_T": before,
                    "loss_mask_T": torch.cat([torch.zeros(len(context), dtype=torch.bool), mask]),
                    "reward_B": reward,
                    "group_B": 70 - group,
                    "sample_B": sample,
                    "trajectory_B": 10 * (7 * group % 5) + sample,
                    "sequence_B": part,
                }
                for name, value in row.items():
                    rows.setdefault(name, []).append(value)
    batch = Batch.from_rows(rows)
    batch["reward_B"] = batch["reward_B"].double()
    logp_T = engine_of(ONE).score(batch, ["logp"], temperature=temperature)["logp"]
    for name in ("old_logp_T", "rollout_logp_T", "ref_logp_T"):
        noise_T = torch.randn(batch.total(), generator=rng, dtype=torch.float64)
        for i, noise in enumerate(noise_T.split(batch.lengths().tolist())):
            mask = batch.rows("loss_mask_T")[i]
            noise *= SCALES[i % len(SCALES)]
            if i % 3 == 1 and mask.any():  # the mean of these log-ratios is small enough for the narrowest levels
                noise -= noise[mask].mean() - 3e-4
        batch[name] = (logp_T + noise_T).clamp(max=-0.01) * batch["loss_mask_T"]
    return batch


def shuffled(batch: Batch, seed: int) -> Batch:
    """Its sequences in another order, those of one trajectory still one after the other in time."""
    order = random.Random(seed).sample(range(len(batch)), len(batch))
    names = batch["trajectory_B"].tolist()
    waiting = {name: iter([i for i in range(len(batch)) if names[i] == name]) for name in names}
    return batch.take([next(waiting[names[i]]) for i in order])


# --- the ways to split ---


@dataclass(frozen=True, slots=True)
class Way:
    """How an update is computed."""

    tokens: int
    ranks: int = 1
    processes: int = 0
    packing: bool = True
    order: int | None = None
    sharing: bool = True


ONE = Way(tokens=10_000)
WAYS = {
    "many micro-batches, other order": Way(tokens=24, order=1),
    "two ranks, micro-batches, other order": Way(tokens=60, ranks=2, order=2),
    "four ranks, padded, so that no prompts are shared": Way(tokens=10_000, ranks=4, packing=False, order=3),
}
MORE_WAYS = {  # for those that are tried besides the pairs
    "two micro-batches, no sharing of prompts": Way(tokens=90, sharing=False),
    "every sequence alone": Way(tokens=20),
}


def in_turn(ways: Mapping[str, Way], index: int, count: int) -> dict[str, Way]:
    """So many of the ways, from one of them on."""
    names = list(ways)
    return {name: ways[name] for name in (names[(index + i) % len(names)] for i in range(count))}


@functools.cache
def cases() -> list[tuple[tuple[str, str, str], dict[str, Way]]]:
    """The triples that hold every pair, with the ways to split that one of their names has not met, or with one."""
    found, met = [], set[tuple[str, str]]()
    for i, triple in enumerate(covering()):
        new = {way: WAYS[way] for way in WAYS if any((name, way) not in met for name in triple)}
        found.append((triple, new or in_turn(WAYS, i, 1)))
        met |= set(itertools.product(triple, found[-1][1]))
    return found


def faults_of(cases: Iterable[tuple[tuple[str, str, str], dict[str, Any], Mapping[str, Way]]]) -> list[str]:
    """What is not the same, of cases each of which is split in its own ways."""
    faults = []
    for case, terms, ways in cases:
        config = configured(*case, **terms)
        try:
            assert_same_for_every_way(config, step_answers(config.rollout.temperature), ways)
        except AssertionError as error:
            faults.append(f"{' x '.join(case)} {terms or ''}: {error}")
    return faults


@functools.cache
def engine_of(way: Way) -> LocalEngine | SimulatedRanks | RealRanks:
    """An engine whose updates leave the gradients as they were accumulated, and every weight as it was."""
    still: dict[str, Any] = {"lr": 1e-300, "clip_grad_norm": 1e9}
    if way.processes:
        return RealRanks(Case("linear", {"strategy": "fsdp2"}, cut=way.tokens, optim=still), way.processes)
    model, optim = linear_model(packing=way.packing), OptimSection(**still)
    if way.ranks > 1:
        return SimulatedRanks(model, optim, total_steps=1, tokens_per_microbatch=way.tokens, ranks=way.ranks)
    return LocalEngine(model, optim, total_steps=1, tokens_per_microbatch=way.tokens)


def outcome(
    config: RlConfig, batch: Batch, way: Way, *, on_policy: bool = False
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The gradient of the whole batch as one mini-batch, and all metrics: what `trainers.rl.loop` does of it in a step.

    On-policy, the step's first policy is the current one, in another rounding: its first update.
    """
    a, engine = config.algorithm, engine_of(way)
    batch = batch if way.order is None else shuffled(batch, way.order)
    batch = batch.select(list(batch))
    metrics: dict[str, float] = {}
    if on_policy:
        last_digits = torch.Generator().manual_seed(way.tokens)
        noise_T = 1e-13 * torch.randn(batch.total(), generator=last_digits, dtype=torch.float64)
        batch["old_logp_T"] = engine.score(batch, ["logp"])["logp"] + noise_T
    if old_logp_is(config) == "rollout":
        batch["old_logp_T"] = batch["rollout_logp_T"]
    elif a.correction.active:
        batch, metrics = corrected(batch, batch["old_logp_T"], a)
    batch["reward_T"] = token_rewards(batch, batch["reward_B"])
    for name, column_T in advantage_columns(a.advantage, batch, piece_values(a, [])).items():
        batch[name] = column_T
    mini, found = with_current(rejected(batch), config, engine)
    prepared = with_loss(with_weights(mini, config), config)
    if not way.sharing:
        prepared = prepared.select([name for name in prepared if name != "group_B"])
    assert len(prepared)
    update = engine.update(prepared, policy_loss(config))
    assert update.applied
    gradients = {n: p.grad.clone() for n, p in engine.model.named_parameters() if p.grad is not None}
    return gradients, metrics | found | update.metrics


def assert_same_for_every_way(
    config: RlConfig, batch: Batch, ways: Mapping[str, Way] = WAYS, *, on_policy: bool = False
) -> None:
    """Holds ways to split against one micro-batch, to 1e-10 of the gradient's size."""
    gradients, metrics = outcome(config, batch, ONE, on_policy=on_policy)
    assert gradients and all(float(g.abs().max()) > 1e-9 for g in gradients.values()), "no gradient: shows nothing"
    for name, way in ways.items():
        other, other_metrics = outcome(config, batch, way, on_policy=on_policy)
        assert other.keys() == gradients.keys()
        for parameter, gradient in gradients.items():
            bound = 1e-10 * float(gradient.abs().max()) + 1e-12
            difference = float((other[parameter] - gradient).abs().max())
            assert difference <= bound, f"{name}: gradient of {parameter} differs by {difference:.2g}"
        if not on_policy:  # else rounding decides on what counts as cut
            assert other_metrics == pytest.approx(metrics, rel=1e-9, abs=1e-9), name


# --- losses, aggregations, corrections ---


def test_the_cases_hold_every_allowed_pair() -> None:
    every = [t for t in itertools.product(POLICY_LOSSES, AGGREGATIONS, ALL_CORRECTIONS) if allowed(*t)]
    assert set().union(*map(pairs_of, every)) == set().union(*(pairs_of(triple) for triple, _ in cases()))
    assert {t[0] for t in every} == POLICY_LOSSES.keys() and {t[2] for t in every} == ALL_CORRECTIONS.keys()
    met = {(name, way) for triple, ways in cases() for name in triple for way in ways}
    assert met == set(itertools.product([*POLICY_LOSSES, *AGGREGATIONS, *ALL_CORRECTIONS], WAYS))


@pytest.mark.parametrize("loss", POLICY_LOSSES)
def test_the_gradient_is_the_same_however_the_mini_batch_is_split(loss: str) -> None:
    """Every pair of names in one way at least, every name in every way."""
    mine = [(triple, {}, ways) for triple, ways in cases() if triple[0] == loss]
    assert mine and faults_of(mine) == []


@pytest.mark.parametrize("part", range(4))
def test_the_gradient_is_the_same_with_other_terms_too(part: int) -> None:
    chosen = list(enumerate(random_triples(60)))[part::4]
    assert faults_of((case, terms, in_turn(WAYS | MORE_WAYS, i, 2)) for i, (case, terms) in chosen) == []


@pytest.mark.parametrize("loss", POLICY_LOSSES)
def test_real_processes_have_the_same_gradient(loss: str) -> None:
    """Four of them: half of the sequences are with one, and one has none."""
    mode = (POLICY_LOSSES[loss].modes or ("seq-mean-token-mean",))[0]
    config = configured(loss, mode, "disabled", entropy_coef=0.1)
    assert_same_for_every_way(config, step_answers(), {"four processes": Way(tokens=40, processes=4)})


@pytest.mark.parametrize("loss", POLICY_LOSSES)
def test_a_first_update_has_the_same_gradient_though_log_probabilities_are_computed_twice(loss: str) -> None:
    """Ratios are 1 but for the last digits, which depend on the split: no loss may have a corner there."""
    mode = (POLICY_LOSSES[loss].modes or ("token-mean",))[0]
    assert_same_for_every_way(configured(loss, mode, "disabled", advantage="rloo"), step_answers(), on_policy=True)


# --- that a difference would be found ---


@pytest.mark.parametrize(
    "correction",
    [name for name in ALL_CORRECTIONS if configured("reinforce", "token-sum", name).algorithm.correction.reject],
)
def test_every_rejection_takes_some_of_the_batch_and_leaves_some(correction: str) -> None:
    metrics = outcome(configured("reinforce", "token-mean", correction), step_answers(), ONE)[1]
    assert 0.05 < metrics["rollout_corr/rollout_rs_masked_fraction"] < 0.95


@pytest.mark.parametrize(("loss", "share"), [("clip_cov", "cov_clipfrac"), ("kl_cov", "cov_penaltyfrac")])
def test_statistics_of_the_whole_mini_batch_pick_tokens(loss: str, share: str) -> None:
    metrics = outcome(configured(loss, "token-mean", "disabled"), step_answers(), ONE)[1]
    assert 0.1 < metrics[f"actor/{share}"] <= 0.3


BAD = {
    "a mean over the micro-batch": "-(advantage_M * logp_M) / len(logp_M)",
    "a statistic of the micro-batch": "-(advantage_M - advantage_M.mean()) * logp_M",
    "sequences by their place": "-advantage_M * logp_M * (1 + sequence_M)",
}


@pytest.mark.parametrize("expression", BAD.values(), ids=list(BAD))
def test_a_loss_that_depends_on_its_micro_batch_is_found_out(expression: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(f"def bad(logp_M, advantage_M, sequence_M):\n    return {expression}, {{}}\n")
    config = configured(f"{tmp_path}/mine.py:bad", "token-mean", "disabled")
    with pytest.raises(AssertionError, match="gradient of trunk"):
        assert_same_for_every_way(config, step_answers())
    good = (tmp_path / "mine.py").read_text().replace(expression, "-advantage_M * logp_M").replace("bad", "good")
    (tmp_path / "good.py").write_text(good)
    assert_same_for_every_way(configured(f"{tmp_path}/good.py:good", "token-mean", "disabled"), step_answers())


# --- estimators ---

CONTEXT_COUNTS = ("optimal_token_baseline",)  # its time runs over tokens without loss too


@functools.cache
def scored_answers(seed: int, *, steps: bool) -> Batch:
    """The step's answers with what any estimator reads, all different numbers; ``place_T`` names the tokens.

    With steps, every four tokens of an answer are one, from one of three states.
    """
    rng = torch.Generator().manual_seed(seed)
    batch = step_answers().select(list(step_answers()))
    _, index_B = torch.unique(batch["trajectory_B"], return_inverse=True)
    batch["place_T"] = torch.arange(batch.total())
    batch["reward_T"] = token_rewards(batch, batch["reward_B"])
    batch["value_T"] = torch.randn(batch.total(), generator=rng, dtype=torch.float64)
    batch["sum_pi_squared_T"] = torch.rand(batch.total(), generator=rng, dtype=torch.float64)
    batch["rollout_weight_T"] = 0.5 + torch.rand(batch.total(), generator=rng, dtype=torch.float64)
    batch["baseline_B"] = torch.rand(99, generator=rng, dtype=torch.float64)[index_B]
    batch["components_BK"] = torch.rand(99, 3, generator=rng, dtype=torch.float64)[index_B]
    if steps:
        batch["step_T"] = batch["place_T"] // 4
        batch["anchor_T"] = batch["step_T"] % 3
    return batch


@functools.cache
def cut_up(seed: int, *, steps: bool, context: bool) -> Batch:
    """The sequences of `scored_answers` cut into up to four parts.

    With context, each part but the first begins with up to three tokens without loss. Those are named -1 in
    ``place_T``, and have values that nobody may read.
    """
    batch, rng, pieces = scored_answers(seed, steps=steps), random.Random(seed), []
    for i, length in enumerate(batch.lengths().tolist()):
        ends = sorted({rng.randint(1, length) for _ in range(3)} | {length})
        for start, end in zip([0, *ends], ends):
            more = rng.randint(0, 3) if context and start else 0
            columns: dict[str, Any] = {}
            for name in batch:
                value = batch.rows(name)[i]
                if name.endswith("_T"):
                    filler = {"place_T": -1, "loss_mask_T": 0, "reward_T": 0}.get(name, 7)
                    value = torch.cat([value.new_full((more,), filler), value[start:end]])
                columns[name] = [value]
            pieces.append(Batch.from_rows(columns))
    return Batch.concat(pieces)


def assert_same_advantages(name: str, batch: Batch, other: Batch) -> None:
    """The estimator says the same of every token of the batch."""
    values = ALGORITHM | {"gamma": 0.9, "lam": 0.8, "lam_critic": 0.7, "length_alpha": 0.5}
    expected = advantage_columns(name, batch, values)
    found = advantage_columns(name, other, values)
    own = other["place_T"] >= 0
    assert found.keys() == expected.keys() and int(own.sum()) == batch.total()
    for column, value_T in expected.items():
        back_T = torch.full_like(value_T, torch.nan)
        back_T[other["place_T"][own]] = found[column][own]
        assert float(value_T.abs().max()) > 0.1
        torch.testing.assert_close(back_T, value_T, atol=1e-12, rtol=1e-10)
        assert found[column][~own].eq(0).all()


@pytest.mark.parametrize("steps", [False, True])
@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantages_do_not_depend_on_the_order_of_the_answers(name: str, steps: bool) -> None:
    for seed in range(3):
        batch = scored_answers(seed, steps=steps)
        assert_same_advantages(name, batch, shuffled(batch, seed))


@pytest.mark.parametrize("context", [False, True])
@pytest.mark.parametrize("steps", [False, True])
@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantages_do_not_depend_on_how_answers_are_cut_into_sequences(name: str, steps: bool, context: bool) -> None:
    if context and name in CONTEXT_COUNTS:
        return
    for seed in range(3):
        other = shuffled(cut_up(seed, steps=steps, context=context), seed)
        assert_same_advantages(name, scored_answers(seed, steps=steps), other)


def test_advantages_that_depend_on_the_order_are_found_out(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def bad(reward_N):\n    return reward_N - reward_N.cumsum(0)\n")
    batch = scored_answers(0, steps=False)
    other = batch.select(list(batch))
    other["trajectory_B"] = -batch["trajectory_B"]  # another order of the trajectories
    assert_same_advantages("rloo", batch, other)
    with pytest.raises(AssertionError, match="not close"):
        assert_same_advantages(f"{tmp_path}/mine.py:bad", batch, other)
