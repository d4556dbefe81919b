"""Critic, shared trunk and divergence from a reference: the same update however it is cut, and what it should be."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hybridflow.algorithms.advantage.registry import advantage_columns
from hybridflow.algorithms.value_loss import clipped_value_loss
from hybridflow.batch import Batch
from hybridflow.config.sections.optim import OptimSection
from hybridflow.engines.local import LocalEngine
from hybridflow.models.attention import PackedLayout
from hybridflow.models.value import ValueHead, value_head
from hybridflow.protocols.training import Loss, Update

from simulated_ranks import SimulatedRanks
from tiny import packed_model, ragged_batch, weights_of, with_policy_columns

MODES = ("token-mean", "seq-mean-token-mean", "prompt-mean")  # all of them: test_partition_invariance.py
LENGTHS = (7, 3, 12, 5, 9, 4, 2, 16)
ORDERS = (range(8), range(8)[::-1], (3, 0, 7, 5, 1, 6, 2, 4))
CUTS = (16, 23, 1000)
ENGINES = {"local": LocalEngine, "ranks": SimulatedRanks}
GAE = {"gamma": 0.97, "lam": 0.9}

VALUE = Loss("value", {"clip_value": 0.2})
POLICY: dict[str, Any] = {"policy_loss": "ppo_clip"}
DIVERGENCE = Loss("policy", {**POLICY, "kl_loss_coef": 0.3, "kl_loss_estimator": "k3"})
SHARED = Loss("policy", {**DIVERGENCE.params, "entropy_coef": 0.01, "value_coef": 0.4, "clip_value": 0.2})


def head_of(dtype: torch.dtype) -> ValueHead:
    """A head that has begun to learn."""
    head = value_head(packed_model()).to(dtype)
    with torch.no_grad():
        head.weight.copy_(torch.linspace(-0.2, 0.3, len(head.weight)))
        head.bias.fill_(0.1)
    return head


def engine_of(kind: str = "local", cut: int = 1000, *, double: bool = True, name: str = "critic") -> LocalEngine:
    dtype = torch.float64 if double else torch.float32
    optim = OptimSection(lr=1e-3, clip_grad_norm=0.05, weight_decay=0.1)
    head = head_of(dtype)
    return ENGINES[kind](  # type: ignore[return-value]
        packed_model(dtype=dtype), optim, total_steps=10, tokens_per_microbatch=cut, value_head=head, name=name
    )


def batch_for(mode: str, *, double: bool = True) -> Batch:
    """Eight sequences with values, returns and whitened advantages; one has no loss token at all."""
    batch = ragged_batch(LENGTHS)
    batch["loss_mask_T"] &= batch.sequence_of() != 5
    engine = engine_of(double=double)
    scores = engine.score(batch, ["logp", "value"])
    batch = with_policy_columns(batch, scores["logp"], mode)
    noise_T = torch.randn(batch.total(), generator=torch.Generator().manual_seed(5), dtype=scores["logp"].dtype)
    batch["ref_logp_T"] = scores["logp"] + 0.2 * noise_T
    batch["value_T"] = scores["value"] + 0.3 * noise_T
    batch["reward_T"] = 0.5 * noise_T.roll(3)
    for name, column_T in advantage_columns("gae", batch, GAE).items():
        batch[name] = column_T
    batch["kl_weight_T"] = batch["policy_weight_T"]
    batch["value_weight_T"] = weights_of(batch, mode)
    return batch


def outcome(engine: LocalEngine, batch: Batch, loss: Loss) -> tuple[Update, dict[str, Tensor]]:
    """The update, and every gradient and weight that it left."""
    update = engine.update(batch, loss)
    assert update.applied
    weights = {f"{n} weight": p.detach().clone() for n, p in engine.trained.items()}
    gradients = {f"{n} gradient": p.grad.clone() for n, p in engine.trained.items() if p.grad is not None}
    return update, weights | gradients


def assert_close(a: tuple[Update, dict[str, Tensor]], b: tuple[Update, dict[str, Tensor]], tolerance: float) -> None:
    assert a[0].metrics.keys() == b[0].metrics.keys() and a[1].keys() == b[1].keys()
    for name, value in a[0].metrics.items():
        assert b[0].metrics[name] == pytest.approx(value, abs=tolerance), name
    for name, tensor in a[1].items():
        torch.testing.assert_close(b[1][name], tensor, atol=tolerance, rtol=0, msg=name)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("loss", [VALUE, DIVERGENCE, SHARED], ids=["value", "divergence", "shared trunk"])
def test_the_update_is_the_same_however_it_is_cut(mode: str, loss: Loss) -> None:
    batch = batch_for(mode)
    whole = outcome(engine_of(), batch, loss)
    if loss.params.get("clip_value"):
        assert 0 < whole[0].metrics["critic/vf_clipfrac"] < 1  # some tokens are clipped, some are not
        assert float(whole[1]["value_head.weight gradient"].abs().max()) > 1e-5
    for cut in CUTS:
        for order in ORDERS:
            for kind in ENGINES:
                assert_close(whole, outcome(engine_of(kind, cut), batch.take(list(order)), loss), 1e-10)


@pytest.mark.parametrize("kind", ENGINES)
def test_values_and_advantages_do_not_depend_on_the_cut_or_the_order_of_rows(kind: str) -> None:
    batch = batch_for("token-mean")
    whole = {n: batch[n] for n in ("advantage_T", "return_T")} | engine_of().score(batch, ["value"])
    for cut in CUTS:
        for order in ORDERS:
            mixed = batch.take(list(order))
            mixed["position_T"] = torch.arange(batch.total())
            back = mixed.take(torch.argsort(torch.tensor(list(order))))["position_T"]
            again = advantage_columns("gae", mixed, GAE) | engine_of(kind, cut).score(mixed, ["value"])
            for name, column_T in whole.items():
                torch.testing.assert_close(again[name][back], column_T, atol=1e-10, rtol=0, msg=name)


def plain_hidden(engine: LocalEngine, row: Batch) -> Tensor:
    return engine.model.model(
        input_ids=row["input_ids_T"][None],
        position_ids=torch.arange(row.total())[None],
        use_cache=False,
        layout=PackedLayout(row.lengths()),
    ).last_hidden_state[0]


def test_a_value_is_read_from_the_state_that_the_token_is_predicted_from_and_learnt_there() -> None:
    batch = batch_for("seq-mean-token-mean")
    engine = engine_of(cut=16)
    engine.optim = OptimSection(lr=1e-3, clip_grad_norm=1e9)
    reference = copy.deepcopy(engine)
    value_T = engine.score(batch, ["value"])["value"]
    assert value_T[~batch["loss_mask_T"]].eq(0).all()
    head, total = reference.value_head, torch.zeros((), dtype=torch.float64)
    assert head is not None
    for row, found in zip((batch.take([i]) for i in range(len(batch))), value_T.split(batch.lengths().tolist())):
        value = plain_hidden(reference, row) @ head.weight + head.bias
        for t in row["loss_mask_T"].nonzero()[:, 0].tolist():
            assert float(found[t]) == pytest.approx(float(value[t - 1].detach()), abs=1e-12)
            token, _ = clipped_value_loss(value[t - 1], row["value_T"][t], row["return_T"][t], clip_value=0.2)
            total = total + token * row["value_weight_T"][t]
    total.backward()
    update, found = outcome(engine, batch, VALUE)
    assert update.metrics["critic/loss"] == pytest.approx(float(total.detach()), abs=1e-9)
    assert update.metrics["critic/vf_loss"] == update.metrics["critic/loss"]
    for name, p in reference.trained.items():
        torch.testing.assert_close(found[f"{name} gradient"], p.grad, atol=1e-9, rtol=0, msg=name)


def test_the_terms_of_a_shared_trunk_add_up() -> None:
    batch = batch_for("token-mean")
    together = outcome(engine_of(), batch, SHARED)[0].metrics
    policy, value = engine_of().update(batch, DIVERGENCE).metrics, engine_of().update(batch, VALUE).metrics
    assert together["critic/vf_loss"] == pytest.approx(value["critic/vf_loss"], abs=1e-12)
    assert together["actor/kl_loss"] == pytest.approx(policy["actor/kl_loss"], abs=1e-12)
    total = policy["critic/loss"] - 0.01 * together["actor/entropy_loss"] + 0.4 * value["critic/vf_loss"]
    assert together["critic/loss"] == pytest.approx(total, abs=1e-12)
    assert policy["critic/loss"] == pytest.approx(policy["actor/pg_loss"] + 0.3 * policy["actor/kl_loss"], abs=1e-12)


def test_a_divergence_loss_brings_the_policy_towards_the_reference() -> None:
    batch = batch_for("token-mean", double=False)
    batch["advantage_T"] = torch.zeros(batch.total())
    batch["ref_logp_T"] = engine_of(double=False).score(batch, ["logp"])["logp"] + 0.3  # more likely than they are
    engine = engine_of(double=False)
    engine.optim = OptimSection(lr=2e-4)
    losses = [engine.update(batch, DIVERGENCE).metrics["actor/kl_loss"] for _ in range(6)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("kind", ENGINES)
def test_a_critic_learns_its_returns(kind: str) -> None:
    batch = batch_for("token-mean", double=False)
    engine = engine_of(kind, 23, double=False)
    before = engine.update(batch, Loss("value", {"clip_value": None})).metrics["critic/vf_loss"]
    for _ in range(60):
        after = engine.update(batch, Loss("value", {"clip_value": None})).metrics["critic/vf_loss"]
    assert after < 0.2 * before


def test_save_and_load_continue_bit_for_bit(tmp_path: Path) -> None:
    batch = batch_for("token-mean", double=False)
    straight = engine_of(cut=23, double=False)
    for _ in range(3):
        straight.update(batch, VALUE)
    first, second = engine_of(cut=23, double=False), engine_of(cut=23, double=False)
    first.update(batch, VALUE)
    first.save(tmp_path)
    second.load(tmp_path)
    for _ in range(2):
        second.update(batch, VALUE)
    for name, parameter in straight.trained.items():
        assert torch.equal(parameter, second.trained[name]), name


def test_a_value_loss_that_is_not_finite_changes_nothing_and_names_its_rows() -> None:
    batch, engine = batch_for("token-mean", double=False), engine_of(cut=16, double=False)
    assert engine.update(batch, VALUE).applied
    before = copy.deepcopy({n: p.detach() for n, p in engine.trained.items()})
    spoilt = batch.select(list(batch))
    spoilt["return_T"] = batch["return_T"].clone()
    spoilt["return_T"][batch.offsets["T"][1:][[2, 7]] - 1] = torch.inf
    update = engine.update(spoilt, VALUE)
    assert not update.applied and update.bad_rows == [2, 7]
    assert all(torch.equal(p, before[n]) for n, p in engine.trained.items())


def test_the_value_head_is_not_streamed() -> None:
    engine = engine_of()
    assert engine.stream_weights().names == frozenset(packed_model().state_dict())


def test_a_fresh_head_says_nothing_and_computes_in_its_own_precision() -> None:
    hidden = torch.randn(3, 32)
    assert value_head(packed_model())(hidden).tolist() == [0.0, 0.0, 0.0]
    head = head_of(torch.float32)
    plain = hidden @ head.weight + head.bias
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head(hidden).dtype == torch.float32 and head(hidden).equal(plain)
        assert head(hidden.bfloat16()).dtype == torch.float32
