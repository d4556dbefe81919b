"""Ranks that share the tokens of a forward pass compute what one process does."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from hybridflow.config.kinds.sft import SftConfig
from hybridflow.errors import UserError
from hybridflow.models.ulysses import check_degree

from on_ranks import ulysses
from ranks import shared_ranks

pytestmark = pytest.mark.timeout(180)


def assert_same(found: list[dict[str, float]], tolerance: float) -> None:
    for distances in found:
        largest = distances.pop("largest gradient")
        assert largest > 1e-3
        assert distances.pop("gradients") <= tolerance * max(1.0, largest)
        assert max(distances.values()) <= tolerance, distances


@pytest.mark.parametrize(
    "kind",
    [
        "llama",
        "qwen2",
        "qwen3",  # tied embeddings
        "gemma2",  # sliding windows, soft-capped scores
        "deepseek_v3",  # keys and values of different sizes
        "qwen3_moe",
        "one_kv_head",
        "six_of_twelve_heads",
    ],
)
@pytest.mark.parametrize("degree", [2, 4])
def test_scores_losses_and_gradients_are_those_of_one_process(kind: str, degree: int) -> None:
    assert_same(shared_ranks(degree).run(ulysses.compare, kind), 1e-10)


@pytest.mark.parametrize("kind", ["qwen3", "gemma2"])
def test_in_single_precision_too(kind: str) -> None:
    """Each is about as far from float64, so they are about twice that apart; a mistake would be thousands of times."""
    rounding = ulysses.rounding(kind)
    for distances in shared_ranks(2).run(ulysses.compare, kind, torch.float32):
        distances.pop("largest gradient")
        assert distances.keys() == rounding.keys()
        assert all(distances[name] <= 8 * rounding[name] for name in rounding), (distances, rounding)
    assert 0 < max(rounding.values()) < 1e-5


@pytest.mark.parametrize("policy", ["gspo", "gmpo"])
def test_losses_of_whole_sequences_are_whole(policy: str) -> None:
    """Their ratios are means over a sequence, whose tokens stand on several ranks here."""
    assert_same(shared_ranks(4).run(ulysses.compare, "qwen3", policy=policy), 1e-10)


@pytest.mark.parametrize("prompts", [(6, 9, 1), (1,)])
def test_answers_share_their_prompt(prompts: tuple[int, ...]) -> None:
    assert_same(shared_ranks(4).run(ulysses.compare, "gemma2", lengths=prompts, groups=True), 1e-10)


@pytest.mark.parametrize("lengths", [(2,), (3,), (1, 2), (1, 1, 40)])
def test_fewer_tokens_than_ranks_and_sequences_over_all_ranks(lengths: tuple[int, ...]) -> None:
    assert_same(shared_ranks(4).run(ulysses.compare, "qwen3_moe", lengths=lengths), 1e-10)


def test_activation_checkpointing_exchanges_again() -> None:
    assert_same(shared_ranks(4).run(ulysses.compare, "llama", checkpointing=True), 1e-10)


def test_under_autocast_the_exchange_rounds_nothing_that_attention_would_not() -> None:
    """Products of bfloat16 over other shapes may round otherwise, by parts of a thousandth."""
    assert_same(shared_ranks(2).run(ulysses.compare, "qwen3", torch.float32, autocast=True), 2e-2)


def test_moments_and_values_without_gradients() -> None:
    for distances in shared_ranks(4).run(ulysses.compare_without_gradients, "qwen3", (7, 3, 12, 5)):
        assert distances.keys() == {"index", "logp", "entropy", "sum_pi_squared", "value index", "value"}
        assert max(distances.values()) <= 1e-10, distances


def test_every_rank_has_its_share_of_the_tokens() -> None:
    assert shared_ranks(4).run(ulysses.slices, (7, 3, 12, 5)) == [7, 7, 7, 6]
    assert shared_ranks(4).run(ulysses.slices, (2,)) == [1, 1, 1, 1]


def test_a_batch_without_sequences_runs_and_has_gradients_of_zero() -> None:
    assert shared_ranks(2).run(ulysses.empty_part) == [0.0, 0.0]


def test_a_degree_that_does_not_divide_the_heads_is_refused() -> None:
    for degree in (1, 2, 3, 6):
        check_degree(6, degree)
    with pytest.raises(UserError, match=r"sequence_parallel is 4, but the model has 6 query heads[\s\S]*1, 2, 3, 6"):
        check_degree(6, 4)


def test_padded_models_are_refused() -> None:
    section = {"strategy": "fsdp2", "sequence_parallel": 2}
    values = {
        "run": {"folder": "r"},
        "model": {"path": "m", "packing": False},
        "data": {"train": "d"},
        "engine": section,
    }
    with pytest.raises(ValidationError, match=r"engine\.sequence_parallel is 2, but with model\.packing=false"):
        SftConfig.model_validate(values | {"train": {"steps": 1}, "placement": {"pools": {"all": 2}}})
    for said in shared_ranks(2).run(ulysses.refused_padded):
        assert said.startswith("UserError: the tokens of a padded Qwen3ForCausalLM cannot be shared among 2 processes")
        assert "engine.sequence_parallel=1" in said
