"""Models cut over real processes: the same gradients, weights and scores as in one process, and the same decisions."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hybridflow.batch import Batch
from hybridflow.config.locate import load_function
from hybridflow.config.sections.engine import Fsdp2Section
from hybridflow.engines.fsdp.ranks import check_degrees, check_parts
from hybridflow.engines.reference import LocalReference
from hybridflow.errors import UserError
from hybridflow.models.load import load_model, stop_ids
from hybridflow.protocols.training import Loss

from on_ranks import engines
from on_ranks.engines import Case, Trained
from ranks import shared_ranks
from tiny import CARRY, group_batch, plain_model, ragged_batch, weights_of, with_policy_columns

LENGTHS = (7, 3, 12, 5, 9, 4, 2, 16)
POLICY = Loss("policy", {"policy_loss": "ppo_clip", "values": {"clip_dual": 3.0}, "entropy_coef": 0.01})
VALUE = Loss("value", {"clip_value": 0.2})
SHARED = Loss("policy", {**POLICY.params, "value_coef": 0.4, "clip_value": 0.2})
FSDP2, FSDP1 = {"strategy": "fsdp2"}, {"strategy": "fsdp1"}
EITHER = pytest.mark.parametrize("section", [FSDP2, FSDP1], ids=["fsdp2", "fsdp1"])
# Which of the eight sequences are where: numbers of micro-batches differ.
UNEVEN = {1: [range(8)], 2: [(0, 1, 2, 3, 4, 7), (5, 6)], 4: [(0, 1), (2,), (3, 4, 5, 6, 7), ()]}

CASES = {
    "fsdp2, tied": Case("qwen3", FSDP2),
    "fsdp2, biases, untied": Case("qwen2", FSDP2),
    "fsdp2, experts": Case("qwen3_moe", FSDP2),
    "fsdp2, soft-caps and windows": Case("gemma2", FSDP2),
    "fsdp2, padded": Case("llama", FSDP2, padded=True),
    "fsdp2, adapters": Case("qwen3", FSDP2, lora=True),
    "fsdp2, activation checkpointing": Case("qwen3", FSDP2, checkpointing=True),
    "fsdp2, weights stay gathered": Case("qwen3", FSDP2 | {"reshard_after_forward": False}),
    "fsdp2, weights on the host": Case("qwen3", FSDP2 | {"cpu_offload": True}),
    "fsdp2, weights on the host, gradients cut": Case(
        "qwen3", FSDP2 | {"cpu_offload": True, "sync_every_microbatch": True}
    ),
    "fsdp2, critic": Case("qwen3", FSDP2, head=True),
    "fsdp1, tied": Case("qwen3", FSDP1),
    "fsdp1, experts": Case("qwen3_moe", FSDP1),
    "fsdp1, padded": Case("llama", FSDP1, padded=True),
    "fsdp1, adapters": Case("qwen3", FSDP1, lora=True),
    "fsdp1, activation checkpointing": Case("qwen3", FSDP1, checkpointing=True),
    "fsdp1, gradients cut": Case("qwen3", FSDP1 | {"sync_every_microbatch": True}),
    "fsdp1, weights stay gathered": Case("qwen3", FSDP1 | {"reshard_after_forward": False}),
    "fsdp1, critic": Case("qwen3", FSDP1, head=True),
    "ulysses": Case("qwen3", FSDP2 | {"sequence_parallel": 2}),
    "ulysses, critic": Case("qwen3", FSDP2 | {"sequence_parallel": 2}, head=True),
}
FOUR = {
    "fsdp2, two copies": Case("qwen3", FSDP2 | {"shard_size": 2}),
    "fsdp1, two copies": Case("qwen3", FSDP1 | {"shard_size": 2}),
    "fsdp2 x ulysses": Case("qwen3", FSDP2 | {"sequence_parallel": 2}),
    "fsdp2, two copies x ulysses": Case("qwen2", FSDP2 | {"sequence_parallel": 2, "shard_size": 2}),
    "fsdp2, more ranks than sequences": Case("qwen3", FSDP2),
}


def recorded(case: Case) -> Batch:
    """Eight sequences as a step has recorded them, off-policy, with every column that the losses read."""
    batch = ragged_batch(LENGTHS)
    logp_T = case.local().score(batch, ["logp"])["logp"]
    batch = with_policy_columns(batch, logp_T)
    rng = torch.Generator().manual_seed(5)
    for name in ("value_T", "return_T"):
        batch[name] = torch.randn(batch.total(), generator=rng, dtype=logp_T.dtype)
    batch["value_weight_T"] = weights_of(batch, "token-mean")
    return batch


def parts_of(case: Case, processes: int, batch: Batch) -> list[Batch]:
    return [batch.take(list(rows)) for rows in UNEVEN[processes // case.section.get("sequence_parallel", 1)]]


def train_locally(case: Case, batch: Batch, loss: Loss, steps: int = 3) -> Trained:
    engine = case.local()
    weights = dict(engine.model.named_parameters()) | engine.trained
    before, updates, gradients = {n: p.detach().clone() for n, p in weights.items()}, [], {}
    for step in range(steps):
        updates.append(engine.update(batch, loss))
        if not step:
            gradients = {n: p.grad.clone() for n, p in engine.trained.items() if p.grad is not None}
    scores = engine.score(batch, engines.outputs_of(case), temperature=0.7)
    return Trained(updates, gradients, before, {n: p.detach() for n, p in weights.items()}, scores)


def assert_trained_alike(found: list[Trained], expected: Trained, case: Case, processes: int) -> None:
    """Every rank says the same; gradients, weights, metrics and scores are those of one process."""
    first = found[0]
    assert first.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        difference, size = float((first.gradients[name] - gradient).norm()), float(gradient.norm())
        assert difference <= 1e-5 * size, f"gradient of {name}, of {size:.2g}: {difference:.2g}"
    assert first.after.keys() == expected.after.keys()
    assert all(torch.equal(first.before[name], tensor) for name, tensor in expected.before.items())
    names = list(expected.gradients)
    moved, here = (torch.cat([(t.after[n] - t.before[n]).flatten() for n in names]) for t in (expected, first))
    assert float((moved - here).norm() / moved.norm()) <= 1e-3
    assert all(torch.equal(expected.after[n], first.after[n]) for n in expected.after.keys() - set(names))
    for step, update in enumerate(expected.updates):
        for rank in found:
            assert rank.updates[step].metrics == first.updates[step].metrics and rank.updates[step].applied
        assert first.updates[step].metrics == pytest.approx(update.metrics, rel=1e-4, abs=1e-5)
    peers = case.section.get("sequence_parallel", 1)
    rows = torch.tensor([i for part in UNEVEN[processes // peers] for i in part])
    batch = ragged_batch(LENGTHS)
    for name, score_T in expected.scores.items():
        batch[f"{name}_T"] = score_T
        joined_T = torch.cat([rank.scores[name] for rank in found[::peers]])
        torch.testing.assert_close(joined_T, batch.take(rows)[f"{name}_T"], rtol=1e-4, atol=2e-5)


def loss_of(case: Case) -> Loss:
    return VALUE if case.head else POLICY


# --- the same training ---


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one_does(name: str) -> None:
    case, loss = CASES[name], loss_of(CASES[name])
    batch = recorded(case)
    found = shared_ranks(2).run(engines.train, case, parts_of(case, 2, batch), loss)
    assert_trained_alike(found, train_locally(case, batch, loss), case, 2)


@pytest.mark.parametrize("name", FOUR)
def test_four_processes_train_as_one_does(name: str) -> None:
    case = FOUR[name]
    batch = recorded(case)
    found = shared_ranks(4).run(engines.train, case, parts_of(case, 4, batch), POLICY)
    assert_trained_alike(found, train_locally(case, batch, POLICY), case, 4)


@EITHER
def test_activations_in_host_memory_change_nothing(section: dict[str, Any]) -> None:
    case = Case("qwen3", section | {"activation_offload": True})
    batch = recorded(case)
    found = shared_ranks(2).run(engines.offloading, case, parts_of(case, 2, batch), POLICY)
    assert_trained_alike(found, train_locally(case, batch, POLICY), case, 2)


@pytest.mark.parametrize(
    "section", [FSDP2 | {"offload": ["parameters", "optimizer"]}, FSDP1 | {"offload": ["optimizer"]}]
)
def test_a_model_that_moves_between_phases_trains_the_same(section: dict[str, Any]) -> None:
    case = Case("qwen3", section)
    batch = recorded(case)
    found = shared_ranks(2).run(engines.train, case, parts_of(case, 2, batch), POLICY, 3, moved=True)
    assert_trained_alike(found, train_locally(case, batch, POLICY), case, 2)


@EITHER
def test_a_shared_trunk_learns_policy_and_values(section: dict[str, Any]) -> None:
    case = Case("qwen3", section, head=True)
    batch = recorded(case)
    found = shared_ranks(2).run(engines.train, case, parts_of(case, 2, batch), SHARED)
    assert_trained_alike(found, train_locally(case, batch, SHARED), case, 2)


def test_in_double_precision_nothing_is_left_of_the_difference() -> None:
    """Prompts are shared within ranks; a group is cut in two."""
    case = Case("qwen3", FSDP2, double=True, cut=40, optim={"lr": 1e-3, "clip_grad_norm": 1e9})
    batch = group_batch()
    batch = with_policy_columns(batch, case.local().score(batch, ["logp"])["logp"])
    parts = [batch.take([0, 4, 5, 8, 9, 10]), batch.take([1, 2, 3, 6, 7, 11])]
    found, expected = shared_ranks(2).run(engines.train, case, parts, POLICY)[0], train_locally(case, batch, POLICY)
    for name, gradient in expected.gradients.items():
        torch.testing.assert_close(found.gradients[name], gradient, atol=1e-10, rtol=0, msg=name)
        torch.testing.assert_close(found.after[name], expected.after[name], atol=1e-10, rtol=0, msg=name)
    assert found.updates[-1].metrics == pytest.approx(expected.updates[-1].metrics, rel=1e-9, abs=1e-10)


@EITHER
def test_bfloat16_is_of_products_alone(section: dict[str, Any]) -> None:
    case = Case("qwen3", section | {"dtype": "bfloat16"})
    batch = recorded(case)
    parts, expected = parts_of(case, 2, batch), train_locally(case, batch, POLICY, 1)
    found = shared_ranks(2).run(engines.train, case, parts, POLICY, 1)[0]
    gaps = [float((found.gradients[n] - g).norm() / g.norm()) for n, g in expected.gradients.items()]
    assert 1e-3 < max(gaps) < 0.1  # bfloat16 has 8 bits
    assert found.updates[0].metrics["actor/loss"] == pytest.approx(expected.updates[0].metrics["actor/loss"], abs=0.02)
    critic = replace(case, head=True)
    assert shared_ranks(2).run(engines.precisions, critic, parts, SHARED) == [{torch.float32}] * 2
    value_T = shared_ranks(2).run(engines.train, critic, parts, SHARED, 1)[0].scores["value"]
    assert not torch.equal(value_T, value_T.bfloat16().float())  # the head computes in float32


@EITHER
def test_gradients_are_summed_between_processes_once_for_all_micro_batches(section: dict[str, Any]) -> None:
    case = Case("qwen3", section)
    parts = parts_of(case, 2, recorded(case))
    (one, once), (many, sums) = (
        shared_ranks(2).run(engines.sums_between_ranks, replace(case, cut=cut), parts, POLICY)[0] for cut in (1000, 16)
    )
    assert one == 1 and many > 2 and sums == once > 0
    each = Case("qwen3", section | {"sync_every_microbatch": True}, cut=16)
    assert shared_ranks(2).run(engines.sums_between_ranks, each, parts, POLICY)[0] == (many, many * once)


@pytest.mark.slow
def test_compiled_layers_train_as_they_are() -> None:
    case = Case("qwen3", FSDP2 | {"compile": True}, cut=1000)  # every length of a micro-batch is compiled
    batch = recorded(case)
    found = shared_ranks(2).run(engines.train, case, parts_of(case, 2, batch), POLICY)
    assert_trained_alike(found, train_locally(case, batch, POLICY), case, 2)


# --- decisions ---


@EITHER
def test_a_loss_that_is_not_finite_on_one_process_is_applied_by_none(section: dict[str, Any]) -> None:
    case = Case("qwen3", section)
    batch = recorded(case)
    bad = batch.select(list(batch))
    bad["advantage_T"] = batch["advantage_T"].clone()
    bad["advantage_T"][int(batch.offsets["T"][7]) - 1] = math.nan  # the last token of sequence 6, the second's last one
    updates = shared_ranks(2).run(engines.spoilt, case, parts_of(case, 2, batch), parts_of(case, 2, bad), POLICY)
    for rank in updates:
        assert [update.applied for update in rank] == [True, False, True]
    assert [rank[1].bad_rows for rank in updates] == [[], [1]]
    assert math.isnan(updates[0][1].metrics["actor/loss"])


def test_without_sequences_anywhere_there_is_no_step() -> None:
    case = Case("qwen3", FSDP2)
    batch = recorded(case)
    nothing = [batch.take([]), batch.take([])]
    for trained in shared_ranks(2).run(engines.train, case, nothing, POLICY, 2):
        assert [update.metrics for update in trained.updates] == [{}, {}]
        assert all(torch.equal(trained.before[name], tensor) for name, tensor in trained.after.items())
        assert trained.scores["logp"].shape == (0,)


def test_a_process_that_was_given_one_sequence_less_is_named() -> None:
    case = Case("qwen3", FSDP2)
    parts = parts_of(case, 2, recorded(case))
    sent = [len(part) for part in parts]
    parts[1] = parts[1].take([0])
    said = shared_ranks(2).run(engines.refused, case, parts, POLICY, sent)
    assert said[0] == said[1]
    assert "rank 1 has 1 and was sent 2" in said[0] and "rank 0" not in said[0]
    with pytest.raises(RuntimeError, match="rank 2 has 4 and was sent 5"):  # two ranks at each place
        check_parts([3, 3, 4, 5], [3, 5])


def test_processes_with_different_models_are_told_before_anything_is_cut() -> None:
    said = shared_ranks(2).run(engines.another_model_on_rank_1)
    assert said[0] == said[1] and "rank 1 has made another model than rank 0: " in said[0]


@pytest.mark.parametrize(
    ("section", "words"),
    [
        (FSDP2 | {"shard_size": 3}, "engine.shard_size is 3, but there are 2 processes"),
        (FSDP2 | {"sequence_parallel": 4}, "engine.sequence_parallel is 4, but there are 2 processes"),
        (FSDP1 | {"cpu_offload": True}, "FSDP1 has no engine.cpu_offload here"),
    ],
)
def test_what_cannot_be_cut_is_refused(section: dict[str, Any], words: str) -> None:
    for said in shared_ranks(2).run(engines.not_made, Case("qwen3", section)):
        assert words in said and "fix: " in said


def test_adapters_of_experts_are_refused_where_they_cannot_be_cut() -> None:
    assert "adapters of experts" in shared_ranks(2).run(engines.not_made, Case("qwen3_moe", FSDP1, lora=True))[0]
    case = Case("qwen3_moe", FSDP2, lora=True)
    batch = recorded(case)
    found = shared_ranks(2).run(engines.train, case, parts_of(case, 2, batch), POLICY)
    assert_trained_alike(found, train_locally(case, batch, POLICY), case, 2)


def test_degrees_that_do_not_divide_say_which_would() -> None:
    with pytest.raises(UserError) as error:
        check_degrees(12, Fsdp2Section(strategy="fsdp2", shard_size=8))
    assert "set it to one of 1, 2, 3, 4, 6, 12" in str(error.value)
    check_degrees(12, Fsdp2Section(strategy="fsdp2", shard_size=4, sequence_parallel=2))


# --- references, streams, loading ---


@EITHER
@pytest.mark.parametrize("reshard", [True, False])
def test_scores_are_of_the_weights_of_now(section: dict[str, Any], reshard: bool) -> None:
    case = Case("qwen2", section | {"reshard_after_forward": reshard})
    batch = ragged_batch(LENGTHS)
    local = case.local()
    first = local.score(batch, ["logp"])["logp"]
    with torch.no_grad():
        for parameter in local.trained.values():
            parameter.mul_(0.5)
    second = local.score(batch, ["logp"])["logp"]
    for found, expected in zip(
        shared_ranks(2).run(engines.scored_around_a_change, case, [batch, batch])[0], (first, second)
    ):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@EITHER
def test_the_reference_of_adapters_is_the_actor_without_them(section: dict[str, Any]) -> None:
    case = Case("qwen3", section, lora=True, optim={"lr": 1e-2})
    batch = recorded(case)
    parts = parts_of(case, 2, batch)
    for part, scores in zip(parts, shared_ranks(2).run(engines.reference_of_adapters, case, parts, POLICY)):
        first, reference, actor, frozen = (score["logp"] for score in scores)
        expected = Case("qwen3").local().score(part, ["logp"])["logp"]
        for score_T in (first, reference, frozen):
            torch.testing.assert_close(score_T, expected, atol=1e-5, rtol=0)
        assert float((actor - expected).abs().max()) > 1e-3


@EITHER
@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe", "gemma2"])
def test_a_stream_holds_the_whole_model_under_every_name(section: dict[str, Any], kind: str) -> None:
    case = Case(kind, section)
    own = {name: tensor.detach() for name, tensor in case.model().state_dict().items()}
    for names, tensors in shared_ranks(2).run(engines.published, case):
        assert sorted(tensors) == names == sorted(own)
        assert all(torch.equal(tensor, own[name]) for name, tensor in tensors.items())


@EITHER
@pytest.mark.parametrize(("kind", "lora"), [("qwen3_moe", None), ("qwen3", {"rank": 4})])
def test_one_process_reads_the_weights_for_all(
    section: dict[str, Any], kind: str, lora: dict[str, Any] | None, tmp_path: Path
) -> None:
    model = plain_model(kind)
    model.resize_token_embeddings(100)  # as many as the tokenizer has
    model.generation_config.eos_token_id = [7]
    model.resize_token_embeddings(100)  # as many as the tokenizer has
    model.save_pretrained(tmp_path)
    load_function(f"{CARRY}:make_tokenizer")().save_pretrained(tmp_path)
    made, tokenizer = load_model(str(tmp_path))
    batch = ragged_batch(LENGTHS)
    expected = LocalReference(made, tokens_per_microbatch=99, device="cpu").score(batch, ["logp"])["logp"]
    settings: dict[str, Any] = {"path": str(tmp_path), "lora": lora, "activation_checkpointing": True}
    for rank, (held, scores, stops) in enumerate(shared_ranks(2).run(engines.loaded, section, settings, batch)):
        assert (held > 0) == (rank == 0)
        assert stops == stop_ids(made, tokenizer) and 7 in stops
        torch.testing.assert_close(scores["logp"], expected, atol=1e-5, rtol=0)
