"""Which reward a data source gets: verl's table, prefixes, a user's own, and what is refused."""

from __future__ import annotations

import pytest

from hybridflow.errors import UserError
from hybridflow.rewards.graders.routing import SOURCES, route
from hybridflow.rewards.verifiable.registry import REWARDS


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("openai/gsm8k", "gsm8k"),
        ("lighteval/MATH", "math"),
        ("DigitalLearningGmbH/MATH-lighteval", "math"),
        ("HuggingFaceH4/MATH-500", "math"),
        ("math_dapo", "math_dapo"),
        ("math", "math_dapo"),
        ("math_dapo_reasoning", "math_dapo"),
        ("aime", "math_dapo"),
        ("aime2024", "math_dapo"),
        *(
            (f"numina_{s}", "math")
            for s in ["aops_forum", "synthetic_math", "amc_aime", "synthetic_amc", "cn_k12", "olympiads"]
        ),
        *((s, "code") for s in ["apps", "codecontests", "codeforces", "taco"]),
        ("hiyouga/geometry3k", "geo3k"),
        *(
            (f"searchR1_{s}", "qa_em")
            for s in ["nq", "triviaqa", "popqa", "hotpotqa", "2wikimultihopqa", "musique", "bamboogle"]
        ),
    ],
)
def test_every_source_that_verl_knows_has_a_reward(source: str, name: str) -> None:
    assert route(source, {}) == name


def test_every_source_leads_to_a_reward_that_there_is() -> None:
    assert set(SOURCES.values()) <= set(REWARDS)


def test_own_sources_go_first() -> None:
    own = {"mine": "score.py:score", "openai/gsm8k": "gsm8k_flexible", "aime2024": "math"}
    assert [route(s, own) for s in ("mine", "openai/gsm8k", "aime2024", "aime2025")] == [*own.values(), "math_dapo"]


def test_an_unknown_source_is_refused_with_the_nearest_and_how_to_add_it() -> None:
    with pytest.raises(UserError) as caught:
        route("openai/gsm8K", {})
    assert caught.value.what == "no reward is known for data_source 'openai/gsm8K'; did you mean 'openai/gsm8k'?"
    assert "reward.sources='{openai/gsm8K: NAME}'" in caught.value.fix
    with pytest.raises(UserError, match="did you mean 'my_set'"):
        route("my_sett", {"my_set": "gsm8k"})


def test_rows_without_a_source_are_refused() -> None:
    with pytest.raises(UserError, match="rows have no data_source") as caught:
        route(None, {})
    assert "reward.function=gsm8k" in caught.value.fix
