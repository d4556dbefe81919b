"""Training in this process: the same update however the work is cut, and nothing lost or spoilt on the way."""

from __future__ import annotations

import copy
import inspect
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from hybridflow.algorithms.aggregation import token_weights
from hybridflow.batch import Batch
from hybridflow.config.sections.optim import OptimSection
from hybridflow.engines.adam import learning_rate
from hybridflow.engines.local import LocalEngine
from hybridflow.engines.passes import microbatches
from hybridflow.engines.reference import LocalReference
from hybridflow.models.attention import PackedLayout
from hybridflow.models.forward import score_tokens
from hybridflow.models.value import value_head
from hybridflow.protocols.training import Loss, TrainEngine, Update
from hybridflow.rollout.inline.engine import InlineEngine
from hybridflow.weights.stream import verify

from runs import configuration, metrics, succeed
from simulated_ranks import SimulatedRanks
from tiny import group_batch, packed_model, ragged_batch, sft_losses_and_model, weights_of, with_policy_columns

MODES = ("token-mean", "seq-mean-token-mean", "prompt-mean")  # all of them: test_partition_invariance.py
LENGTHS = (7, 3, 12, 5, 9, 4, 2, 16)
ORDERS = {"as it is": range(8), "reversed": range(8)[::-1], "mixed": (3, 0, 7, 5, 1, 6, 2, 4)}
CUTS = [16, 23, 41, 1000]  # tokens per micro-batch: from one sequence each to all at once
ENGINES = {"local": LocalEngine, "ranks": SimulatedRanks}


def engine_of(kind: str = "local", cut: int = 1000, *, double: bool = True, **optim: Any) -> LocalEngine:
    model = packed_model(dtype=torch.float64 if double else torch.float32)
    section = OptimSection(**{"lr": 1e-3, "clip_grad_norm": 0.05, "weight_decay": 0.1, **optim})
    return ENGINES[kind](model, section, total_steps=10, tokens_per_microbatch=cut)  # type: ignore[return-value]


def policy_batch(mode: str, *, double: bool = True) -> Batch:
    """Eight sequences of six trajectories; one sequence has no loss token at all."""
    batch = ragged_batch(LENGTHS)
    batch["trajectory_B"] = torch.tensor([4, 4, 1, 9, 3, 3, 7, 0])
    batch["loss_mask_T"] &= batch.sequence_of() != 5
    logp_T = engine_of(double=double).score(batch, ["logp"])["logp"]
    return with_policy_columns(batch, logp_T, mode)


def policy_loss(entropy_coef: float = 0.0, **values: float) -> Loss:
    return Loss("policy", {"policy_loss": "ppo_clip", "values": values, "entropy_coef": entropy_coef})


def outcome(engine: LocalEngine, batch: Batch, loss: Loss) -> tuple[Update, dict[str, Tensor]]:
    """The update, and every gradient and weight that it left."""
    update = engine.update(batch, loss)
    assert update.applied
    tensors = {f"{n} weight": p.detach().clone() for n, p in engine.model.named_parameters()}
    for n, p in engine.model.named_parameters():
        assert p.grad is not None
        tensors[f"{n} gradient"] = p.grad.clone()
    return update, tensors


def assert_close(a: tuple[Update, dict[str, Tensor]], b: tuple[Update, dict[str, Tensor]], tolerance: float) -> None:
    assert a[0].metrics.keys() == b[0].metrics.keys()
    for name, value in a[0].metrics.items():
        assert b[0].metrics[name] == pytest.approx(value, abs=tolerance), name
    for name, tensor in a[1].items():
        torch.testing.assert_close(b[1][name], tensor, atol=tolerance, rtol=0, msg=name)


@pytest.mark.parametrize(("mode", "entropy_coef"), [("token-mean", 0.0), *((mode, 0.01) for mode in MODES)])
def test_the_policy_update_is_the_same_however_it_is_cut(mode: str, entropy_coef: float) -> None:
    batch, loss = policy_batch(mode), policy_loss(entropy_coef, clip_dual=3.0)
    whole = outcome(engine_of(), batch, loss)
    assert 0 < whole[0].metrics["actor/pg_clipfrac"] < 1  # some tokens are clipped, some are not
    for cut in CUTS:
        for order in ORDERS.values():
            for kind in ENGINES:
                assert_close(whole, outcome(engine_of(kind, cut), batch.take(list(order)), loss), 1e-10)


@pytest.mark.parametrize("mode", MODES)
def test_the_supervised_update_is_the_same_however_it_is_cut(mode: str) -> None:
    batch = ragged_batch(LENGTHS)
    batch["policy_weight_T"] = weights_of(batch, mode)
    whole = outcome(engine_of(), batch, Loss("cross_entropy"))
    for cut in CUTS:
        for order in ORDERS.values():
            for kind in ENGINES:
                found = outcome(engine_of(kind, cut), batch.take(list(order)), Loss("cross_entropy"))
                assert_close(whole, found, 1e-10)


@pytest.mark.parametrize("mode", MODES)
def test_sharing_prompts_does_not_change_the_update(mode: str) -> None:
    batch = group_batch()
    batch = with_policy_columns(batch, engine_of().score(batch, ["logp"])["logp"], mode)
    apart, loss = batch.select([n for n in batch if n != "group_B"]), policy_loss(0.01)
    whole = outcome(engine_of(), apart, loss)
    for cut in (24, 40, 1000):
        for order in (range(12), range(12)[::-1], (3, 0, 7, 5, 11, 1, 6, 10, 2, 4, 9, 8)):
            for kind in ENGINES:
                assert_close(whole, outcome(engine_of(kind, cut), batch.take(list(order)), loss), 1e-10)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=5), st.integers(1, 5), st.integers(0, 99), st.integers(35, 90))
def test_microbatches_hold_every_row_once_and_send_no_more_than_the_budget_through(
    prompts: list[int], answers: int, seed: int, budget: int
) -> None:
    batch = group_batch(prompts, answers, seed)
    parts = microbatches(batch, budget)
    assert sorted(i for part in parts for i in part) == list(range(len(batch)))
    for rows in parts:
        part, own = batch.take(rows), 0
        seen = set()
        for ids, mask, group in zip(part.rows("input_ids_T"), part.rows("loss_mask_T"), part["group_B"].tolist()):
            scored = mask.nonzero()[:, 0].tolist()
            prompt = scored[0] if scored else 0
            own += len(ids) - (prompt if (group, prompt) in seen else 0)
            seen.add((group, prompt))
        assert own <= budget


@pytest.mark.parametrize("kind", ENGINES)
def test_several_steps_stay_the_same(kind: str) -> None:
    batch, loss = policy_batch("token-mean"), policy_loss(0.01)
    straight, cut = engine_of(), engine_of(kind, 16)
    for _ in range(5):
        a, b = outcome(straight, batch, loss), outcome(cut, batch.take(range(8)[::-1]), loss)
    assert_close(a, b, 1e-8)  # AdamW divides by the root of tiny second moments: rounding grows a little every step


@pytest.mark.parametrize("kind", ENGINES)
def test_a_microbatch_without_any_loss_token_adds_nothing(kind: str) -> None:
    batch = ragged_batch((16, 9, 12))
    batch["loss_mask_T"] &= batch.sequence_of() == 0
    batch = with_policy_columns(batch, engine_of().score(batch, ["logp"])["logp"])
    whole = outcome(engine_of(), batch, policy_loss(0.01))
    assert_close(whole, outcome(engine_of(kind, cut=16), batch, policy_loss(0.01)), 1e-10)


def test_the_gradient_is_that_of_the_loss_written_down_plainly() -> None:
    batch, coef, temperature = policy_batch("seq-mean-token-mean"), 0.02, 0.8
    params = dict(policy_loss(coef).params) | {"temperature": temperature}
    engine = engine_of(cut=16, clip_grad_norm=1e9)
    model = copy.deepcopy(engine.model)
    update, found = outcome(engine, batch, Loss("policy", params))
    total = torch.zeros((), dtype=torch.float64)
    trajectory = batch["trajectory_B"].tolist()
    lengths = dict.fromkeys(trajectory, 0)
    for t, mask in zip(trajectory, batch.rows("loss_mask_T")):
        lengths[t] += int(mask.sum())
    for i in range(len(batch)):
        row = batch.take([i])
        logits = (
            model(
                input_ids=row["input_ids_T"][None],
                position_ids=torch.arange(row.total())[None],
                use_cache=False,
                layout=PackedLayout(row.lengths()),
            ).logits[0]
            / temperature
        )
        logp = logits.log_softmax(-1)
        for t in row["loss_mask_T"].nonzero()[:, 0].tolist():
            ratio = (logp[t - 1, row["input_ids_T"][t]] - row["old_logp_T"][t]).exp()
            a = row["advantage_T"][t]
            token = torch.maximum(-a * ratio, -a * ratio.clamp(0.8, 1.2))
            entropy = -(logp[t - 1].exp() * logp[t - 1]).sum()
            total = total + token / (len(lengths) * lengths[trajectory[i]]) - coef * entropy / sum(lengths.values())
    total.backward()
    assert update.metrics["actor/loss"] == pytest.approx(float(total.detach()), abs=1e-7)  # weights are float32
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[f"{name} gradient"], p.grad, atol=1e-7, rtol=0, msg=name)


@pytest.mark.parametrize("kind", ENGINES)
def test_the_first_ratio_is_one(kind: str) -> None:
    batch = ragged_batch((30, 7, 55, 12, 3, 41, 18, 25, 9))
    engine = ENGINES[kind](packed_model(), OptimSection(), total_steps=1, tokens_per_microbatch=60)
    scores = engine.score(batch, ["logp", "entropy"], temperature=0.7)
    assert scores["logp"].shape == scores["entropy"].shape == (batch.total(),)
    assert scores["logp"][~batch["loss_mask_T"]].eq(0).all() and scores["entropy"][~batch["loss_mask_T"]].eq(0).all()
    now = score_tokens(packed_model(), batch, temperature=0.7, entropy="with gradient")
    ratio_M = (now.logp_M.detach() - scores["logp"][now.index_M]).exp()
    assert float((ratio_M - 1).abs().max()) <= 1e-5
    assert now.entropy_M is not None
    assert float((now.entropy_M.detach() - scores["entropy"][now.index_M]).abs().max()) <= 1e-5
    batch["old_logp_T"] = batch["rollout_logp_T"] = scores["logp"]
    batch["advantage_T"] = torch.ones(batch.total())
    batch["policy_weight_T"] = token_weights(batch, "token-mean", norm=1)
    metrics = engine.update(batch, Loss("policy", dict(policy_loss().params) | {"temperature": 0.7})).metrics
    assert metrics["actor/pg_loss"] == pytest.approx(-1, abs=1e-5)
    assert metrics["actor/pg_clipfrac"] == 0
    assert metrics["training/rollout_probs_diff_max"] <= 1e-5


@pytest.mark.parametrize("kind", ENGINES)
def test_sums_of_squared_probabilities_are_those_of_the_softmax(kind: str) -> None:
    batch = ragged_batch((30, 7, 55, 12))
    engine = ENGINES[kind](packed_model(), OptimSection(), total_steps=1, tokens_per_microbatch=60)
    scores = engine.score(batch, ["logp", "sum_pi_squared"], temperature=0.7)
    assert scores.keys() == {"logp", "sum_pi_squared"}
    assert scores["logp"].equal(engine.score(batch, ["logp"], temperature=0.7)["logp"])
    expected_T = torch.zeros(batch.total())
    with torch.no_grad():
        for start, end in zip(batch.offsets["T"][:-1].tolist(), batch.offsets["T"][1:].tolist()):
            ids = batch["input_ids_T"][start:end]
            layout, places = PackedLayout(torch.tensor([len(ids)])), torch.arange(len(ids))[None]
            output = packed_model()(input_ids=ids[None], position_ids=places, use_cache=False, layout=layout)
            expected_T[start + 1 : end] = (output.logits[0] / 0.7).softmax(-1).square().sum(-1)[:-1]
    torch.testing.assert_close(scores["sum_pi_squared"], expected_T * batch["loss_mask_T"], atol=1e-6, rtol=1e-5)


def test_without_old_log_probs_the_current_policy_is_the_old_one() -> None:
    batch = policy_batch("token-mean")
    own = batch.select([n for n in batch if n != "old_logp_T"])
    batch["old_logp_T"] = engine_of().score(batch, ["logp"])["logp"]
    assert_close(
        outcome(engine_of(), batch, policy_loss()), outcome(engine_of(cut=16), own, policy_loss()), tolerance=1e-10
    )


@pytest.mark.parametrize("kind", ENGINES)
def test_save_and_load_continue_bit_for_bit(kind: str, tmp_path: Path) -> None:
    optim = {"warmup_steps": 2, "schedule": "linear"}
    batch, loss = policy_batch("token-mean", double=False), policy_loss()
    straight = engine_of(kind, 23, double=False, **optim)
    for _ in range(3):
        straight.update(batch, loss)
    first = engine_of(kind, 23, double=False, **optim)
    first.update(batch, loss)
    first.save(tmp_path)
    second = engine_of(kind, 23, double=False, **optim)
    second.update(batch, loss)
    second.update(batch, loss)  # what it knows already is forgotten
    second.load(tmp_path)
    first.update(batch, loss)  # and what it knows now is its own
    for _ in range(2):
        last = second.update(batch, loss)
    assert last.metrics["actor/lr"] == pytest.approx(1e-3)
    for (name, a), b in zip(straight.model.named_parameters(), second.model.parameters()):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("cut", [16, 1000])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_changes_nothing_and_names_its_rows(kind: str, cut: int, poison: float) -> None:
    batch, loss = policy_batch("token-mean", double=False), policy_loss()
    engine = engine_of(kind, cut, double=False)
    assert engine.update(batch, loss).applied
    spoilt = batch.select(list(batch))
    spoilt["advantage_T"] = batch["advantage_T"].clone()
    for row in (7, 2, 4):
        last = int(batch.offsets["T"][row + 1]) - 1  # the last token of every row carries loss
        spoilt["advantage_T"][last] = poison
    local = engine if isinstance(engine, LocalEngine) else engine.ranks[0]
    before = copy.deepcopy((engine.model.state_dict(), local.moments()))
    update = engine.update(spoilt, loss)
    assert not update.applied and update.bad_rows == [2, 4, 7]
    after = (engine.model.state_dict(), local.moments())
    assert local.steps_done == 1
    for name, tensor in before[0].items():
        assert torch.equal(after[0][name], tensor), name
    for name, moments in before[1].items():
        assert moments.keys() == {"step", "exp_avg", "exp_avg_sq"}
        for key, value in moments.items():
            assert torch.equal(after[1][name][key], value), name
    # and training goes on as if nothing had been
    assert engine.update(batch, loss).applied


def test_gradients_are_clipped_to_their_global_norm() -> None:
    batch, loss = policy_batch("token-mean"), policy_loss()
    loose, free = outcome(engine_of(clip_grad_norm=1e9), batch, loss)
    tight, clipped = outcome(engine_of(clip_grad_norm=0.01), batch, loss)
    gradients = [v for n, v in free.items() if n.endswith("gradient")]
    norm = float(torch.cat([g.flatten() for g in gradients]).norm())
    assert norm > 0.1
    assert loose.metrics["actor/grad_norm"] == tight.metrics["actor/grad_norm"] == pytest.approx(norm, rel=1e-9)
    for name, gradient in free.items():
        if name.endswith("gradient"):
            torch.testing.assert_close(clipped[name], gradient * 0.01 / norm, rtol=1e-4, atol=0)


def test_weight_decay_touches_matrices_only() -> None:
    batch, loss = policy_batch("token-mean"), policy_loss()
    start = dict(engine_of().model.named_parameters())
    with_decay, without = (outcome(engine_of(weight_decay=d), batch, loss)[1] for d in (0.5, 0.0))
    for name, p in start.items():
        decayed = without[f"{name} weight"] - 1e-3 * 0.5 * p.detach() * (p.ndim > 1)
        torch.testing.assert_close(with_decay[f"{name} weight"], decayed, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("schedule", "ratio", "expected"),
    [
        ("constant", 0.0, [0.5, 1, 1, 1, 1, 1, 1]),
        ("linear", 0.0, [0.5, 1, 1, 0.75, 0.5, 0.25, 0]),
        ("linear", 0.2, [0.5, 1, 1, 0.8, 0.6, 0.4, 0.2]),
        ("cosine", 0.0, [0.5, 1, 1, 0.8535534, 0.5, 0.1464466, 0]),
        ("cosine", 0.5, [0.5, 1, 1, 0.9267767, 0.75, 0.5732233, 0.5]),
    ],
)
def test_learning_rates(schedule: Any, ratio: float, expected: list[float]) -> None:
    optim = OptimSection(lr=0.01, schedule=schedule, min_lr_ratio=ratio, warmup_steps=2)
    rates = [learning_rate(optim, step, total_steps=6) / 0.01 for step in range(7)]
    assert rates == pytest.approx(expected, abs=1e-7)
    assert learning_rate(optim, 100, total_steps=6) == pytest.approx(0.01 * expected[-1])


def test_a_short_supervised_run_learns() -> None:
    losses, _ = sft_losses_and_model()
    assert losses[0] == pytest.approx(math.log(100), abs=0.1)  # random weights know nothing of 100 characters
    assert sum(losses[-10:]) / 10 < 1.3


@pytest.mark.parametrize("kind", ENGINES)
def test_published_weights_arrive_in_a_generation_engine(kind: str) -> None:
    trainer, receiver = engine_of(kind, double=False), packed_model(seed=7)
    trainer.update(policy_batch("token-mean", double=False), policy_loss())
    stream = trainer.stream_weights()
    stream.same_memory = False
    verify(stream, InlineEngine(receiver).update_weights(stream, 3), 3)
    for (name, a), b in zip(trainer.model.named_parameters(), receiver.named_parameters()):
        assert torch.equal(a, b[1]), name


@pytest.mark.parametrize("engine", ENGINES.values())
def test_engines_have_the_methods_of_the_protocol(engine: type) -> None:
    for name, method in inspect.getmembers(TrainEngine, inspect.isfunction):
        if not name.startswith("_"):
            wanted, found = ([*inspect.signature(getattr(c, name)).parameters.values()] for c in (TrainEngine, engine))
            found, own = found[: len(wanted)], found[len(wanted) :]
            assert all(p.kind is p.KEYWORD_ONLY and p.default is None for p in own), "nobody gives what is its own"
            defaults = [
                w.default if w.default is not ... or f.default is f.empty else f.default  # ... stands for some default
                for w, f in zip(wanted, found)
            ]
            assert [(p.name, p.kind, default) for p, default in zip(wanted, defaults, strict=True)] == [
                (p.name, p.kind, p.default) for p in found
            ], method


def test_moving_to_the_host_and_back_keeps_everything() -> None:
    batch, loss = policy_batch("token-mean"), policy_loss()
    straight, moved = engine_of(), engine_of()
    for engine in (straight, moved):
        engine.update(batch, loss)
    moved.to("host")
    moved.to("device")
    assert_close(outcome(straight, batch, loss), outcome(moved, batch, loss), 0.0)


def in_bfloat16(kind: str = "qwen3", *, head: bool = False, **optim: Any) -> tuple[LocalEngine, LocalEngine]:
    """An engine that multiplies in bfloat16, and the same in float32."""
    engines = []
    for dtype in ("bfloat16", "float32"):
        model = packed_model(kind)
        top = value_head(model) if head else None
        for parameter in () if top is None else top.parameters():
            parameter.data = torch.linspace(-1, 1, parameter.numel()).view_as(parameter)
        section = OptimSection(**{"lr": 1e-3, "clip_grad_norm": 1e9, **optim})
        engines.append(
            LocalEngine(model, section, total_steps=10, tokens_per_microbatch=1000, value_head=top, dtype=dtype)  # type: ignore[arg-type]
        )
    return engines[0], engines[1]


@pytest.mark.parametrize("kind", ["qwen3", "gemma2"])
def test_bfloat16_is_of_products_alone(kind: str, tmp_path: Path) -> None:
    """The bounds are those of the sharded engines (tests/engines/test_fsdp.py): a product of numbers of 8 bits is off
    by 2^-9 of its size, a gradient behind a dozen of them by some hundredths. All that is kept is in float32."""
    low, full = in_bfloat16(kind)
    batch = policy_batch("token-mean", double=False)
    columns = [engine.score(batch, ["logp", "entropy"]) for engine in (low, full)]
    assert all(column.dtype == torch.float32 for column in columns[0].values())
    apart = (columns[0]["logp"] - columns[1]["logp"]).abs().max()
    assert 1e-4 < apart < 0.2
    updates = [engine.update(batch, policy_loss()) for engine in (low, full)]
    assert updates[0].metrics["actor/loss"] == pytest.approx(updates[1].metrics["actor/loss"], abs=0.02)
    gaps = []
    for name, expected in full.trained.items():
        found = low.trained[name]
        assert found.grad is not None and expected.grad is not None
        assert found.dtype == found.grad.dtype == torch.float32
        gaps.append(float((found.grad - expected.grad).norm() / expected.grad.norm()))
        assert not torch.equal(found, found.bfloat16().float())
    assert 1e-3 < max(gaps) < 0.1
    assert {t.dtype for kept in low.moments().values() for t in kept.values()} == {torch.float32}
    low.save(tmp_path)
    assert {t.dtype for t in load_file(tmp_path / "model/model.safetensors").values()} == {torch.float32}


def test_a_value_is_read_in_float32_from_products_in_bfloat16() -> None:
    low, full = in_bfloat16(head=True)
    batch = ragged_batch(LENGTHS)
    value_T = low.score(batch, ["value"])["value"]
    assert not torch.equal(value_T, value_T.bfloat16().float())
    assert (value_T - full.score(batch, ["value"])["value"]).abs().max() < 0.1


def test_a_frozen_actor_and_its_reference_multiply_in_the_same_type() -> None:
    """The divergence of a model from itself is 0, bit for bit."""
    low, _ = in_bfloat16()
    batch = ragged_batch(LENGTHS)
    reference = LocalReference(packed_model(), tokens_per_microbatch=1000, device="cpu", dtype="bfloat16")
    assert reference.score(batch, ["logp"])["logp"].equal(low.score(batch, ["logp"])["logp"])


def test_the_engine_section_says_so_for_one_process_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {}
    for dtype in ("auto", "float32", "bfloat16"):
        (tmp_path / dtype).mkdir()
        config = configuration(tmp_path / dtype, "sft", engine={"dtype": dtype}, train={"steps": 1})
        succeed(capsys, "sft", config)
        found[dtype] = metrics(tmp_path / dtype / "run")[0]["train/loss"]
        weights = load_file(tmp_path / dtype / "run/model/model.safetensors")
        assert {t.dtype for t in weights.values()} == {torch.float32}
    assert found["auto"] == found["float32"] != found["bfloat16"]
    assert found["bfloat16"] == pytest.approx(found["float32"], abs=0.02)


def test_a_supervised_run_learns_in_bfloat16() -> None:
    """As many steps, to within a twentieth of what was learned in float32."""
    batch = ragged_batch((12,) * 8)
    batch["policy_weight_T"] = token_weights(batch, "token-mean", norm=1)
    losses = []
    for engine in in_bfloat16(lr=2e-2):
        found = [engine.update(batch, Loss("cross_entropy")).metrics["actor/loss"] for _ in range(8)]
        losses += [found[0], found[-1]]
    _, low, first, full = losses
    assert full < first - 1
    assert low == pytest.approx(full, abs=0.05 * (first - full))
